"""A seeded world of small rendered scenes that writes the formats of real referring-segmentation and depth datasets."""

from mmseg_llm.data.synthetic.language import Expression, make_expressions
from mmseg_llm.data.synthetic.levels import LEVELS, Level, get_level
from mmseg_llm.data.synthetic.program import AmbiguousError, Facts, Thing, evaluate
from mmseg_llm.data.synthetic.scene import Scene, make_scene
from mmseg_llm.data.synthetic.writer import write_dataset

__all__ = [
    "LEVELS",
    "AmbiguousError",
    "Expression",
    "Facts",
    "Level",
    "Scene",
    "Thing",
    "evaluate",
    "get_level",
    "make_expressions",
    "make_scene",
    "write_dataset",
]
