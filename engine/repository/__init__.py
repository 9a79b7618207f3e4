"""The model repository on disk and the model configuration: pure file and data code, no processes, no asyncio."""
