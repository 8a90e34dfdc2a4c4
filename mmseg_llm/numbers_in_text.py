"""The number an answer gives: a strict reader with a reason for every refusal, and the reader of the reference evaluation.

DepthLM specification, C.7 (`read_metres`, `read_quantity`) and C.6 (`read_official`). The same text always gives the same
number, and no text raises.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from mmseg_llm.amounts import Amount, find_amounts, unit_names
from mmseg_llm.answer_words import is_hedged, tag_doubt, without_markup

Unit = Literal["m", "s", "m/s"]
"""What a question asks for: metres, seconds, metres per second."""

_ANSWER = re.compile(r"<answer>(.*?)(</answer>|\Z)", re.DOTALL | re.IGNORECASE)
_AROUND = re.compile(r"\baround\s{1,2}\Z", re.IGNORECASE)


@dataclass(frozen=True)
class Reading:
    """What an answer says.

    Attributes:
        value: finite and above 0, in the unit asked for; None where the answer gives none to be trusted.
        reason: why there is none (a key of `quantities.REASONS`); empty otherwise.
    """

    value: float | None
    reason: str = ""


def read_metres(text: str, *, lenient: bool = False, largest: float | None = None) -> Reading:
    """The metres an answer gives, see `read_quantity`."""
    return read_quantity(text, "m", lenient=lenient, largest=largest)


def read_quantity(text: str, unit: Unit = "m", *, lenient: bool = False, largest: float | None = None) -> Reading:
    """The one number an answer gives in `unit`, or why it gives none.

    The first `<answer>` tag (closed or not) decides if anything is in it, whatever later tags say. It declares the unit, so a
    bare number will do. There has to be exactly one number, and nothing else but markup, punctuation behind it, and words that
    change nothing ("the distance is about 2.4 m away"): "2 thousand", "2 apples", "$2" and "<2" are refused. Without a tag the
    text has to give one value with its unit; of several different ones the one behind "around" counts, the words of the
    template; "not 2 m" and "at least 2 m" are refused. Thousands commas and exponents are read, "2,5" is not; "minus 2" is
    negative.

    Args:
        text: what the model said.
        unit: asked for.
        lenient: convert other units of the same kind (cm, km, feet, km/h, minutes, ...) instead of refusing them.
        largest: values above it are out of range; None accepts any.
    """
    tag = _ANSWER.search(text)
    found = _in_tag(tag[1], unit, is_open=not tag[2]) if tag and tag[1].strip() else _in_words(text, unit)
    return found if isinstance(found, Reading) else _accept(found, unit, lenient, largest)


def _in_tag(text: str, unit: Unit, is_open: bool) -> Amount | Reading:
    """The only amount in an answer tag, or the refusal."""
    text = without_markup(text, is_open)
    amounts = find_amounts(text)
    if len(amounts) > 1:
        return Reading(None, "several_numbers")
    if not amounts:
        return Reading(None, "truncated" if is_open else "no_number")
    amount = amounts[0]
    before, behind = text[: amount.start], text[amount.end :]
    if is_open and not amount.kind and behind in {".", ","}:
        return Reading(None, "truncated")  # "7." may have become 7.3
    doubt = "ambiguous" if amount.is_glued else tag_doubt(before, behind, unit_names(unit), bool(amount.kind))
    return Reading(None, doubt) if doubt else amount


def _in_words(text: str, unit: Unit) -> Amount | Reading:
    """The amount that plain words give in `unit`, or the refusal."""
    lowered = text.lower()
    is_open = "<think>" in lowered and "</think>" not in lowered
    amounts = [amount for amount in find_amounts(text) if not amount.is_glued]
    if not amounts:
        return Reading(None, "truncated" if is_open else "no_number")
    asked = [amount for amount in amounts if amount.kind == unit]
    if not asked and any(amount.kind for amount in amounts):
        return Reading(None, "other_unit")
    if not asked and is_open and not text[amounts[-1].end :].strip(" ."):
        return Reading(None, "truncated")
    if not asked:
        return Reading(None, "several_numbers" if _differ(amounts) else "no_unit")
    if _differ(asked) or _goes_on(amounts, unit):
        asked = [amount for amount in asked if not amount.is_joined and _is_behind_around(text, amount)]
    if not asked or _differ(asked):
        return Reading(None, "several_numbers")
    if any(is_hedged(text, amount.start, amount.end) for amount in asked):
        return Reading(None, "ambiguous")
    return next((amount for amount in asked if amount.factor == 1), asked[0])


def _is_behind_around(text: str, amount: Amount) -> bool:
    return _AROUND.search(text[max(0, amount.start - 9) : amount.start]) is not None


def _goes_on(amounts: list[Amount], unit: Unit) -> bool:
    """Whether a bare number follows one in `unit` at once, as in "2 m 50"."""
    return any(
        left.kind == unit and left.is_joined and right.is_joined and not right.kind for left, right in pairwise(amounts)
    )


def _differ(amounts: list[Amount]) -> bool:
    """Whether they are not all the same."""
    first, *others = [amount.value * amount.factor for amount in amounts]
    return any(not math.isclose(first, other, rel_tol=1e-9) for other in others)


def _accept(amount: Amount, unit: Unit, lenient: bool, largest: float | None) -> Reading:
    """A single amount as a reading; no unit means the one asked for, as the answer tag declares it."""
    value = amount.value * amount.factor
    if not amount.is_clear:
        return Reading(None, "ambiguous")
    if amount.kind not in {"", unit} or (amount.factor != 1 and not lenient):
        return Reading(None, "other_unit")
    if not math.isfinite(value):
        return Reading(None, "non_finite")
    if value <= 0:
        return Reading(None, "non_positive")
    if largest is not None and value > largest:
        return Reading(None, "out_of_range")
    return Reading(value)


_FIGURE = r"-?[1-9][0-9]{0,2}(?:[ ,][0-9]{3})+(?:\.[0-9]+)?|-?[0-9]+(?:[.,][0-9]+)?|\.[0-9]+"
_TERM = r"[0-9]+(?:\.[0-9]+)?"
_OFFICIAL = (
    rf"(?<![^\s=])(?:\*\*)?(?:(?P<left>-?{_TERM})\s*(?P<operator>[-+*/])\s*(?P<right>{_TERM})(?=\s|[.,:)$]|\Z)"
    rf"|(?P<figure>{_FIGURE})(?P<percent>\s*%)?)"
)
_OFFICIAL_PLACES = tuple(
    re.compile(prefix + _OFFICIAL) for prefix in (r"(?i:answer):[^\n]{0,50}?", r"(?i:answer)[^\n]{0,50}?", "")
)


def read_official(text: str) -> float | None:
    """The number that the reference evaluation reads, None where it fails (specification C.6).

    What `math_verify.parse` does to such answers: the last number, or sum, difference, product or quotient of two, that
    follows the word "answer" on its line, else the last one anywhere. A number counts only behind white space, `=` or the
    start of the text, hence the failure on `<answer>0.85</answer>`; what follows it does not matter, so "1e3" is 1, and a
    decimal comma is a point. LaTeX and longer formulas are not read.
    """
    for place in _OFFICIAL_PLACES:
        matches = list(place.finditer(text))
        if matches:
            return _official_value(matches[-1])
    return None


def _official_value(match: re.Match[str]) -> float | None:
    """What a match is worth, None where it has no finite value."""
    if match["operator"]:
        left, right = float(match["left"]), float(match["right"])
        if match["operator"] == "/" and right == 0:
            return None
        value = {"+": left + right, "-": left - right, "*": left * right, "/": left / (right or 1.0)}[match["operator"]]
    else:
        figure = match["figure"]
        is_grouped = re.fullmatch(r"-?[1-9][0-9]{0,2}(?:[ ,][0-9]{3})+(?:\.[0-9]+)?", figure)
        figure = re.sub("[ ,]", "", figure) if is_grouped else figure.replace(",", ".")
        value = float(figure) / (100 if match["percent"] else 1)
    return value if math.isfinite(value) else None
