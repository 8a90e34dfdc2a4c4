"""Metrics: what predictions are worth, and under which protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmseg_llm.metrics.protocols import PROTOCOLS, Protocol, describe_protocol, score_rows
    from mmseg_llm.metrics.referring import ReferringSegmentation, expression_row

__all__ = ["PROTOCOLS", "Protocol", "ReferringSegmentation", "describe_protocol", "expression_row", "score_rows"]

_HOMES = {
    "PROTOCOLS": "protocols",
    "Protocol": "protocols",
    "ReferringSegmentation": "referring",
    "describe_protocol": "protocols",
    "expression_row": "referring",
    "score_rows": "protocols",
}


def __getattr__(name: str) -> Any:
    """Import a metric on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mmseg_llm.metrics' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f"mmseg_llm.metrics.{_HOMES[name]}"), name)
