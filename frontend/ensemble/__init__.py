"""Ensembles: requests that run through a graph of models, each step's tensors where the last one left them."""
