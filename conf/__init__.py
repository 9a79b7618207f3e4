"""Shipped configuration: the settings file, the example model repository, deployment examples."""
