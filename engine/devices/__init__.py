"""Where tensors can live besides shared memory: one interface, implemented for the host and for CUDA."""
