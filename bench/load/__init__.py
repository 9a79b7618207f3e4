"""The load generators: our own (load.c) and Debian's wrk, behind one typed Python function each (client.py)."""
