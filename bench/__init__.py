"""Measurements: one file per question, run as ``python -m bench.<file>``; see bench/README.md."""
