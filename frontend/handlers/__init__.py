"""One file per group of endpoints: request bytes in, :class:`Reply` out. They know neither sockets nor aiohttp."""
