"""SegAgent: a mask refined click by click (arXiv 2503.08625)."""
