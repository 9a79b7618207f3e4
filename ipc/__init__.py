"""Everything that crosses a process: arenas, slabs, messages, doorbells. Knows nothing of models or HTTP."""
