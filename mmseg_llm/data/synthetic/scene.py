"""One scene of the synthetic world: picture, exact instance masks, metric depth and referring expressions.

Legend: H W pixels, I instances.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from mmseg_llm.data.synthetic.flat import draw_flat, flat_background, place_flat
from mmseg_llm.data.synthetic.language import Expression, make_expressions
from mmseg_llm.data.synthetic.levels import Level, get_level
from mmseg_llm.data.synthetic.program import Facts, Thing
from mmseg_llm.data.synthetic.shading import choose_look, shade
from mmseg_llm.data.synthetic.solid import SolidObject, cast, place_camera, place_solids
from mmseg_llm.structures import Camera, Mask, Query, Sample

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmseg_llm.data.synthetic.flat import FlatObject

GENERATOR_VERSION = 1
"""To be raised with every change of what a seed shows, so that stale datasets are told apart."""
_MIN_PIXELS = 12
_ATTEMPTS = 50


@dataclass(frozen=True)
class Scene:
    """A picture and everything that is known about it.

    Attributes:
        id: `<level>/<seed>/<index>`, with `<stream>` before the index where there is one.
        image: uint8 `(H, W, 3)`.
        instances: uint8 `(H, W)`, 0 where there is no object and k + 1 where object k is visible.
        facts: the visible objects with attributes, boxes and positions.
        expressions: what is said about them.
        depth: float32 `(H, W)` planar metres, 0 where unlabelled; None in flat scenes.
        camera: intrinsics; None in flat scenes.
    """

    id: str
    image: np.ndarray
    instances: np.ndarray
    facts: Facts
    expressions: tuple[Expression, ...]
    depth: np.ndarray | None = None
    camera: Camera | None = None

    @property
    def masks(self) -> np.ndarray:
        """Visible pixels of each object, bool `(I, H, W)`, disjoint."""
        return self.instances == np.arange(1, len(self.facts.things) + 1, dtype=np.uint8)[:, None, None]

    @property
    def boxes(self) -> tuple[tuple[float, float, float, float], ...]:
        """Tight `(x1, y1, x2, y2)` of each object."""
        return tuple(thing.box for thing in self.facts.things)

    @property
    def categories(self) -> tuple[str, ...]:
        """Shape name of each object."""
        return tuple(thing.shape for thing in self.facts.things)

    @property
    def attributes(self) -> tuple[dict[str, str], ...]:
        """Shape, colour, texture and (where the level speaks of it) size of each object, as words."""
        names = ("shape", "colour", "texture", "size")
        return tuple({n: getattr(thing, n) for n in names if getattr(thing, n)} for thing in self.facts.things)

    def encoded_masks(self) -> tuple[Mask, ...]:
        """Visible pixels of each object as run-length encoding."""
        return tuple(Mask.from_array((self.instances == i + 1).view(np.uint8)) for i in range(len(self.facts.things)))

    def to_sample(self) -> Sample:
        """The scene as a dataset yields it, with the picture in memory and one query per expression."""
        masks = self.encoded_masks()
        queries = tuple(
            Query(
                text=expression.text,
                masks=tuple(masks[i] for i in expression.targets),
                boxes=tuple(self.facts.things[i].box for i in expression.targets),
                id=f"{self.id}#{position}",
            )
            for position, expression in enumerate(self.expressions)
        )
        size = (self.image.shape[0], self.image.shape[1])
        source = f"synthetic/{self.id.split('/', 1)[0]}"
        return Sample(Image.fromarray(self.image), size, queries, self.id, source, self.camera)


@dataclass(frozen=True)
class _Render:
    """A picture before anything is said about it; `owner` names the pixels of each object, -1 for none."""

    image: np.ndarray
    owner: np.ndarray
    objects: Sequence[FlatObject | SolidObject]
    depth: np.ndarray | None = None
    camera: Camera | None = None


def _kept(owner: np.ndarray, whole: Sequence[int] | np.ndarray, min_visible: float) -> list[int]:
    """Positions of the objects of which enough is visible."""
    seen = np.bincount(owner.ravel() + 1, minlength=len(whole) + 1)[1:]
    return [i for i, full in enumerate(whole) if seen[i] >= max(_MIN_PIXELS, min_visible * full)]


def _render_flat(level: Level, rng: np.random.Generator) -> _Render:
    objects = place_flat(level, rng)
    canvas = flat_background(level, rng)
    while True:
        image, owner, whole = draw_flat(level, objects, canvas)
        keep = _kept(owner, whole, level.min_visible)
        if len(keep) == len(objects):
            return _Render(image, owner, objects)
        # What is hardly visible leaves the scene altogether: a sliver of red would make "the red shape" debatable.
        objects = [objects[i] for i in keep]


def _render_solid(level: Level, rng: np.random.Generator) -> _Render:
    view = place_camera(level, rng)
    objects = place_solids(level, view, rng)
    look = choose_look(level.size, rng)
    while True:
        buffers = cast(view, objects)
        keep = _kept(buffers.owner, buffers.whole, level.min_visible)
        if len(keep) == len(objects):
            break
        objects = [objects[i] for i in keep]
    image = shade(view, look, objects, buffers)
    return _Render(image, buffers.owner, objects, buffers.depth.astype(np.float32), view.camera)


def _facts(render: _Render) -> Facts:
    """Measure the objects in the picture."""
    things = []
    for i, thing in enumerate(render.objects):
        rows, columns = np.nonzero(render.owner == i)
        centre = (float(columns.mean()), float(rows.mean()))
        box = (float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1))
        width = height = 2 * thing.radius
        position, distance = centre, 0.0
        if isinstance(thing, SolidObject):
            assert render.depth is not None
            height = thing.height
            position, distance = (thing.x, thing.y), float(render.depth[rows, columns].min())
        words = (thing.shape, thing.colour, thing.size, thing.texture)
        things.append(Thing(*words, centre, box, len(rows), width, height, position, distance))
    return Facts(tuple(things), render.owner.shape[0])


def make_scene(level: Level | str, seed: int, index: int, stream: str = "") -> Scene:
    """Scene number `index` of the world with this seed: the same on any machine and any number of workers.

    Args:
        level: a difficulty or its name.
        seed: world, not negative.
        index: which scene, not negative.
        stream: name of an independent sequence of scenes of the same world, such as a split.

    Raises:
        ValueError: for an unknown level or a negative seed or index.
    """
    level = get_level(level)
    if seed < 0 or index < 0:
        raise ValueError(f"seed {seed} and index {index} must not be negative; count from 0")
    # Names enter as checksums: seed sequences take integers, and Python's own hashes change from run to run.
    names = [zlib.crc32(name.encode()) for name in (level.name, stream) if name]
    rng = np.random.default_rng([names[0], seed, index, *names[1:]])
    render_level = _render_flat if level.renderer == "flat" else _render_solid
    for _ in range(_ATTEMPTS):
        render = render_level(level, rng)
        if render.objects:
            break
    else:
        raise ValueError(f"level '{level.name}' places no visible object; make its sizes fit {level.size} pixels")
    facts = _facts(render)
    return Scene(
        id="/".join(filter(None, (level.name, str(seed), stream, str(index)))),
        image=render.image,
        instances=(render.owner + 1).astype(np.uint8),
        facts=facts,
        expressions=make_expressions(facts, level, rng),
        depth=render.depth,
        camera=render.camera,
    )
