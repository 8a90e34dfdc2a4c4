"""Difficulty levels of the synthetic world."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from mmseg_llm.data.synthetic.vocabulary import CATEGORY_IDS, COLOURS, FLAT_SHAPES, SOLID_SHAPES, TEXTURES

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Level:
    """What scenes of one difficulty contain and how they are talked about.

    Attributes:
        name: part of the seed: two levels with the same settings but other names show other scenes.
        size: side of the square image in pixels.
        num_objects: fewest and most objects placed (crowded scenes may end up with fewer).
        renderer: `flat` draws 2-D shapes, `solid` ray-casts 3-D primitives on a ground plane with metric depth.
        shapes, colours, textures: vocabularies.
        sizes: size word -> span of widths, pixels when flat and metres when solid; the word "" is never said.
        families: expression family of single-target queries -> weight.
        no_target_share, multi_target_share: expected share of the queries.
        max_expressions: most queries per scene.
        synonyms: whether shapes go by several nouns ("ball" for "sphere").
        separation: smallest distance of two centres over the sum of their radii; below 1 they may overlap (flat only).
        min_visible: smallest visible fraction of an object; what shows less is taken out of the scene.
        depth_range: metres between which objects stand (solid only).
    """

    name: str
    size: int
    num_objects: tuple[int, int]
    renderer: Literal["flat", "solid"]
    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    sizes: Mapping[str, tuple[float, float]]
    families: Mapping[str, float]
    textures: tuple[str, ...] = ("plain",)
    no_target_share: float = 0.08
    multi_target_share: float = 0.15
    max_expressions: int = 4
    synonyms: bool = False
    separation: float = 1.0
    min_visible: float = 0.35
    depth_range: tuple[float, float] = field(default=(2.2, 6.5))

    def __post_init__(self) -> None:
        known = FLAT_SHAPES if self.renderer == "flat" else SOLID_SHAPES
        for kind, words, allowed in (
            ("shape", self.shapes, known),
            ("colour", self.colours, tuple(COLOURS)),
            ("texture", self.textures, TEXTURES),
        ):
            unknown = [word for word in words if word not in allowed]
            if unknown or not words:
                raise ValueError(f"level '{self.name}': unknown {kind} {unknown}; choose from {', '.join(allowed)}")
        if not 1 <= self.num_objects[0] <= self.num_objects[1] <= 12:
            raise ValueError(f"level '{self.name}': num_objects {self.num_objects} must be (low, high) within 1..12")
        if self.size < 32:
            raise ValueError(
                f"level '{self.name}': size {self.size} is too small to show objects; use 32 or more pixels"
            )
        if self.no_target_share < 0 or self.multi_target_share < 0 or self.max_expressions < 1:
            raise ValueError(f"level '{self.name}': shares must not be negative and max_expressions at least 1")
        if self.no_target_share + self.multi_target_share > 1:
            raise ValueError(f"level '{self.name}': no_target_share and multi_target_share exceed 1 together")

    @property
    def categories(self) -> dict[str, int]:
        """Shape name -> COCO category id, the same in all levels."""
        return {shape: CATEGORY_IDS[shape] for shape in self.shapes}


_CLEAR = ("red", "yellow", "green", "cyan", "blue", "purple", "black")
_BRIGHT = ("red", "orange", "yellow", "green", "cyan", "blue", "purple")
_ALL = (*_BRIGHT, "pink", "white", "black")
_SOLID_FAMILIES = {
    "attributes": 4.0,
    "colour": 1.0,
    "shape": 1.0,
    "position": 1.5,
    "size": 0.7,
    "depth": 1.2,
    "ordinal": 0.8,
    "relation": 1.5,
}

LEVELS: dict[str, Level] = {
    level.name: level
    for level in (
        Level(
            name="flat-96",
            size=96,
            num_objects=(1, 4),
            renderer="flat",
            shapes=FLAT_SHAPES[:5],
            colours=_CLEAR,
            sizes={"": (20.0, 40.0)},
            families={"attributes": 5.0, "colour": 2.0, "shape": 2.0, "position": 2.0},
            separation=0.92,
            min_visible=0.6,
            max_expressions=4,
        ),
        Level(  # for models that have to learn first where something is
            name="single-96",
            size=96,
            num_objects=(1, 1),
            renderer="flat",
            shapes=FLAT_SHAPES[:5],
            colours=_CLEAR,
            sizes={"": (20.0, 40.0)},
            families={"attributes": 5.0, "colour": 2.0, "shape": 2.0},
            no_target_share=0.0,
            multi_target_share=0.0,
            max_expressions=2,
        ),
        Level(
            name="flat-128",
            size=128,
            num_objects=(3, 8),
            renderer="flat",
            shapes=FLAT_SHAPES,
            colours=(*_BRIGHT, "pink", "black"),
            textures=("plain", "striped", "dotted"),
            sizes={"small": (18.0, 24.0), "large": (38.0, 50.0)},
            families={
                "attributes": 4.0,
                "colour": 1.0,
                "shape": 1.0,
                "position": 1.5,
                "size": 1.0,
                "ordinal": 1.0,
                "relation": 1.5,
                "nearest": 0.5,
            },
            separation=0.7,
            min_visible=0.45,
            no_target_share=0.1,
            multi_target_share=0.2,
            max_expressions=6,
        ),
        Level(
            name="solid-128",
            size=128,
            num_objects=(2, 5),
            renderer="solid",
            shapes=SOLID_SHAPES,
            colours=_BRIGHT,
            textures=("plain", "striped"),
            sizes={"small": (0.42, 0.52), "large": (0.8, 1.0)},
            families=_SOLID_FAMILIES,
            no_target_share=0.1,
            max_expressions=6,
            depth_range=(2.4, 5.5),
        ),
        Level(
            name="solid-224",
            size=224,
            num_objects=(3, 7),
            renderer="solid",
            shapes=SOLID_SHAPES,
            colours=_ALL,
            textures=("plain", "striped", "checkered"),
            sizes={"small": (0.4, 0.5), "large": (0.8, 1.05)},
            families={**_SOLID_FAMILIES, "height": 0.6},
            no_target_share=0.1,
            multi_target_share=0.2,
            max_expressions=8,
            synonyms=True,
            depth_range=(2.4, 7.0),
        ),
        Level(
            name="scene-448",
            size=448,
            num_objects=(6, 12),
            renderer="solid",
            shapes=SOLID_SHAPES,
            colours=_ALL,
            textures=("plain", "striped", "checkered"),
            sizes={"small": (0.36, 0.48), "large": (0.75, 1.05)},
            families={**_SOLID_FAMILIES, "height": 0.8, "nearest": 0.8, "question": 3.0},
            no_target_share=0.12,
            multi_target_share=0.22,
            max_expressions=12,
            synonyms=True,
            depth_range=(2.4, 9.0),
        ),
    )
}


def get_level(level: Level | str) -> Level:
    """The level of that name; a `Level` passes through.

    Raises:
        ValueError: for an unknown name.
    """
    if isinstance(level, Level):
        return level
    if level not in LEVELS:
        raise ValueError(f"unknown synthetic level '{level}'; choose from {', '.join(LEVELS)}")
    return LEVELS[level]
