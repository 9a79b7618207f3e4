"""The supervisor process: starts, watches and restarts all others, and owns the life of models."""
