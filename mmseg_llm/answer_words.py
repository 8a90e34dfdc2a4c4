"""What stands around the number of an answer: markup, words that change nothing, and everything that does.

An answer tag is trusted where all of it is understood (`tag_doubt`). In plain words only what is right beside a number is looked
at (`is_hedged`): the rest of a text is about anything.
"""

from __future__ import annotations

import re
from collections.abc import Collection

_MARKUP = re.compile(
    r"<[/!|a-z][^<>]*>|\\(?:boxed|text|textbf|mathrm|mathbf)\s*\{|\\[][(),;:! ]|[\u200b\u2060\ufeff]", re.IGNORECASE
)
_CUT_MARKUP = re.compile(r"<[/|]?[a-z_|]*\Z", re.IGNORECASE)
_QUOTED = re.compile(r"(?<!\w)(?:([\"'$])([^\"'$]*)\1|[\u2018\u201c]([^\u2018\u2019\u201c\u201d]*)[\u2019\u201d])")
_WORD = re.compile(r"([^\W\d_]+(?:['\u2019][^\W\d_]+)*)[.,]?")

_BEHIND_WORDS = "away apart from distant tall high wide long deep approximately approx roughly"
_LINKS = "of from to between in and"
_OTHERS = """
about around nearly almost circa ca exactly precisely estimated just only is are be it it's its the a an this that so thus hence
therefore answer final result value number estimate distance depth length height width size speed velocity time duration motion
movement moved point points object camera viewer observer lens front d z
"""
_BEHIND, _PREPOSITIONS = frozenset(_BEHIND_WORDS.split()), frozenset(_LINKS.split())
HARMLESS = _BEHIND | _PREPOSITIONS | frozenset(_OTHERS.split())
"""Words that leave a number in an answer tag what it is."""

_MARKS = frozenset("*_`([{}])")
_MARKS_BEFORE = _MARKS | frozenset("~=:\u2248\u223c\u2245\uff1a")
_MARKS_BEHIND = _MARKS | frozenset(".,;:!?\u2026\u3002")
_CURRENCY = frozenset("$\u20ac\u00a3\u00a5")

_WINDOW = 60  # characters before a number that are looked at in plain words
_HEDGE = re.compile(
    r"(?:(?<![-=])[<>]=?|[\u2264-\u2267$\u20ac\u00a3\u00a5#^\u00b1]|n['\u2019]t\b|(?<!\w)(?:not?|never|minus|negative|least|most"
    r"|up\s+to|over|under|below|above|beyond|within|(?:[a-z]{2,}er|less|more)\s+than|half|twice|double|times"
    r"|hundred|thousand|million|billion))"
    r"(?:\s+(?:a|an|of|about|around|approximately|roughly|exactly|even|quite|and)\b)*[\s*`_\"'(~]*\Z",
    re.IGNORECASE,
)
_HEDGE_BEHIND = re.compile(
    r"\s*(?:and\s+(?:an?\s+|one\s+)?(?:half|quarter|third)\b|or\s+(?:more|less)\b|\+)", re.IGNORECASE
)


def without_markup(text: str, is_open: bool) -> str:
    """The text of an answer tag without tags, LaTeX and pairs of quotes, each a space.

    Args:
        text: between the tags.
        is_open: the closing tag may have been cut off in the middle.
    """
    text = _MARKUP.sub(" ", text.replace("\\approx", "~").replace("\\sim", "~"))
    text = _CUT_MARKUP.sub(" ", text) if is_open else text
    return _QUOTED.sub(lambda match: f" {match[2] or match[3] or ''} ", text)


def tag_doubt(before: str, behind: str, names: Collection[str], has_unit: bool) -> str:
    """Why the only number of an answer tag may not be what is meant (a key of `quantities.REASONS`), empty where it is.

    Args:
        before, behind: everything else in the tag, the unit right behind the number excluded.
        names: of the unit asked for.
        has_unit: whether a known unit is right behind the number.
    """
    words, marks = _parts(behind)
    first = _BEHIND | {"in"} if has_unit else _BEHIND  # "2 in" are inches
    if not (marks <= _MARKS_BEHIND and HARMLESS.union(names).issuperset(words) and first.issuperset(words[:1])):
        return "ambiguous" if has_unit else "other_unit"
    words, marks = _parts(before)
    if marks & _CURRENCY:
        return "other_unit"
    is_known = marks <= _MARKS_BEFORE and HARMLESS.union(names).issuperset(words)
    return "" if is_known and _PREPOSITIONS.isdisjoint(words[-1:]) else "ambiguous"


def _parts(text: str) -> tuple[list[str], set[str]]:
    """The lower-case words of a text, and the characters between them but white space."""
    words = [match[1].lower().replace("\u2019", "'").removesuffix("'s") for match in _WORD.finditer(text)]
    return words, set("".join(_WORD.sub(" ", text).split()))


def is_hedged(text: str, start: int, end: int) -> bool:
    """Whether what is right beside the amount at `[start, end)` makes it another one, a bound, or denies it."""
    window = _MARKUP.sub(" ", text[max(0, start - _WINDOW) : start])
    return _HEDGE.search(window) is not None or _HEDGE_BEHIND.match(text, end) is not None
