"""A module beside the model (P-002)."""

FACTOR = 2
