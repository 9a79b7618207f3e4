"""The worker process: one loaded model instance that takes batches from its doorbell."""
