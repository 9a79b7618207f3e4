"""The HTTP port: a lean protocol that takes inference requests and passes everything else on to aiohttp."""
