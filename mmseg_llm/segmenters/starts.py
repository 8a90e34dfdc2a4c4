"""Clicks that lead to masks a policy will not have made itself: training material beside the oracle's own episodes
(SegAgent specification section 3.3).

Legend: H W pixels.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mmseg_llm.masks import Mask
from mmseg_llm.structures import Click

MOST = 3
"""Clicks of one sign."""
MISTAKES = 0.5
"""Share of the starts whose clicks are mistaken."""


def random_start(target: Mask, rng: np.random.Generator) -> list[Click]:
    """A few clicks that are right but carelessly placed, within the box of the object, or a mistaken one.

    A mistake is a positive click outside of the object, as of a policy that took another one for it.

    Args:
        target: the object, with pixels.
        rng: of the draw.
    """
    inside = replace(target).array  # (H, W), of a copy: the given mask keeps no pixels
    if rng.random() < MISTAKES and not inside.all():
        row, col = rng.choice(np.argwhere(~inside))
        return [Click(int(row), int(col), is_positive=True)]
    assert target.box is not None
    x1, y1, x2, y2 = (int(edge) for edge in target.box)
    box = inside[y1:y2, x1:x2]
    clicks = []
    for is_positive, least in ((True, 1), (False, 0)):
        places = np.argwhere(box == is_positive)
        for row, col in rng.permutation(places)[: int(rng.integers(least, MOST + 1))]:
            clicks.append(Click(y1 + int(row), x1 + int(col), is_positive))
    return clicks
