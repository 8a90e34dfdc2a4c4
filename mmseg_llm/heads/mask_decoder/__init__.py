"""MLLMSeg's light-weight mask decoder (arXiv 2508.04107)."""
