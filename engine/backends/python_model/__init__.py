"""What a Triton ``model.py`` imports as ``triton_python_backend_utils``, and what stands behind it."""
