# onnxruntime has no annotations, or is not installed everywhere: its values are Any, and typed where we take them in.
from typing import Any

def __getattr__(name: str) -> Any: ...
