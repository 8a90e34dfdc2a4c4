"""Metrics: what predictions are worth, and under which protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmseg_llm.lazy import lazy

if TYPE_CHECKING:
    from mmseg_llm.metrics.protocols import PROTOCOLS, Protocol, describe_protocol, score_rows
    from mmseg_llm.metrics.referring import ReferringSegmentation, expression_row

__all__ = ["PROTOCOLS", "Protocol", "ReferringSegmentation", "describe_protocol", "expression_row", "score_rows"]

__getattr__ = lazy(
    __name__,
    {
        "PROTOCOLS": "protocols",
        "Protocol": "protocols",
        "ReferringSegmentation": "referring",
        "describe_protocol": "protocols",
        "expression_row": "referring",
        "score_rows": "protocols",
    },
)
