"""The metric that a name stands for."""

from __future__ import annotations

from typing import Any

from mmseg_llm.metrics.depth import DepthEstimation
from mmseg_llm.metrics.referring import ReferringSegmentation


def make_metric(name: str, **options: Any) -> DepthEstimation | ReferringSegmentation:
    """`depth` for numbers in answers, or a protocol of masks (`protocols.PROTOCOLS`).

    Args:
        name: of the protocol.
        options: of `torchmetrics.Metric`.

    Raises:
        ValueError: for an unknown name.
    """
    return DepthEstimation(**options) if name == "depth" else ReferringSegmentation(name, **options)
