"""Written numbers with the units behind them, found in text by plain regular expressions.

An amount is one written number with its unit. Nothing is decided here; `numbers_in_text.py` does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Amount:
    """One written number.

    Attributes:
        value: as written; NaN where it is not clear.
        start, end: where it stands in the text, sign and unit included.
        kind: `m`, `s`, `m/s`, `other` for a unit of something else, empty where no unit follows.
        factor: takes the value to the unit `kind`.
        is_clear: False for "2,5" and "1.2.3".
        is_glued: letters that are no unit follow at once, as in "2nd", or a digit of another script stands before it.
        is_joined: to a neighbour, as in "2-3" and "2 or 3".
    """

    value: float
    start: int
    end: int
    kind: str = ""
    factor: float = 1.0
    is_clear: bool = True
    is_glued: bool = False
    is_joined: bool = False


def _names(table: dict[str, float]) -> dict[str, float]:
    return {name: factor for names, factor in table.items() for name in names.split()}


LENGTHS = _names(
    {
        "m meter meters metre metres": 1.0,
        "dm decimeter decimeters decimetre decimetres": 0.1,
        "cm centimeter centimeters centimetre centimetres": 0.01,
        "mm millimeter millimeters millimetre millimetres": 0.001,
        "km kilometer kilometers kilometre kilometres": 1000.0,
        "ft foot feet": 0.3048,
        "inch inches": 0.0254,
        "yd yard yards": 0.9144,
        "mile miles": 1609.344,
    }
)
TIMES = _names({"s sec secs second seconds": 1.0, "ms millisecond milliseconds": 0.001, "min minute minutes": 60.0,
                "h hour hours": 3600.0})  # fmt: skip
SPEEDS = {"mps": 1.0, "kmh": 1 / 3.6, "kph": 1 / 3.6, "mph": 0.44704}
_SCALES = {"m": LENGTHS, "s": TIMES, "m/s": SPEEDS}


def unit_names(kind: str) -> frozenset[str]:
    """What the unit `kind` (`m`, `s` or `m/s`) itself is called."""
    return frozenset(name for name, factor in _SCALES[kind].items() if factor == 1)


_NUMBER = re.compile(
    r"(?P<sign>[-+\u2212]\s*|[\u2010-\u2013\ufe63\uff0d]|(?<!\w)(?:minus|negative)\s+)?"
    r"(?:(?P<digits>(?:(?<![\w.,])\.[0-9]|(?<!\w)(?<!\w[.,])[0-9])[0-9.,]*)(?P<exponent>e[-+]?[0-9]+)?"
    r"|(?P<word>(?<!\w)(?:nan|inf|infinity)(?!\w)|\u221e))",
    re.IGNORECASE | re.ASCII,
)
_PLAIN = re.compile(r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+|[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]+)?")
_UNIT = re.compile(
    r"[\s\u00a0\u202f*`(\[-]{0,4}"
    r"(?:(?P<name>[a-z]+)(?:\s{0,2}(?:/|per\b)\s{0,2}(?P<per>[a-z]+))?"
    r"(?P<power>[\^\u00b2\u00b30-9]|\s{1,2}(?:squared|cubed)\b)?|(?P<odd>[%\u00b0]))",
    re.IGNORECASE | re.ASCII,
)
_JOINS = frozenset(
    (
        *("", "-", "\u2212", "\u2013", "\u2014", "/", ",", "~", "\u00b1", "+", "*", "x", "\u00d7", "to", "or", "and"),
        *("'", "\u2019", "^", "**", "\u00b7", "\u22c5", "times", "plus", ".", "\u200b", "\u2060", "\ufeff"),
    )
)


def find_amounts(text: str) -> list[Amount]:
    """All amounts of a text in order; numbers joined to a later one ("2 to 3 m") share its unit where they have none."""
    found: list[Amount] = []
    for match in _NUMBER.finditer(text):
        gap = text[found[-1].end : match.start()].strip().lower() if found else None
        amount = _amount(text, match)
        if gap in _JOINS:
            found[-1], amount = replace(found[-1], is_joined=True), replace(amount, is_joined=True)
        found.append(amount)
        _share_unit(found)
    return found


def _share_unit(found: list[Amount]) -> None:
    """Give the unit of the last amount to those right before it that are joined to it and have none."""
    last = found[-1]
    for place in range(len(found) - 2, -1, -1):
        if not last.kind or found[place].kind or not found[place + 1].is_joined:
            break
        found[place] = replace(found[place], kind=last.kind, factor=last.factor)


def _amount(text: str, match: re.Match[str]) -> Amount:
    """One amount; a hyphen right before a number is its sign, also in "2-3"."""
    sign = -1.0 if match["sign"] and match["sign"][0] != "+" else 1.0
    if match["word"]:
        value, end, is_clear = (float("nan") if match["word"].lower() == "nan" else float("inf")), match.end(), True
    else:
        digits, exponent = match["digits"], match["exponent"] or ""
        digits = digits if exponent else digits.rstrip(".,")
        end = match.start("digits") + len(digits) + len(exponent)
        is_clear = _PLAIN.fullmatch(digits) is not None
        value = float(digits.replace(",", "") + exponent) if is_clear else float("nan")
    kind, factor, unit_end = _unit(text, end)
    is_glued = not kind and end < len(text) and (text[end].isalnum() or text[end] == "_")
    before = text[max(0, match.start() - 1) : match.start()]
    is_glued = is_glued or (before.isnumeric() and not before.isascii())
    return Amount(sign * value, match.start(), unit_end, kind, factor, is_clear, is_glued)


def _unit(text: str, end: int) -> tuple[str, float, int]:
    """`(kind, factor, end)` of the unit that follows; kind empty and the end unchanged without one."""
    match = _UNIT.match(text, end)
    if match is None:
        return "", 1.0, end
    if match["odd"]:
        return "other", 1.0, match.end()
    name, per = match["name"].lower(), (match["per"] or "").lower()
    kind = next((kind for kind, table in _SCALES.items() if name in table), "")
    if not kind:
        return "", 1.0, end
    if match["power"] or (per and not (kind == "m" and per in TIMES)):
        return "other", 1.0, match.end()
    if per:
        return "m/s", LENGTHS[name] / TIMES[per], match.end()
    return kind, _SCALES[kind][name], match.end()
