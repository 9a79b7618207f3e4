"""Frameworks that run models. Each backend is one module behind the interface in ``base.py``."""
