"""Any head on any backbone: every pair builds, trains, is saved, loaded and predicts, whatever the batch.

Backbones and heads are listed once here; the tests of a pair come by themselves.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from backbones.tiny import scenes

from mmseg_llm.backbones.collate import collate
from mmseg_llm.clicks import NextClick
from mmseg_llm.inference.perceiver import Perceiver
from mmseg_llm.segmenters.oracle import next_click
from mmseg_llm.structures import Camera, DepthPoint, Prediction, Query, Sample
from mmseg_llm.training.checkpoint import CONFIG, build_model, load_model, save_weights

BACKBONES = {
    "internvl-tiny": "InternVLBackbone",
    "qwen2_vl-tiny": "QwenVLBackbone",
    "qwen2_5_vl-tiny": "QwenVLBackbone",
    "qwen3_vl-tiny": "QwenVLBackbone",
    "llava-tiny": "LlavaBackbone",
    "pixtral-tiny": "PixtralBackbone",
}
# of the released SegAgent weights; its image tokens are queries of a resampler, no cells that a mask could be read from
QUERIES = {"qwen-vl-chat-tiny": "QwenVlChatBackbone"}
SHORT = {"questions": ["Segment {x}."]}
HEADS = {
    "mask_decoder": {
        "class_path": "mmseg_llm.heads.MaskDecoderHead",
        "init_args": {
            "width": 64,
            "heads": 4,
            "max_new_tokens": 4,
            "prompts": {**SHORT, "answers": [{"start": "", "part": "{slot}", "is_tight": True}]},
        },
    },
    "all_mask": {
        "class_path": "mmseg_llm.heads.AllMaskHead",
        "init_args": {"grid": {"cells": 2}, "max_new_tokens": 4, "prompts": {**SHORT, "answers": [""]}},
    },
    "click_policy": {
        "class_path": "mmseg_llm.heads.ClickPolicyHead",
        "init_args": {
            "environment": {
                "class_path": "mmseg_llm.segmenters.fakes.DisksEnvironment",
                "init_args": {"positive_radius": 12, "negative_radius": 6},
            },
            "prompts": SHORT,
            "max_clicks": 2,
            "search": {"candidates": 2},
        },
    },
    "depth_text": {
        "class_path": "mmseg_llm.heads.DepthTextHead",
        "init_args": {
            "focal": 60,
            "cells": 50,
            "prompts": {"wording": "short", "thinking": False, "digits": 2},
            "max_new_tokens": 16,
        },
    },
    "depth_marker": {
        "class_path": "mmseg_llm.heads.DepthTextHead",
        "init_args": {"reference": "marker", "focal": 60, "prompts": {"thinking": False}, "max_new_tokens": 32},
    },
}
CAMERA = Camera(62.0, 60.0, 40.0, 35.0)


def settings_of(source: str, head: str) -> dict:
    backbone = {"class_path": f"mmseg_llm.backbones.{(BACKBONES | QUERIES)[source]}", "init_args": {"source": source}}
    return {"backbone": backbone, "heads": {head: HEADS[head]}}


def total(losses) -> torch.Tensor:
    return sum(value for name, value in losses.items() if not name.startswith("_"))


def pointed(samples: list[Sample], head) -> list[Sample]:
    """For heads that answer about points: the middle of each target's box, as far away as it is high in the picture."""
    if head.metric("generate", False) != "depth":
        return samples
    return [replace(sample, queries=tuple(map(point_of, sample.queries)), camera=CAMERA) for sample in samples]


def point_of(query: Query) -> Query:
    x1, y1, x2, y2 = query.boxes[0] if query.boxes else (10, 10, 40, 40)
    point = DepthPoint((x1 + x2) // 2, (y1 + y2) // 2, 1.0 + (y1 + y2) / 20)
    return Query("", points=(point,), task="depth", id=query.id)


def labelled(sample: Sample, head) -> Sample:
    """With what a click policy learns from: the first click on the target of each query."""
    if head.metric("generate", False) == "depth":
        return pointed([sample], head)[0]
    empty = np.zeros(sample.size, bool)
    clicks = [next_click(query.target(sample.size).array, empty, rule="clean") for query in sample.queries]
    labels = [NextClick(click, 0.0, is_finished=click is None) for click in clicks]
    return replace(sample, queries=tuple(replace(q, next_click=n) for q, n in zip(sample.queries, labels)))


def protocols_of(head) -> list[str]:
    """Those that need no label."""
    return [protocol for protocol in head.protocols if protocol != "oracle_best"]


@pytest.fixture(
    scope="module",
    params=[*itertools.product(BACKBONES, HEADS), *((source, "click_policy") for source in QUERIES)],
    ids=lambda pair: f"{pair[1]}-on-{pair[0]}",
)
def trained(request, tmp_path_factory):
    """A pair after a few steps on two scenes, the losses of these steps, and its run folder."""
    torch.manual_seed(0)
    settings = settings_of(*request.param)
    model = build_model(settings).train()
    head, codec = model.head(), model.backbone.codec
    rng = np.random.default_rng(0)
    batch = collate(
        [head.build(labelled(sample, head), codec, rng) for sample in scenes(0, 7)], codec, head.label_padding
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    history = []
    for step in range(30):
        losses = total(model.loss(batch))
        optimizer.zero_grad()
        losses.backward()
        if step == 0:
            without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
            assert without == []  # distributed training would wait for them
        optimizer.step()
        history.append(float(losses.detach()))
    model.eval()
    folder = tmp_path_factory.mktemp("run")
    save_weights(model, folder)
    (folder / CONFIG).write_text(yaml.safe_dump({"model": settings}))
    return model, history, folder


def test_learns(trained):
    _, history, _ = trained
    assert np.isfinite(history).all() and history[-1] < 0.4 * history[0]


def test_saved_model_predicts_the_same(trained):
    model, _, folder = trained
    loaded = load_model(folder)
    stored, ours = loaded.state_dict(), model.state_dict()
    assert stored.keys() == ours.keys() and all(torch.equal(stored[key], value) for key, value in ours.items())
    found = []
    for protocol in protocols_of(model.head()):
        first, second = (m.predict(pointed(scenes(0, 7), m.head()), protocol=protocol) for m in (model, loaded))
        assert [said(p) for p in first] == [said(p) for p in second]
        found += first
    assert len({p.mask for p in found}) > 2 or len({p.depth for p in found}) > 1
    assert any(p.mask.area if p.mask else p.depth for p in found)


def said(p: Prediction) -> tuple:
    """All of an answer."""
    return p.text, p.mask, p.score, p.measurement


def agree(p: Prediction, q: Prediction) -> bool:
    """Whether two answers are the same but for rounding."""
    is_same = (p.text, p.exists, p.measurement) == (q.text, q.exists, q.measurement)
    return is_same and (p.mask is None or p.mask.iou(q.mask) > 0.999)


def resized(sample: Sample, size: tuple[int, int]) -> Sample:
    image = sample.load_image().resize((size[1], size[0]))
    ratio = size[1] / sample.size[1], size[0] / sample.size[0]
    queries = tuple(
        replace(
            *(query,),
            masks=None,
            boxes=None,
            points=tuple(DepthPoint(round(p.x * ratio[0]), round(p.y * ratio[1])) for p in query.points),
        )
        for query in sample.queries
    )
    return Sample(image, size, queries, id=f"{sample.id}-{size}", camera=sample.camera)


def test_batch_does_not_matter(trained):
    """Batch of images of several sizes = image by image = query by query, in every protocol."""
    model, _, _ = trained
    shown = pointed(scenes(0, 1, 7), model.head())
    samples = [resized(sample, size) for sample, size in zip(shown, ((96, 96), (70, 96), (96, 52)))]
    for protocol in protocols_of(model.head()):
        together = model.predict(samples, protocol=protocol)
        assert len(together) == sum(len(sample.queries) for sample in samples)
        assert [p.size for p in together] == [sample.size for sample in samples for _ in sample.queries]
        alone = [p for sample in samples for p in model.predict([sample], protocol=protocol)]
        is_joint = protocol == "official" and model.head().name == "mask_decoder"
        split = [replace(sample, queries=(query,)) for sample in samples for query in sample.queries]
        single = together if is_joint else [p for one in split for p in model.predict([one], protocol=protocol)]
        for p, q, r in zip(together, alone, single, strict=True):
            assert agree(p, q) and agree(p, r)


def test_half_precision_leaves_rotary_frequencies_alone(trained):
    """In bfloat16 they are off by a radian after a thousand positions."""
    _, _, folder = trained
    model = Perceiver.from_pretrained(folder, device="cpu", dtype="bfloat16").model
    kinds = {name: buffer.dtype for name, buffer in model.named_buffers() if "inv_freq" in name}
    assert kinds and set(kinds.values()) == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    sample = pointed(scenes(0), model.head())[0]
    assert len(model.predict([sample])) == len(sample.queries)
