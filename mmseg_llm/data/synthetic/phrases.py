"""From a program to words: several surface templates per expression type, lower case, no punctuation at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmseg_llm.data.synthetic.program import Both, Nearest, Program, Rank, Related, Select
from mmseg_llm.data.synthetic.vocabulary import NUMBERS, ORDINALS, SYNONYMS, pick, plural

if TYPE_CHECKING:
    import numpy as np

    from mmseg_llm.data.synthetic.levels import Level

_FIRST = {
    "left": ("leftmost {}", "{} farthest to the left", "{} furthest left"),
    "right": ("rightmost {}", "{} farthest to the right", "{} furthest right"),
    "top": ("topmost {}", "{} closest to the top", "highest {}"),
    "bottom": ("bottommost {}", "{} closest to the bottom", "lowest {}"),
    "largest": ("largest {}", "biggest {}"),
    "smallest": ("smallest {}", "tiniest {}"),
    "near": ("closest {}", "{} closest to the camera", "{} nearest to the camera"),
    "far": ("farthest {}", "{} farthest from the camera", "{} furthest away"),
    "tall": ("tallest {}",),
    "short": ("shortest {}",),
}
# Only said when there are two candidates: with more, "on the left" may fit several.
_OF_TWO = {
    "left": ("{} on the left", "left {}"),
    "right": ("{} on the right", "right {}"),
    "top": ("{} at the top", "upper {}"),
    "bottom": ("{} at the bottom", "lower {}"),
}
_LATER = {
    "left": "{1} {0} from the left",
    "right": "{1} {0} from the right",
    "top": "{1} {0} from the top",
    "bottom": "{1} {0} from the bottom",
    "largest": "{1} largest {0}",
    "smallest": "{1} smallest {0}",
    "near": "{1} closest {0}",
    "far": "{1} farthest {0}",
    "tall": "{1} tallest {0}",
    "short": "{1} shortest {0}",
}
_RELATIONS = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "higher up than"),
    "below": ("below", "lower than"),
    "front": ("in front of", "closer to the camera than"),
    "behind": ("behind", "farther from the camera than"),
}
_USE_QUESTIONS = {
    "rolls": ("{} that would roll away if nudged", "which {} would roll away on a slope"),
    "pointed": ("{} that {} to a point at the top", "which {} would hurt to step on"),
    "flat_top": ("{} that a cup could stand on", "which {} could serve as a stool"),
}
_RANK_QUESTIONS = {
    "near": ("which object is closest to the camera", "the object that you would reach first"),
    "far": ("which object is farthest from the camera", "the object that is the longest walk away"),
    "tall": ("which object is the tallest", "the object that sticks up the highest"),
    "short": ("which object is the shortest", "the object that is lowest in height"),
    "left": ("which object is at the far left", "the object at the left end of the scene"),
    "right": ("which object is at the far right", "the object at the right end of the scene"),
    "largest": ("which object is the biggest", "the object that would fill the largest parcel"),
    "smallest": ("which object is the smallest", "the object that is easiest to hide in a pocket"),
}


class Phrases:
    """Words for the programs of one scene.

    Args:
        rng: source of the choice between templates and synonyms.
        level: what must be said (textures only where there are several) and how.
    """

    def __init__(self, rng: np.random.Generator, level: Level) -> None:
        self.rng = rng
        self.synonyms = level.synonyms
        self.generic = ("shape", "object") if level.renderer == "flat" else ("object", "thing")

    def noun_phrase(self, wanted: Select, many: bool = False) -> str:
        """Attributes and noun without article, such as `striped red circle`."""
        words = [word for word in (wanted.size, wanted.texture, wanted.colour) if word]
        if wanted.shape is None:
            nouns: tuple[str, ...] = self.generic + (("one",) if words else ())
        else:
            nouns = SYNONYMS.get(wanted.shape, (wanted.shape,)) if self.synonyms else (wanted.shape,)
        noun = pick(self.rng, nouns)
        return " ".join([*words, plural(noun) if many else noun])

    def _article(self) -> str:
        return pick(self.rng, ("the ", "the ", ""))

    def one(self, program: Program, num_candidates: int = 0) -> str:
        """A singular expression; `num_candidates` is how many objects a `Rank` chooses from."""
        if isinstance(program, Select):
            if program.shape and program.colour and not (program.size or program.texture) and self.rng.random() < 0.12:
                return f"the {self.noun_phrase(Select(shape=program.shape))} that is {program.colour}"
            return self._article() + self.noun_phrase(program)
        if isinstance(program, Both):
            return " and ".join(f"the {self.noun_phrase(part)}" for part in program.parts)
        noun = self.noun_phrase(program.of)
        if isinstance(program, Related):
            return f"{self._article()}{noun} {self._relation(program)}"
        if isinstance(program, Nearest):
            words = pick(self.rng, ("closest to", "nearest to"))
            return f"{self._article()}{noun} {words} the {self.noun_phrase(program.anchor)}"
        return self._article() + self._rank(program, noun, num_candidates)

    def _rank(self, program: Rank, noun: str, num_candidates: int) -> str:
        if program.place:
            return _LATER[program.key].format(noun, ORDINALS[program.place])
        templates = _FIRST[program.key]
        if num_candidates == 2:
            templates += _OF_TWO.get(program.key, ())
        return pick(self.rng, templates).format(noun)

    def _relation(self, program: Related) -> str:
        return f"{pick(self.rng, _RELATIONS[program.relation])} the {self.noun_phrase(program.anchor)}"

    def many(self, program: Select | Related, count: int | None) -> str:
        """A plural expression; `count` is how many objects it means, None when it must not be said."""
        nouns = self.noun_phrase(program if isinstance(program, Select) else program.of, many=True)
        counted = () if count is None else (f"the {NUMBERS[count]} {nouns}",)
        if isinstance(program, Related):
            return f"{pick(self.rng, (f'all {nouns}', f'the {nouns}', *counted))} {self._relation(program)}"
        both = (f"both {nouns}",) if count == 2 else ()
        return pick(self.rng, (f"all {nouns}", f"all the {nouns}", f"the {nouns}", *counted, *both))

    def question(self, program: Rank | Select, many: bool = False) -> str:
        """A reasoning question whose answer has to be worked out from the scene."""
        if isinstance(program, Rank):
            return pick(self.rng, _RANK_QUESTIONS[program.key])
        assert program.use is not None
        noun = self.noun_phrase(Select(colour=program.colour), many)
        template = pick(self.rng, _USE_QUESTIONS[program.use])
        text = template.format(noun, "come" if many else "comes")
        return text if text.startswith("which") else f"the {text}"
