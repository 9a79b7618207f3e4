"""Clients for programs on the server's own machine."""
