"""What a referring expression means: a small program over the facts of a scene that evaluates to the objects meant.

A program only evaluates when its meaning is beyond doubt: a superlative must win by a margin, a relation must hold or
fail by a margin, and where a word could be read in two ways (size in metres or in the picture) both readings must
agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mmseg_llm.data.synthetic.vocabulary import USES


class AmbiguousError(ValueError):
    """A program whose meaning depends on how one looks at the scene."""


@dataclass(frozen=True)
class Thing:
    """One visible object and the facts that can be said about it.

    Attributes:
        shape, colour, size, texture: words; `size` is "" where the level has no size words.
        centre: centroid of the visible pixels, `(x, y)` pixels.
        box: tight `(x1, y1, x2, y2)` of the visible pixels, exclusive right and bottom edges.
        area: visible pixels.
        width, height: extent of the whole object, pixels when flat and metres when solid.
        position: flat: the centre; solid: where it stands, `(right, forward)` metres from the point below the camera.
        distance: planar depth in metres of the nearest visible point; 0.0 when flat.
    """

    shape: str
    colour: str
    size: str
    texture: str
    centre: tuple[float, float]
    box: tuple[float, float, float, float]
    area: int
    width: float
    height: float
    position: tuple[float, float]
    distance: float = 0.0


@dataclass(frozen=True)
class Facts:
    """All there is to know about a scene: its visible objects and the side of the image in pixels."""

    things: tuple[Thing, ...]
    side: int


@dataclass(frozen=True)
class Select:
    """All objects with these attributes; None matches everything."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    texture: str | None = None
    use: str | None = None


@dataclass(frozen=True)
class Rank:
    """The object of `of` at `place` (0 the first) when sorted by `key`, such as second from the left."""

    key: str
    of: Select
    place: int = 0


@dataclass(frozen=True)
class Related:
    """The objects of `of` that stand in `relation` to the one object of `anchor`."""

    relation: str
    of: Select
    anchor: Select


@dataclass(frozen=True)
class Nearest:
    """The object of `of` with the smallest distance to the one object of `anchor`."""

    of: Select
    anchor: Select


@dataclass(frozen=True)
class Both:
    """The one object of each part, together."""

    parts: tuple[Select, ...]


Program = Select | Rank | Related | Nearest | Both

RELATION_KEYS = {"left": "left", "right": "right", "above": "top", "below": "bottom", "front": "near", "behind": "far"}
_OPPOSITES = {"right": "left", "bottom": "top", "smallest": "largest", "far": "near", "short": "tall"}
_POSITION_MARGIN = 0.05  # of the image side
_DISTANCE_MARGIN = 0.25  # metres
_LOG_SIZE_MARGIN = math.log(1.35)
_LOG_HEIGHT_MARGIN = math.log(1.2)
_NEAREST_RATIO = 1.25


def _measures(key: str, thing: Thing, side: int) -> tuple[tuple[float, float], ...]:
    """`(value, margin)` per reading of `key`; the lowest value is the most left, largest, nearest, ..."""
    if key in _OPPOSITES:
        return tuple((-value, margin) for value, margin in _measures(_OPPOSITES[key], thing, side))
    if key == "left":
        return ((thing.centre[0] / side, _POSITION_MARGIN),)
    if key == "top":
        return ((thing.centre[1] / side, _POSITION_MARGIN),)
    if key == "largest":
        volume = thing.width * thing.width * thing.height
        return ((-math.log(thing.area), _LOG_SIZE_MARGIN), (-math.log(volume), _LOG_SIZE_MARGIN))
    if key == "near":
        return ((thing.distance, _DISTANCE_MARGIN), (math.hypot(*thing.position), _DISTANCE_MARGIN))
    if key == "tall":
        return ((-math.log(thing.height), _LOG_HEIGHT_MARGIN),)
    raise ValueError(
        f"unknown order '{key}'; choose from left, right, top, bottom, largest, smallest, near, far, tall, short"
    )


def select(wanted: Select, facts: Facts) -> list[int]:
    """Indices of the objects with the wanted attributes, ascending."""
    return [
        i
        for i, thing in enumerate(facts.things)
        if (wanted.shape is None or thing.shape == wanted.shape)
        and (wanted.colour is None or thing.colour == wanted.colour)
        and (wanted.size is None or thing.size == wanted.size)
        and (wanted.texture is None or thing.texture == wanted.texture)
        and (wanted.use is None or thing.shape in USES[wanted.use])
    ]


def _one(wanted: Select, facts: Facts) -> int:
    found = select(wanted, facts)
    if len(found) != 1:
        raise AmbiguousError(f"{wanted} names {len(found)} objects where one is presupposed")
    return found[0]


def _rank(program: Rank, facts: Facts) -> frozenset[int]:
    ids = select(program.of, facts)
    if not ids:
        return frozenset()
    if program.place >= len(ids):
        raise AmbiguousError(f"no place {program.place} among {len(ids)} objects")
    readings = [_measures(program.key, facts.things[i], facts.side) for i in ids]
    winners = set()
    for reading in range(len(readings[0])):
        order = sorted((values[reading], i) for values, i in zip(readings, ids, strict=True))
        (value, margin), winner = order[program.place]
        around = order[max(0, program.place - 1) : program.place] + order[program.place + 1 : program.place + 2]
        if any(abs(other[0] - value) < margin for other, _ in around):
            raise AmbiguousError(f"no clear {program.key}")
        winners.add(winner)
    if len(winners) > 1:
        raise AmbiguousError(f"readings of {program.key} disagree")
    return frozenset(winners)


def _related(program: Related, facts: Facts) -> frozenset[int]:
    anchor = _one(program.anchor, facts)
    key = RELATION_KEYS[program.relation]
    reference = _measures(key, facts.things[anchor], facts.side)
    found = set()
    for i in select(program.of, facts):
        if i == anchor:
            continue
        gaps = [
            (ref - value) / margin
            for (value, margin), (ref, _) in zip(_measures(key, facts.things[i], facts.side), reference, strict=True)
        ]
        if min(gaps) >= 1:
            found.add(i)
        elif max(gaps) > -1:
            raise AmbiguousError(f"object {i} is neither clearly {program.relation} nor clearly not")
    return frozenset(found)


def _nearest(program: Nearest, facts: Facts) -> frozenset[int]:
    anchor = _one(program.anchor, facts)
    ids = [i for i in select(program.of, facts) if i != anchor]
    if not ids:
        return frozenset()
    winners = set()
    for name in ("centre", "position"):  # in the picture and in the world
        origin = getattr(facts.things[anchor], name)
        order = sorted((math.dist(getattr(facts.things[i], name), origin), i) for i in ids)
        if len(order) > 1 and order[1][0] < order[0][0] * _NEAREST_RATIO:
            raise AmbiguousError("no clear nearest object")
        winners.add(order[0][1])
    if len(winners) > 1:
        raise AmbiguousError("nearest in the picture and nearest in the world differ")
    return frozenset(winners)


def evaluate(program: Program, facts: Facts) -> frozenset[int]:
    """Indices of the objects meant; empty when nothing fits.

    Raises:
        AmbiguousError: when the meaning is not beyond doubt.
    """
    if isinstance(program, Select):
        return frozenset(select(program, facts))
    if isinstance(program, Rank):
        return _rank(program, facts)
    if isinstance(program, Related):
        return _related(program, facts)
    if isinstance(program, Nearest):
        return _nearest(program, facts)
    ids = frozenset(_one(part, facts) for part in program.parts)
    if len(ids) != len(program.parts):
        raise AmbiguousError("two parts name the same object")
    return ids
