"""Head `depth_text`: metric depth as text (DepthLM)."""

from __future__ import annotations
