"""Answers as tokens, and the grammar that decoding keeps to."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmseg_llm.backbones.chat import ChatTemplate
from mmseg_llm.backbones.codec import Codec, tiny_tokenizer
from mmseg_llm.backbones.digits import EXAMPLE, encode_digits
from mmseg_llm.heads.click_policy.answers import AnswerGrammar
from mmseg_llm.heads.click_policy.asking import up_to_estimate
from mmseg_llm.heads.click_policy.codec import QWEN_MILLI, UNIT_DECIMAL, ClickCodec
from mmseg_llm.heads.click_policy.text import Status, parse, write
from mmseg_llm.structures import Click

CODEC = Codec(tiny_tokenizer(ChatTemplate()))
SIZE = (480, 640)
CLICKS = [QWEN_MILLI, UNIT_DECIMAL, ClickCodec(scale=100), ClickCodec(axis_order="xy", iou_scale=1)]


def walk(grammar, rng):
    ids = []
    while not ids or ids[-1] != CODEC.end_id:
        ids.append(int(rng.choice(grammar.allowed(ids))))
    return ids


def test_every_digit_is_a_token():
    ids = encode_digits(CODEC, EXAMPLE)
    assert len(CODEC.encode(EXAMPLE)) < len(ids)  # the tokenizer itself merges some
    texts = CODEC.tokenizer.convert_ids_to_tokens(ids)
    assert [text for text in texts if any(c.isdigit() for c in text)] == list("74175483")
    assert CODEC.decode(ids) == EXAMPLE


@pytest.mark.parametrize("with_iou", [True, False])
@pytest.mark.parametrize("clicks", CLICKS, ids=str)
def test_whatever_the_grammar_lets_through_is_a_click_or_the_finish(clicks, with_iou):
    grammar, rng = AnswerGrammar(CODEC, clicks, with_iou), np.random.default_rng(0)
    kinds = set()
    for _ in range(60):
        found = parse(CODEC.decode(walk(grammar, rng)), SIZE, clicks)
        kinds.add((found.status, found.click is not None and found.click.is_positive))
        assert (found.iou is not None) == with_iou
    assert kinds == {(Status.OK, True), (Status.OK, False), (Status.FINISH, False)}


@settings(max_examples=60)
@given(st.integers(0, 479), st.integers(0, 639), st.booleans(), st.floats(0, 1), st.sampled_from(CLICKS))
def test_every_answer_of_the_training_passes(row, col, is_positive, iou, clicks):
    grammar = GRAMMARS.setdefault(clicks, AnswerGrammar(CODEC, clicks))
    for click in (Click(row, col, is_positive), None):
        text = write(click, SIZE, clicks, iou=iou, is_finished=click is None)
        ids = (*encode_digits(CODEC, text), CODEC.end_id)
        assert all(token in grammar.allowed(ids[:place]) for place, token in enumerate(ids))
        middle = len(ids) // 2
        assert grammar.after(ids[:middle]).allowed(ids[middle:-1]) == grammar.allowed(ids[:-1]) == [CODEC.end_id]


GRAMMARS: dict = {}


def test_most_tokens_leave_no_choice():
    """Which is why a constrained answer costs a third of the passes."""
    grammar = AnswerGrammar(CODEC, QWEN_MILLI)
    ids = encode_digits(CODEC, EXAMPLE)
    choices = [len(grammar.allowed(ids[:place])) for place in range(len(ids) + 1)]
    assert sum(count > 1 for count in choices) <= 10 and sum(count == 1 for count in choices) >= 18


def test_the_end_of_an_estimate():
    grammar = AnswerGrammar(CODEC, QWEN_MILLI)
    ids = encode_digits(CODEC, "Current IOU: 7")
    assert set(grammar.action_starts) < set(grammar.allowed(ids)) and CODEC.end_id not in grammar.allowed(ids)
    assert [CODEC.decode([token]) for token in grammar.action_starts] == [","]


def test_numbers_too_fine_to_list():
    with pytest.raises(ValueError, match=r"1000000000 numbers.*constrained to false"):
        AnswerGrammar(CODEC, ClickCodec(scale=1, decimals=9))


@pytest.mark.parametrize("separator", [", ", "\n", " ", ""])
def test_a_free_answer_is_cut_behind_its_iou(separator):
    """Whatever stands between IoU and click: candidates that go on from there choose sign and row themselves."""
    for number in ("7", "74", "85.2", "100"):
        ids = (*encode_digits(CODEC, f"Current IOU: {number}{separator}Positive point: (175, 483)"), CODEC.end_id)
        assert CODEC.decode(up_to_estimate(CODEC, ids)) == f"Current IOU: {number}"
    assert up_to_estimate(CODEC, encode_digits(CODEC, "Positive point: (175, 483)")) == ()
