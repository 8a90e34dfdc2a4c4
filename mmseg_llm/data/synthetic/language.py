"""Referring expressions of a scene: proposes programs, keeps those that are beyond doubt, and puts them into words."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mmseg_llm.data.synthetic.phrases import Phrases
from mmseg_llm.data.synthetic.program import (
    RELATION_KEYS,
    AmbiguousError,
    Both,
    Facts,
    Nearest,
    Program,
    Rank,
    Related,
    Select,
    Thing,
    evaluate,
    select,
)
from mmseg_llm.data.synthetic.vocabulary import USES, pick

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from mmseg_llm.data.synthetic.levels import Level

_TRIES = 6


@dataclass(frozen=True)
class Expression:
    """A referring expression with its meaning.

    Attributes:
        text: plain lower-case English.
        program: what it means; `evaluate(program, facts)` gives `targets` again.
        targets: indices of the objects meant, ascending; empty when nothing in the scene fits.
        family: which kind of expression it is.
        is_plural: whether the text speaks of several objects.
    """

    text: str
    program: Program
    targets: tuple[int, ...]
    family: str
    is_plural: bool = False

    @property
    def is_no_target(self) -> bool:
        """Whether nothing in the scene fits."""
        return not self.targets


def is_exact(expression: Expression, facts: Facts) -> bool:
    """Whether the expression means exactly its targets, and its grammatical number is right."""
    try:
        found = evaluate(expression.program, facts)
    except AmbiguousError:
        return False
    is_number_right = not found or (len(found) > 1 if expression.is_plural else len(found) == 1)
    return is_number_right and tuple(sorted(found)) == expression.targets


class Speaker:
    """Proposes expressions for one scene; every method returns None when its kind of expression does not work out."""

    def __init__(self, facts: Facts, level: Level, rng: np.random.Generator) -> None:
        self.facts = facts
        self.level = level
        self.rng = rng
        self.phrases = Phrases(rng, level)
        self.is_solid = level.renderer == "solid"
        self.families: dict[str, Callable[[], Expression | None]] = {
            "attributes": self.attributes,
            "colour": lambda: self.single(Select(colour=self.thing().colour), "colour"),
            "shape": lambda: self.single(Select(shape=self.thing().shape), "shape"),
            "position": lambda: self.superlative("position"),
            "size": lambda: self.superlative("size"),
            "depth": lambda: self.superlative("depth"),
            "height": lambda: self.superlative("height"),
            "ordinal": self.ordinal,
            "relation": self.relation,
            "nearest": self.nearest,
            "question": self.question,
        }
        directions = ("left", "right") if self.is_solid else ("left", "right", "top", "bottom")
        self.keys = {
            "position": directions,
            "size": ("largest", "smallest"),
            "depth": ("near", "far"),
            "height": ("tall", "short"),
        }
        self.relations = tuple(RELATION_KEYS)[:2] + (("front", "behind") if self.is_solid else ("above", "below"))

    def thing(self) -> Thing:
        """Any object of the scene."""
        return pick(self.rng, self.facts.things)

    def narrow(self, thing: Thing) -> Select:
        """The attributes of `thing` that single it out, in a random order of mention; all of them when none do."""
        wanted = Select(shape=thing.shape)
        extras = [("colour", thing.colour)]
        if len(self.level.textures) > 1:
            extras.append(("texture", thing.texture))
        if thing.size:
            extras.append(("size", thing.size))
        if len(extras) > 1:
            self.rng.shuffle(extras)
        for name, value in extras:
            wanted = replace(wanted, **{name: value})
            if len(select(wanted, self.facts)) == 1:
                break
        return wanted

    def single(self, program: Program, family: str, candidates: int = 0, text: str | None = None) -> Expression | None:
        """The expression if the program means exactly one object."""
        try:
            found = evaluate(program, self.facts)
        except AmbiguousError:
            return None
        if len(found) != 1:
            return None
        return Expression(text or self.phrases.one(program, candidates), program, tuple(found), family)

    def attributes(self) -> Expression | None:
        """`the striped red circle`."""
        return self.single(self.narrow(self.thing()), "attributes")

    def _group(self) -> Select:
        """A loose description that usually fits several objects."""
        thing = self.thing()
        return pick(self.rng, (Select(), Select(shape=thing.shape), Select(colour=thing.colour)))

    def superlative(self, family: str) -> Expression | None:
        """`the leftmost circle`, of at least two candidates."""
        group = self._group()
        candidates = len(select(group, self.facts))
        if candidates < 2:
            return None
        return self.single(Rank(pick(self.rng, self.keys[family]), group), family, candidates)

    def ordinal(self) -> Expression | None:
        """`the second circle from the left`, of at least three candidates."""
        group = self._group()
        candidates = len(select(group, self.facts))
        if candidates < 3:
            return None
        keys = self.keys["position"] + (("near",) if self.is_solid else ())
        place = 1 + int(self.rng.random() * min(candidates - 2, 2))
        return self.single(Rank(pick(self.rng, keys), group, place), "ordinal", candidates)

    def _anchor(self) -> Select | None:
        anchor = self.narrow(self.thing())
        return anchor if len(select(anchor, self.facts)) == 1 else None

    def relation(self) -> Expression | None:
        """`the circle left of the blue square`."""
        anchor = self._anchor()
        if anchor is None:
            return None
        return self.single(Related(pick(self.rng, self.relations), self._group(), anchor), "relation")

    def nearest(self) -> Expression | None:
        """`the circle closest to the blue square`, of at least two candidates."""
        anchor, group = self._anchor(), self._group()
        if anchor is None or len(set(select(group, self.facts)) - set(select(anchor, self.facts))) < 2:
            return None
        return self.single(Nearest(group, anchor), "nearest")

    def question(self) -> Expression | None:
        """A question about use or arrangement with one answer."""
        if self.rng.random() < 0.5:
            colour = self.thing().colour if self.rng.random() < 0.5 else None
            use = Select(use=pick(self.rng, tuple(USES)), colour=colour)
            return self.single(use, "question", text=self.phrases.question(use))
        keys = tuple(key for family in ("position", "size", "depth", "height") for key in self.keys[family])
        rank = Rank(pick(self.rng, keys), Select())
        if len(self.facts.things) < 2:
            return None
        return self.single(rank, "question", text=self.phrases.question(rank))

    def several(self) -> Expression | None:
        """`all red shapes`, `the two circles`, `the red circle and the blue square`, `the circles left of the star`."""
        if self.rng.random() < 0.25:
            return self._pair()
        group = self._group()
        program: Select | Related = group
        anchor = self._anchor() if "relation" in self.level.families and self.rng.random() < 0.3 else None
        is_use = "question" in self.level.families and self.rng.random() < 0.25
        if is_use:
            program = Select(use=pick(self.rng, tuple(USES)))
        elif anchor is not None:
            program = Related(pick(self.rng, self.relations), group, anchor)
        try:
            found = tuple(sorted(evaluate(program, self.facts)))
        except AmbiguousError:
            return None
        if len(found) < 2:
            return None
        if isinstance(program, Select) and program.use:
            text = self.phrases.question(program, many=True)
        else:
            text = self.phrases.many(program, len(found))
        return Expression(text, program, found, "several", is_plural=True)

    def _pair(self) -> Expression | None:
        parts = tuple(dict.fromkeys(self.narrow(self.thing()) for _ in range(2)))
        if len(parts) < 2:
            return None
        program = Both(parts)
        try:
            found = tuple(sorted(evaluate(program, self.facts)))
        except AmbiguousError:
            return None
        return Expression(self.phrases.one(program), program, found, "several", is_plural=True)

    def absent(self) -> Expression | None:
        """A plausible description that nothing fits: mostly words that occur in the scene, wrongly combined."""
        level, draw = self.level, self.rng.random()
        shape = self.thing().shape if draw < 0.7 else pick(self.rng, level.shapes)
        colour = self.thing().colour if draw < 0.35 or draw > 0.7 else pick(self.rng, level.colours)
        kind = self.rng.random()
        wanted = Select(colour=colour) if kind < 0.1 else Select(shape=shape) if kind < 0.2 else Select(shape, colour)
        anchor = self._anchor() if "relation" in level.families and kind > 0.7 else None
        program: Select | Related = wanted
        if anchor is not None:
            program = Related(pick(self.rng, self.relations), wanted, anchor)
        try:
            if evaluate(program, self.facts):
                return None
        except AmbiguousError:
            return None
        is_plural = bool(self.rng.random() < 0.15)
        text = self.phrases.many(program, None) if is_plural else self.phrases.one(program)
        return Expression(text, program, (), "no_target", is_plural)

    def everything(self) -> Expression:
        """The expression that works in every scene."""
        targets = tuple(range(len(self.facts.things)))
        if len(targets) == 1:
            return Expression(f"the only {self.phrases.generic[0]}", Select(), targets, "attributes")
        return Expression(self.phrases.many(Select(), len(targets)), Select(), targets, "several", is_plural=True)


def make_expressions(facts: Facts, level: Level, rng: np.random.Generator) -> tuple[Expression, ...]:
    """Up to `level.max_expressions` different expressions, at least one.

    Raises:
        ValueError: if there is nothing to talk about.
    """
    if not facts.things:
        raise ValueError("a scene without objects has no referring expressions; place at least one object")
    speaker = Speaker(facts, level, rng)
    names, weights = tuple(level.families), tuple(level.families.values())
    total = sum(weights)
    made: dict[str, Expression] = {}
    for _ in range(level.max_expressions):
        share = rng.random()
        for attempt in range(_TRIES):
            if share < level.no_target_share:
                proposal = speaker.absent()
            elif share < level.no_target_share + level.multi_target_share and attempt < _TRIES // 2:
                proposal = speaker.several()
            else:
                proposal = speaker.families[_weighted(rng, names, weights, total)]()
            if proposal is not None and proposal.text not in made:
                made[proposal.text] = proposal
                break
    if all(expression.is_no_target for expression in made.values()):
        fallback = speaker.everything()
        made.setdefault(fallback.text, fallback)
    return tuple(made.values())


def _weighted(rng: np.random.Generator, names: tuple[str, ...], weights: tuple[float, ...], total: float) -> str:
    """A name with probability proportional to its weight."""
    left = float(rng.random()) * total
    for name, weight in zip(names, weights, strict=True):
        left -= weight
        if left < 0:
            return name
    return names[-1]
