"""Metrics: what predictions are worth, and under which protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmseg_llm.lazy import lazy

if TYPE_CHECKING:
    from mmseg_llm.metrics.estimates import score_estimates
    from mmseg_llm.metrics.interactive import InteractiveSegmentation, score_episodes
    from mmseg_llm.metrics.protocols import PROTOCOLS, Protocol, describe_protocol, score_rows
    from mmseg_llm.metrics.referring import ReferringSegmentation, expression_row

__all__ = [
    "PROTOCOLS",
    "InteractiveSegmentation",
    "Protocol",
    "ReferringSegmentation",
    "describe_protocol",
    "expression_row",
    "score_episodes",
    "score_estimates",
    "score_rows",
]

__getattr__ = lazy(
    __name__,
    {
        "PROTOCOLS": "protocols",
        "InteractiveSegmentation": "interactive",
        "Protocol": "protocols",
        "ReferringSegmentation": "referring",
        "describe_protocol": "protocols",
        "expression_row": "referring",
        "score_episodes": "interactive",
        "score_estimates": "estimates",
        "score_rows": "protocols",
    },
)
