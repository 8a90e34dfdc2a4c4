"""Numbers in answers: the table of the reference, what is refused and why, and that no text raises."""

from __future__ import annotations

import time

import pytest
from golden_files import golden_files, read_golden
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mmseg_llm.amounts import find_amounts
from mmseg_llm.answer_words import HARMLESS
from mmseg_llm.numbers_in_text import Reading, read_metres, read_official, read_quantity
from mmseg_llm.quantities import REASONS

THOUGHT = "<think> The point is around {} meters away from the camera. </think>"


@pytest.mark.golden
@pytest.mark.parametrize("path", golden_files("depthlm*"), ids=lambda path: path.stem)
def test_golden_answers(path):
    _, meta = read_golden(path)
    assert len(meta["answers"]) >= 20
    for row in meta["answers"]:
        text, tolerance = row["text"], meta["tolerance"]["answers"]
        assert read_official(text) == (
            row["official"] if row["official"] is None else pytest.approx(row["official"], abs=tolerance)
        ), text
        found = read_metres(text)
        if row["clean_reason"] == "unspecified":
            assert found.value is None and found.reason in {"several_numbers", "ambiguous"}, text
            continue
        assert found.value == (row["clean"] if row["clean"] is None else pytest.approx(row["clean"], abs=tolerance)), (
            text
        )
        assert (found.reason or "ok") == row["clean_reason"], text


@pytest.mark.golden
@pytest.mark.parametrize("path", golden_files("depthlm*"), ids=lambda path: path.stem)
def test_golden_targets_read_back(path):
    """What the reference trains to say is read as what it says."""
    _, meta = read_golden(path)
    for depth, (thought, answer) in zip(meta["prompt"]["depths"], meta["prompt"]["targets"], strict=True):
        for text in (f"{thought}\n\n{answer}", thought, answer):
            assert read_metres(text).value == read_official(text) == pytest.approx(depth, abs=0.00501)


REFUSED = {
    "no_number": [
        *(
            "...",
            "two meters",
            "P3 is far",
            "It is the 2nd one.",
            "<answer> P2.5 </answer>",
            "<answer> unknown </answer>",
        ),
        THOUGHT.format(5.5) + "<answer> unknown </answer>",
        *("It is 2\u00bd m away", "\u06632 m"),
    ],
    "several_numbers": [
        *(
            "<answer> 2 3 </answer>",
            "<answer> 2.4 m, 2.4 m </answer>",
            "<answer>2-3</answer>",
            "<answer> 1/2 </answer>",
        ),
        *(
            "between 2 and 3 meters",
            "The point is around 2-3 meters away",
            "2 or 3 m",
            "2 m - 3 m",
            "3 m 5 cm",
            "4 to 5 m",
        ),
        *("It is 2 m wide and 3 m away.", "at 1024, 512", "around 2 m or around 3 m"),
        *(
            "1'234 m",
            "10^3 m",
            "1.5 times 2 m",
            "5 minus 2 m",
            "2 m 50",
            "2. 5 m",
            "2\u200b3 m",
            "<answer>5'6\"</answer>",
        ),
    ],
    "ambiguous": [
        *("<answer> 1.2.3 </answer>", "<answer> 1.234,5 </answer>", "about 12,34 m"),
        *("<answer> 2nd </answer>", "<answer> 1_000 </answer>"),
        *(
            f"<answer>{text}</answer>"
            for text in ("not 2.0", "<2", "> 2", "at least 2", "up to 2", "to 2", "two 2", "--2")
        ),
        *(
            f"<answer>{text}</answer>"
            for text in ("2.5k", "2 m or more", "2 m and a half", "2 m m", "2 m squirrels", "cm: 2")
        ),
        *(
            "It is not 2 m",
            "isn't around 2 m",
            "at least 2 m",
            "<2 m",
            ">= 2 m",
            "farther than 2 m",
            "$2 m",
            "within 2 m",
        ),
        *("2 thousand 500 meters", "2x10^3 m", "half of 2 m", "minus about 2 m", "2 m or less", "2 meters and a half"),
    ],
    "non_positive": [
        *("<answer> -0.01 m </answer>", "<answer> - 2 </answer>", "<answer>\u22122</answer>"),
        *("-2 meters", "0.00 m", "1e-999 m", "minus 2 m", "-   2 m", "negative 2 meters", "\u20132 m"),
        *("<answer> minus 2 </answer>", "<answer>-   2</answer>", "<answer>Negative 2.5 m</answer>"),
    ],
    "non_finite": [
        *(
            "<answer> nan </answer>",
            "<answer> inf </answer>",
            "<answer> -Infinity </answer>",
            "<answer> 1e999 </answer>",
        ),
        "\u221e m",
    ],
    "no_unit": [
        "3.3",
        "The distance is 3.3.",
        "2.42 </answer>",
        "3.3 away",
        "2 square meters",
        "2 million m",
        "2 kilo meters",
    ],
    "other_unit": [
        *("250 cm", "3 m/s", "2 km", "<answer> 8 feet </answer>", "<answer> 3 s </answer>"),
        *("<answer> 2 m2 </answer>", "<answer>50%</answer>", "2 meters squared"),
        *(
            f"<answer>{text}</answer>"
            for text in ("2 thousand", "2 million", "2 hundred meters", "2.5 k", "2 kilo meters")
        ),
        *(
            f"<answer>{text}</answer>"
            for text in ("2 centi meters", "2 in", "2'", '6"', "2 lightyears", "2 apples", "2+")
        ),
        *(
            f"<answer>{text}</answer>"
            for text in ("2 square meters", "$2", "-$2", "2 (feet)", "2 point five", "2 \u00bd")
        ),
    ],
    "truncated": [
        *("<think> The point is around", "<think> The point is around 1.2"),
        *("<answer> about", "<answer> 7.", "<answer> 1,"),
    ],
}


@pytest.mark.parametrize("reason", REFUSED)
def test_every_refusal_has_its_reason(reason):
    for text in REFUSED[reason]:
        assert read_metres(text) == Reading(None, reason), text


def test_largest():
    assert read_metres("<answer> 80.01 </answer>", largest=80) == Reading(None, "out_of_range")
    assert read_metres("<answer> 80 </answer>", largest=80) == Reading(80.0)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("The point at (1024, 512) is 3.2 meters away.", 3.2),
        ("The 2nd point, P3, is 3.2m away", 3.2),
        ("The table is 2 m wide. The point is around 3.1 meters away.", 3.1),
        ("3.0 m, that is 300 cm", 3.0),
        ("**2.5** meters", 2.5),
        ("a 2.5-metre gap", 2.5),
        ("<answer>2.5<|im_end|>", 2.5),
        ("<ANSWER> 2.5 </ANSWER>", 2.5),
        ("<answer> 1,234,567 </answer>", 1234567.0),
        ("1e1 m", 10.0),
        (THOUGHT.format("4.00") + "\n\n<answer>", 4.0),
        ("<answer>2.0</answer><answer>5</answer>", 2.0),
        ("<answer>The distance is 2.4 meters.", 2.4),
        ("<answer>2.5</ans", 2.5),
        ("<think>2 m</think>", 2.0),
        ("=> 2 m", 2.0),
        ("The table is over 2 m wide. The point is around 3.1 m away.", 3.1),
    ],
)
def test_what_is_read(text, value):
    assert read_metres(text) == Reading(value)


AROUND = [
    *(
        "{}",
        "{} m",
        "{} meters.",
        "**{}**",
        "**{}** meters",
        '"{}"',
        "\u201c{}\u201d",
        "`{}`",
        "<b>{}</b>",
        "({})",
        "[{}]",
    ),
    *(
        "$\\boxed{{{}}}$",
        "$ {} \\text{{ m}}$",
        "\\({}\\)",
        "{}\\,m",
        "\\approx {}",
        '{{"distance": {}}}',
        "{}!",
        "+   {}",
    ),
    *(
        "{} (meters)",
        "{} [m]",
        "in meters: {}",
        "approx. {}",
        "~{} m",
        "= {}",
        "d = {}m",
        "{} away",
        "so, it's about {}",
    ),
    *("Final answer: {} m", "The point's distance to the camera is {}", "{} m in front of the camera", "\n{}\n"),
    "The point is around {} meters away from the camera.",
]


@pytest.mark.parametrize("words", AROUND)
def test_what_may_stand_around_the_number_of_a_tag(words):
    inside = words.format("2.40")
    assert read_metres(f"<answer>{inside}</answer>") == read_metres(f"<answer>{inside}<|im_end|>") == Reading(2.4)


@given(st.sampled_from(AROUND), st.text("abcdefghijklmnopqrstuvwxyz", min_size=4, max_size=9), st.booleans())
def test_unknown_words_in_a_tag_are_refused(words, word, is_behind):
    assume(word not in HARMLESS | {"minus", "negative", "infinity"} and find_amounts(f"2 {word}")[0].kind == "")
    inside = words.format("2.40")
    text = f"{inside} {word}" if is_behind else f"{word} {inside}"
    assert read_metres(f"<answer>{text}</answer>").reason in {"other_unit", "ambiguous"}


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("<answer> 250 cm </answer>", "m", 2.5),
        ("It is 2500 mm away", "m", 2.5),
        ("0.0025 km", "m", 2.5),
        ("10 ft", "m", 3.048),
        ("10 feet", "m", 3.048),
        ("36 km/h", "m/s", 10.0),
        ("36 kilometers per hour", "m/s", 10.0),
        ("2 minutes", "s", 120.0),
        ("50 ms", "s", 0.05),
    ],
)
def test_lenient_converts_units_of_the_same_kind(text, unit, value):
    assert read_quantity(text, unit) == Reading(None, "other_unit")
    assert read_quantity(text, unit, lenient=True).value == pytest.approx(value, rel=1e-12)


def test_lenient_converts_no_other_kind():
    for text in ("<answer> 3 s </answer>", "3 m/s", "<answer> 50 % </answer>"):
        assert read_metres(text, lenient=True) == Reading(None, "other_unit")


def test_seconds_and_speeds():
    chain = "<think> The point is around 6.00 meters away, so the speed is 3.00 meters per second. </think>"
    assert read_quantity(chain, "m/s") == Reading(3.0)
    assert read_quantity(chain + "\n\n<answer> 3.10 </answer>", "m/s") == Reading(3.1)
    assert read_quantity("<answer> 2 seconds </answer>", "s") == Reading(2.0)
    assert read_quantity("<answer> 2 m </answer>", "s") == Reading(None, "other_unit")
    assert read_quantity("6 m away, 2 s", "s") == Reading(2.0)
    assert read_quantity("<answer>in seconds: 2</answer>", "s") == Reading(2.0)
    assert read_quantity("<answer>in meters: 2</answer>", "s") == Reading(None, "ambiguous")
    assert read_quantity("<answer>The speed is 2 meters per second.</answer>", "m/s") == Reading(2.0)


@pytest.mark.parametrize(
    ("text", "value"),  # what math_verify 0.8.0 gives
    [
        ("Answer: about 2.5 m and then 3", 2.5),
        ("Answer: 2.5\nor 3", 2.5),
        ("The distance is 2 to 3 m.", 3.0),
        ("<answer> 50% </answer>", 0.5),
        ("<answer> 1 234 </answer>", 1234.0),
        ("<answer> 5 * 2 </answer>", 10.0),
        ("<answer> 3/0 </answer>", None),
        ("x=2.5", 2.5),
        ("(2.5)", None),
        ("2.5m", 2.5),
    ],
)
def test_official_beyond_the_table(text, value):
    assert read_official(text) == value


written = st.floats(0.01, 99999, allow_nan=False).map(lambda depth: f"{depth:.2f}")


@given(written)
def test_written_answers_read_back(number):
    full = f"{THOUGHT.format(number)}\n\n<answer> {number} </answer>"
    for text in (full, f"<answer> {number} </answer>", THOUGHT.format(number)):
        assert read_metres(text) == Reading(float(number))
        assert read_official(text) == float(number)


tags = ["<answer>", "</answer>", "<think>", "</think>"]
pieces = st.sampled_from(
    [*tags, *"-e3./% \n$<'\"", "around ", "2.42", "1,", " m", " cm", "nan", "to", "minus ", "not "]
)


@settings(max_examples=300)
@given(st.one_of(st.text(max_size=60), st.lists(pieces, max_size=14).map("".join)), st.booleans())
def test_no_text_raises_and_values_can_be_trusted(text, lenient):
    for unit in ("m", "s", "m/s"):
        found = read_quantity(text, unit, lenient=lenient, largest=1000.0)
        if found.value is None:
            assert found.reason in REASONS
        else:
            assert found.reason == "" and 0 < found.value <= 1000
            assert any(character.isdigit() for character in text)
        assert found == read_quantity(text, unit, lenient=lenient, largest=1000.0)
    official = read_official(text)
    assert official is None or abs(official) < float("inf")
    amounts = find_amounts(text)
    assert [amount.start for amount in amounts] == sorted(amount.start for amount in amounts)


def test_long_texts_take_no_time():
    texts = [
        "1" * 20000,
        "." * 20000,
        "-" * 20000,
        "1 " * 10000,
        "<answer>" * 3000,
        "answer" * 3000,
        "1 m, around 2 m, " * 1500,
        *(f"<answer>{piece * 5000}</answer>" for piece in ("<a", "'", '$"', "a ", "- ", "\\text{", "not ")),
        *("-" + " " * 20000, "minus " * 4000, "<answer>2" + " " * 20000 + "m", "not " * 5000 + "2 m"),
    ]
    started = time.perf_counter()
    for text in texts:
        read_metres(text)
        read_official(text)
    assert time.perf_counter() - started < 10, "half a second where nothing is quadratic"
