"""Blocks with weights (layers, attention, mamba2, stack, cache) and pure functions without (recurrence)."""
