"""The click policy on a tiny backbone: what it is trained on, that it learns, and that inference is the same however batched."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from backbones.tiny import scenes

from mmseg_llm.backbones import InternVLBackbone
from mmseg_llm.backbones.codec import IGNORE_INDEX
from mmseg_llm.backbones.collate import collate
from mmseg_llm.clicks import Click, NextClick
from mmseg_llm.heads import ClickPolicyHead
from mmseg_llm.heads.click_policy.codec import ClickCodec
from mmseg_llm.heads.click_policy.overlay import Overlay
from mmseg_llm.heads.click_policy.prompts import ClickPrompts
from mmseg_llm.heads.click_policy.search import Search
from mmseg_llm.model import PerceptionModel
from mmseg_llm.segmenters.fakes import DisksEnvironment
from mmseg_llm.segmenters.oracle import next_click
from mmseg_llm.structures import Mask, Sample

SHORT = ClickPrompts(("Click {x}.",))


def make_model(**fields):
    torch.manual_seed(0)
    head = ClickPolicyHead(**{"environment": DisksEnvironment(12, 6), "prompts": SHORT, "max_clicks": 3, **fields})
    return PerceptionModel(InternVLBackbone("internvl-tiny"), {"click_policy": head}).eval()


def labelled(sample: Sample, start: Mask | None = None) -> Sample:
    """A scene with the oracle's next click from a mask for each of its expressions that has a target."""
    shown = np.zeros(sample.size, bool) if start is None else start.array
    queries = []
    for query in sample.queries:
        if query.masks is not None and not query.is_no_target:
            target = query.target(sample.size)
            click = next_click(target.array, shown, rule="clean")
            queries.append(
                replace(
                    query, start=start, next_click=NextClick(click, target.iou(start) if start else 0.0, click is None)
                )
            )
    return replace(sample, queries=tuple(queries))


@pytest.fixture(scope="module")
def model():
    return make_model()


def answers(example, codec):
    """The supervised words of each suffix."""
    kept = [[label for label in suffix.labels if label != IGNORE_INDEX] for suffix in example.suffixes]
    return [(codec.decode(ids), codec.end_id in ids) for ids in kept]


def test_only_answers_are_supervised_and_the_picture_shows_the_mask_so_far(model):
    head, codec = model.head(), model.backbone.codec
    start = Mask.from_array(np.add.outer(np.arange(96), np.arange(96)) < 90)
    sample = labelled(scenes(0)[0], start)
    example = head.build(sample, codec, np.random.default_rng(0))
    shown = Overlay()(sample.load_image(), start.array)
    assert np.array_equal(np.asarray(example.canvas.image), np.asarray(shown)) and example.canvas.size == (96, 96)
    for suffix, query, (text, is_ended) in zip(example.suffixes, sample.queries, answers(example, codec), strict=True):
        click, iou = query.next_click.click, query.next_click.iou
        assert text.startswith(f"Current IOU: {iou * 100:.0f}, ") and is_ended
        assert head.read(text, sample.size).click.is_positive == click.is_positive
        said = codec.decode(suffix.ids[: suffix.slots[0]])
        assert query.text in said and all(label == IGNORE_INDEX for label in suffix.labels[: suffix.slots[0]])


def test_finish_and_estimates(model):
    head, codec = model.head(), model.backbone.codec
    sample = labelled(scenes(0)[0])
    labels = [NextClick(None, 0.96, is_finished=True), NextClick(None, 0.42), NextClick(Click(3, 4, False), 0.5)]
    queries = tuple(replace(query, next_click=label) for query, label in zip(sample.queries, labels))
    example = head.build(replace(sample, queries=queries), codec, np.random.default_rng(0))
    # an estimate without a click does not teach that answers end there
    assert answers(example, codec) == [
        ("Current IOU: 96, Finish", True),
        ("Current IOU: 42", False),
        ("Current IOU: 50, Negative point: (31, 42)", True),
    ]


def test_what_cannot_be_built(model):
    head, codec, rng = model.head(), model.backbone.codec, np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"no query with a next click.*mmseg-llm data trajectories"):
        head.build(scenes(0)[0], codec, rng)
    sample = labelled(scenes(0)[0])
    mixed = (replace(sample.queries[0], start=Mask.empty((96, 96))), *sample.queries[1:])
    with pytest.raises(ValueError, match="start from different masks"):
        head.build(replace(sample, queries=mixed), codec, rng)
    with pytest.raises(ValueError, match="raise max_new_tokens from 9"):
        make_model(max_new_tokens=9)
    with pytest.raises(ValueError, match="calls the mask green"):
        ClickPolicyHead(prompt_style="qwen", overlay=Overlay("red"))
    with pytest.raises(ValueError, match="on_failure is 'ignore'"):
        ClickPolicyHead(on_failure="ignore")


def test_has_no_parameters(model):
    assert not list(model.head().parameters())


def test_learns_the_clicks_of_two_scenes():
    """Its loss falls to a tenth, and its episodes then segment what they were shown."""
    model = make_model(codec=ClickCodec(scale=100), max_queries=4).train()
    head, codec = model.head(), model.backbone.codec
    samples = [labelled(scene) for scene in scenes(0, 1)]
    rng = np.random.default_rng(0)
    batch = collate([head.build(sample, codec, rng) for sample in samples], codec)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    history = []
    for _ in range(100):
        loss = model.loss(batch)["ce"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        history.append(float(loss.detach()))
    assert history[-1] < 0.1 * history[0]
    head.max_clicks = 1
    found = model.eval().predict(samples)
    truth = [query.next_click.click for sample in samples for query in sample.queries]
    near = [
        abs(p.trajectory[1].click.row - t.row) + abs(p.trajectory[1].click.col - t.col) <= 4
        for p, t in zip(found, truth)
    ]
    assert np.mean(near) > 0.9
    assert head.rate(model.backbone, samples) == [0.0] * len(truth)


@pytest.mark.parametrize("protocol", ClickPolicyHead.protocols)
@pytest.mark.parametrize("constrained", [True, False])
def test_batch_equals_single_in_every_protocol(protocol, constrained):
    model = make_model(search=Search(candidates=3, beams=2), constrained=constrained, max_new_tokens=34, max_clicks=2)
    samples = [labelled(scene) for scene in scenes(0, 7)]
    together = model.predict(samples, protocol=protocol)
    split = [replace(sample, queries=(query,)) for sample in samples for query in sample.queries]
    model.head().batch_size = 1
    alone = [p for one in split for p in model.predict([one], protocol=protocol)]
    assert [p.trajectory for p in together] == [p.trajectory for p in alone]
    assert [(p.mask, p.text, p.score, p.stop) for p in together] == [(p.mask, p.text, p.score, p.stop) for p in alone]


def test_constrained_answers_always_click(model):
    found = model.predict([labelled(scenes(0)[0])])
    assert {step.status for p in found for step in p.trajectory} <= {"ok", "finish", "estimate"}


def test_one_picture_is_encoded_for_all_expressions_of_an_image(model, monkeypatch):
    seen = []
    encode = model.backbone.encode_images
    monkeypatch.setattr(model.backbone, "encode_images", lambda p, s=None: seen.append(len(p)) or encode(p, s))
    head = model.head()
    monkeypatch.setattr(head, "max_clicks", 1)
    count = len(model.predict([labelled(scenes(0)[0])]))
    assert count > 1 and seen[0] == 1  # the plain image once; then one picture per different mask
    assert sum(seen) <= 1 + count


def test_search_looks_at_each_candidate_once(model, monkeypatch):
    seen = []
    encode = model.backbone.encode_images
    monkeypatch.setattr(model.backbone, "encode_images", lambda p, s=None: seen.append(len(p)) or encode(p, s))
    monkeypatch.setattr(model.head(), "search", Search(candidates=3, patience=None, temperature=3.0))
    monkeypatch.setattr(model.head(), "max_clicks", 2)
    one = labelled(scenes(0)[0])
    model.predict([replace(one, queries=one.queries[:1])], protocol="search")
    assert seen[0] == 1 and len(seen) == 3 and all(1 <= count <= 3 for count in seen[1:]) and max(seen) > 1
