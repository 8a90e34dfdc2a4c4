"""Conversations: several turns and masks, one vision call, and the same numbers as starting from scratch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from backbones.tiny import scenes
from heads.all_mask.test_all_mask import make_model

from mmseg_llm.backbones.llava import LlavaBackbone
from mmseg_llm.backbones.qwen_vl import QwenVLBackbone
from mmseg_llm.heads.all_mask.passes import Trigger
from mmseg_llm.heads.all_mask.prompts import Prompts
from mmseg_llm.inference.perceiver import Perceiver
from mmseg_llm.segmenters import GrabCutRefiner

FAMILIES = {"qwen": QwenVLBackbone, "llava": LlavaBackbone}


@pytest.fixture(scope="module", params=[None, "qwen", "llava"], ids=str)
def model(request):
    return make_model(FAMILIES[request.param]() if request.param else None, max_chat_tokens=5)


@torch.no_grad()
def naive_logits(model, image, ids: list[int]) -> torch.Tensor:
    """The cells of the last token of a whole dialogue, computed from nothing: image, ids and mask tokens in one pass."""
    from mmseg_llm.heads.all_mask.answering import open_images
    from mmseg_llm.structures import Sample

    head = model.head()
    sample = Sample(image, (image.height, image.width), id="x")
    prefix, _ = open_images(head, model.backbone, [sample])
    branch = prefix.open_branches(1)
    return head.cell_logits(model.backbone, prefix, [Trigger(0, branch, lead=tuple(ids))])[0]


def test_turns_equal_a_dialogue_from_scratch(model, monkeypatch):
    """Every mask of every turn is what a fresh cache with the same history gives; the tower ran once."""
    calls = []
    encode = model.backbone.encode_images
    monkeypatch.setattr(model.backbone, "encode_images", lambda *a: calls.append(1) or encode(*a))
    image = scenes(0)[0].load_image()
    head, codec = model.head(), model.backbone.codec
    conversation = Perceiver(model).converse(image)
    said: list[int] = []
    compared = 0
    for turn, force in enumerate((False, True, False)):
        question = f"Where is thing {turn}?"
        said += codec.question(question, is_first=turn == 0)
        seen = []
        generate = model.backbone.generate

        def spy(*args, **kwargs):
            out = generate(*args, **kwargs)
            seen.extend(out.ids[0][0])
            return out

        monkeypatch.setattr(model.backbone, "generate", spy)
        reply = conversation.ask(question, force_segment=force)
        monkeypatch.setattr(model.backbone, "generate", generate)
        ids = seen if not force else [*codec.encode(codec.template.before_answer + "Here: "), head.seg_id]
        before = len(calls)
        masks = iter(reply.masks)
        for place, index in enumerate(ids):
            if index == head.seg_id:
                fresh = naive_logits(model, image, said + ids[: place + 1])
                calls.pop()
                assert np.abs(next(masks).mask_logits - fresh[0].numpy()).max() < 1e-5
                compared += 1
        assert next(masks, None) is None and len(calls) == before == 1
        assert reply.text == codec.decode(ids)
        said += (
            ids + ([] if ids[-1] == codec.end_id else [codec.end_id]) + list(codec.encode(codec.template.after_answer))
        )
    assert compared >= 2, "the test needs masks to compare"
    cached = conversation.prefix.visibility.block[0].ge(0).sum()
    pending = len(conversation._pending)
    assert int(cached) == len(codec.image_prefix((96, 96))) + len(said) - pending


def test_spans_name_their_masks(model):
    conversation = Perceiver(model).converse(scenes(1)[0].load_image())
    reply = conversation.ask("Segment it.", force_segment=True)
    assert len(reply.masks) == 1 and reply.spans[0] == (reply.masks[0].text, 0) and reply.masks[0].text == "Here:"
    assert reply.masks[0].query == "Segment it." and reply.masks[0].size == (96, 96)
    free = conversation.ask("And what else?")
    assert [index for _, index in free.spans if index is not None] == list(range(len(free.masks)))
    assert "".join(text for text, _ in free.spans).replace(" ", "") == free.text.replace("<|seg|>", "").replace(" ", "")


def test_refined_masks(model):
    """A refiner behind the conversation sees its masks."""
    image = scenes(0)[0].load_image()
    logits = Perceiver(model).converse(image).ask("Segment it.", force_segment=True).masks[0].mask_logits
    with torch.no_grad():  # as many cells on as off
        model.head().classifier.bias -= float(np.median(logits))
    plain = Perceiver(model).converse(image).ask("Segment it.", force_segment=True)
    refined = Perceiver(model, GrabCutRefiner()).converse(image).ask("Segment it.", force_segment=True)
    expected = GrabCutRefiner().refine(image, torch.from_numpy(plain.masks[0].mask_logits)[None])[0]
    assert plain.masks[0].mask.area and refined.masks[0].mask == expected
    assert expected != plain.masks[0].mask
    assert refined.text == plain.text and refined.spans == plain.spans


def test_the_context_of_the_language_model_is_respected(model):
    conversation = Perceiver(model).converse(scenes(0)[0].load_image())
    conversation.ask("Segment it.")
    codec = model.backbone.codec
    longest, codec.context = codec.context, 120
    try:
        with pytest.raises(ValueError, match=r"would need \d+ positions, the language model takes 120; start a new"):
            for _ in range(9):
                conversation.ask("And what else is there?", force_segment=True)
    finally:
        codec.context = longest
    assert longest >= 32768


def test_forced_words():
    assert Prompts().forced() == "Here is the mask:" and Prompts(stub="x").forced() == "x"
    assert Prompts(answers=("The {x}:", "Here:")).forced() == "Here:" and Prompts(answers=("",)).forced() == ""


def test_errors(model):
    with pytest.raises(ValueError, match="question is empty"):
        Perceiver(model).converse(scenes(0)[0].load_image()).ask("  ")
    with pytest.raises(ValueError, match="does not exist"):
        Perceiver(model).converse("nowhere.png")


def test_heads_that_hold_no_conversation():
    from backbones.tiny import make_model as make_decoder

    with pytest.raises(ValueError, match="head 'mask_decoder' answers single queries only"):
        Perceiver(make_decoder()).converse(scenes(0)[0].load_image())
