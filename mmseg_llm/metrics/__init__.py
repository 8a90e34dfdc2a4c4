"""Metrics: what predictions are worth, and under which protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmseg_llm.lazy import lazy

if TYPE_CHECKING:
    from mmseg_llm.metrics.depth import DepthEstimation
    from mmseg_llm.metrics.depth_scores import describe_depth, score_points
    from mmseg_llm.metrics.estimates import score_estimates
    from mmseg_llm.metrics.interactive import InteractiveSegmentation, score_episodes
    from mmseg_llm.metrics.making import make_metric
    from mmseg_llm.metrics.protocols import PROTOCOLS, Protocol, describe_protocol, score_rows
    from mmseg_llm.metrics.referring import ReferringSegmentation, expression_row

__all__ = [
    "PROTOCOLS",
    "DepthEstimation",
    "InteractiveSegmentation",
    "Protocol",
    "ReferringSegmentation",
    "describe_depth",
    "describe_protocol",
    "expression_row",
    "make_metric",
    "score_episodes",
    "score_estimates",
    "score_points",
    "score_rows",
]

__getattr__ = lazy(
    __name__,
    {
        "PROTOCOLS": "protocols",
        "DepthEstimation": "depth",
        "InteractiveSegmentation": "interactive",
        "Protocol": "protocols",
        "ReferringSegmentation": "referring",
        "describe_depth": "depth_scores",
        "describe_protocol": "protocols",
        "expression_row": "referring",
        "make_metric": "making",
        "score_episodes": "interactive",
        "score_estimates": "estimates",
        "score_points": "depth_scores",
        "score_rows": "protocols",
    },
)
