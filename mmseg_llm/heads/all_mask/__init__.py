"""STAMP: the whole mask in one parallel pass (arXiv 2512.00395)."""
