"""Words, numbers and the grammar that answers follow."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmseg_llm.backbones.chat import TEMPLATES
from mmseg_llm.backbones.codec import Codec, tiny_tokenizer
from mmseg_llm.heads.depth_text.grammar import NumberGrammar, encode_parts, number_ids
from mmseg_llm.heads.depth_text.prompts import ASKED, SHORT, THOUGHTS, DepthPrompts
from mmseg_llm.numbers_in_text import read_official, read_quantity
from mmseg_llm.questions import QUESTIONS

CODEC = Codec(tiny_tokenizer(TEMPLATES["plain"]), template=TEMPLATES["plain"])
FULL, PLAIN = DepthPrompts(), DepthPrompts(thinking=False)
BRIEF = DepthPrompts(wording="short", thinking=False)
STYLES = {"full": FULL, "plain": PLAIN, "brief": BRIEF}
values = st.floats(0.005, 999.9)


def test_every_question_is_worded():
    assert QUESTIONS.keys() == ASKED.keys() == SHORT.keys() == THOUGHTS.keys()
    for task, kind in QUESTIONS.items():
        for table in (ASKED, SHORT):
            assert table[task].count("{a}") + table[task].count("{b}") == kind.num_points
            assert ("{x}" in table[task]) == bool(kind.given)


def test_text_coordinates_to_the_letter():
    assert FULL.question("depth", ["the point at coordinates (1203, 77)"], "", 2000) == (
        "Given this image, how far is the point at coordinates (1203, 77) from the camera? The coordinates are in normalised "
        "[0, 2000] format relative to image width and height. Output the thinking process in <think> </think> and final "
        "answer (the meter number only, without the unit) in <answer> </answer> tags."
    )
    assert "thinking" not in PLAIN.question("depth", ["x"], "", None)
    assert BRIEF.question("two_point_distance", ["(1, 2)", "(3, 4)"], "", 9) == "how far are (1, 2) and (3, 4) apart?"


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("task", QUESTIONS)
@settings(max_examples=15, deadline=None)
@given(values, values)
def test_answers_read_back(style, task, first, last):
    prompts, unit = STYLES[style], QUESTIONS[task].unit
    texts, _ = prompts.pieces(task)
    numbers = [prompts.write(value) for value in (first, last)][-len(texts) :]
    answer = "".join(prompts.answer(task, numbers))
    reading = read_quantity(answer, unit)
    expected = float(numbers[-1])
    assert (reading.value == expected and not reading.reason) if expected else reading.reason == "non_positive"
    if style == "full":
        assert read_official(answer) == expected


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("task", ["depth", "speed"])
@settings(max_examples=25, deadline=None)
@given(values, values)
def test_the_grammar_knows_every_answer(style, task, first, last):
    """Each token of a written answer is allowed; texts are certain; the end follows the last decimal."""
    prompts = STYLES[style]
    texts, _ = prompts.pieces(task)
    numbers = [prompts.write(value) for value in (first, last)][-len(texts) :]
    if "0.00" in numbers:
        return
    grammar = NumberGrammar(CODEC, texts[1:], prompts)
    parts = prompts.answer(task, numbers)[: 2 * len(numbers)]
    ids = encode_parts(CODEC, parts)[len(CODEC.encode(parts[0])) :]
    assert len(ids) < grammar.longest
    for count, token in enumerate(ids):
        assert token in grammar.allowed(ids[:count]), (count, parts)
    assert grammar.allowed(ids) == (CODEC.end_id,)
    spans = grammar.numbers(ids)
    assert [ids[start:stop] for start, stop in spans] == [number_ids(CODEC, number) for number in numbers]
    inside = {place for start, stop in spans for place in range(start, stop)}
    assert all(len(grammar.allowed(ids[:place])) == 1 for place in range(len(ids)) if place not in inside)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**32))
def test_whatever_the_grammar_allows_is_a_number(decimals, digits, choice):
    """Random walks end, and give numbers above zero in the form that is written."""
    prompts = DepthPrompts(decimals=decimals, digits=digits)
    grammar, ids = NumberGrammar(CODEC, [], prompts), ()
    while (allowed := grammar.allowed(ids)) != (CODEC.end_id,):
        ids += (allowed[choice % len(allowed)],)
        choice //= 3
    text = "".join(CODEC.tokenizer.convert_ids_to_tokens(list(ids)))
    assert prompts.write(float(text)) == text and float(text) > 0


def test_refusals():
    with pytest.raises(ValueError, match="raise prompts"):
        DepthPrompts(digits=2).write(99.996)
    assert DepthPrompts(digits=2).write(99.994) == "99.99"
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="cannot be said"):
            FULL.write(value)
    with pytest.raises(ValueError, match="decimals 0"):
        DepthPrompts(decimals=0)
    with pytest.raises(ValueError, match="set thinking to false"):
        DepthPrompts(wording="short")
