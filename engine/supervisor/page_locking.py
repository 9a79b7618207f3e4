"""Which shared memory workers on GPUs may page-lock: its pages must stay where they are from the beginning."""

from __future__ import annotations

from forebay.engine.devices.opening import has_gpu_files
from forebay.engine.settings import Settings


def may_be_page_locked(settings: Settings, byte_size: int) -> bool:
    """Tell of an arena before anybody knows which models there will be, and where."""
    return not settings.gpu.cpu_only and byte_size <= settings.memory.pinned_pool_byte_size and has_gpu_files()
