"""Two views of one scene, taken before and after the camera moved without turning; beside each other in one picture.

Legend: H W pixels of a view.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace

import numpy as np

from mmseg_llm.data.synthetic.levels import Level, get_level
from mmseg_llm.data.synthetic.shading import choose_look, shade
from mmseg_llm.data.synthetic.solid import SolidObject, cast, place_camera, place_solids
from mmseg_llm.data.synthetic.vocabulary import uniform
from mmseg_llm.structures import Camera

RANGE = (0.1, 1.6)
"""Metres the camera moves along the ground."""
_LARGEST_TURN = math.pi / 3  # of the direction of the movement from straight ahead


@dataclass(frozen=True)
class Motion:
    """A pair of views.

    Attributes:
        image: uint8 `(H, 2 W, 3)`, the earlier view on the left.
        depths: float32 `(2, H, W)` planar metres of both views, 0 where unlabelled.
        camera: intrinsics of either view.
        step: metres moved to the right and forward, along the ground.
        tilt: radians below the horizon that the camera looks, before and after.
    """

    image: np.ndarray
    depths: np.ndarray
    camera: Camera
    step: tuple[float, float]
    tilt: float

    @property
    def metres(self) -> float:
        """How far the camera moved."""
        return math.hypot(*self.step)


def make_motion(level: Level | str, seed: int, index: int, stream: str = "") -> Motion:
    """Pair number `index` of the world with this seed; see `scene.make_scene`.

    Raises:
        ValueError: for an unknown level, one without depth, or a negative seed or index.
    """
    level = get_level(level)
    if level.renderer != "solid":
        raise ValueError(f"level '{level.name}' is flat, so that no camera can move in it; use one such as solid-128")
    if seed < 0 or index < 0:
        raise ValueError(f"seed {seed} and index {index} must not be negative; count from 0")
    names = [zlib.crc32(name.encode()) for name in (level.name, "motion", stream) if name]
    rng = np.random.default_rng([names[0], seed, index, *names[1:]])
    view = place_camera(level, rng)
    objects = place_solids(level, view, rng)
    look = choose_look(level.size, rng)
    length, turn = uniform(rng, RANGE), uniform(rng, (-_LARGEST_TURN, _LARGEST_TURN))
    back = -1.0 if rng.random() < 0.3 else 1.0
    step = (length * math.sin(turn), back * length * math.cos(turn))
    before = cast(view, objects)
    moved = [_shifted(thing, step) for thing in objects]
    after = cast(view, moved)
    later = replace(look, origin=step, mottle=choose_look(level.size, rng).mottle)
    pictures = (shade(view, look, objects, before), shade(view, later, moved, after))
    return Motion(
        np.concatenate(pictures, axis=1),
        np.stack((before.depth, after.depth)).astype(np.float32),
        view.camera,
        step,
        view.tilt,
    )


def _shifted(thing: SolidObject, step: tuple[float, float]) -> SolidObject:
    """Where a camera that moved by `step` sees an object stand."""
    return replace(thing, x=thing.x - step[0], y=thing.y - step[1])
