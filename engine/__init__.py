"""The server itself: supervisor, scheduler, workers, backends, model repository."""
