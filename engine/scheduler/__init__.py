"""The scheduler process: queues, batching, routing. A pure core, and ``loop.py`` with the sockets around it."""
