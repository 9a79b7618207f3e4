"""Ensembles: a graph of models, run by whoever owns the memory of its tensors: a frontend or a shared-memory client."""
