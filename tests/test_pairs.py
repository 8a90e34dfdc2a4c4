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
from mmseg_llm.structures import Sample
from mmseg_llm.training.checkpoint import CONFIG, build_model, load_model, save_weights

BACKBONES = {
    "internvl-tiny": "InternVLBackbone",
    "qwen2_vl-tiny": "QwenVLBackbone",
    "qwen2_5_vl-tiny": "QwenVLBackbone",
    "qwen3_vl-tiny": "QwenVLBackbone",
    "llava-tiny": "LlavaBackbone",
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
}


def settings_of(source: str, head: str) -> dict:
    backbone = {"class_path": f"mmseg_llm.backbones.{(BACKBONES | QUERIES)[source]}", "init_args": {"source": source}}
    return {"backbone": backbone, "heads": {head: HEADS[head]}}


def total(losses) -> torch.Tensor:
    return sum(value for name, value in losses.items() if not name.startswith("_"))


def labelled(sample: Sample) -> Sample:
    """With what a click policy learns from: the first click on the target of each query."""
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
    batch = collate([head.build(labelled(sample), codec, rng) for sample in scenes(0, 7)], codec, head.label_padding)
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
        first, second = (m.predict(scenes(0, 7), protocol=protocol) for m in (model, loaded))
        assert [(p.text, p.mask, p.score) for p in first] == [(p.text, p.mask, p.score) for p in second]
        found += first
    assert any(p.mask.area for p in found) and len({p.mask for p in found}) > 2


def resized(sample: Sample, size: tuple[int, int]) -> Sample:
    image = sample.load_image().resize((size[1], size[0]))
    queries = tuple(replace(query, masks=None, boxes=None) for query in sample.queries)
    return Sample(image, size, queries, id=f"{sample.id}-{size}")


def test_batch_does_not_matter(trained):
    """Batch of images of several sizes = image by image = query by query, in every protocol."""
    model, _, _ = trained
    samples = [resized(sample, size) for sample, size in zip(scenes(0, 1, 7), ((96, 96), (70, 96), (96, 52)))]
    for protocol in protocols_of(model.head()):
        together = model.predict(samples, protocol=protocol)
        assert len(together) == sum(len(sample.queries) for sample in samples)
        assert [p.size for p in together] == [sample.size for sample in samples for _ in sample.queries]
        alone = [p for sample in samples for p in model.predict([sample], protocol=protocol)]
        is_joint = protocol == "official" and model.head().name == "mask_decoder"
        split = [replace(sample, queries=(query,)) for sample in samples for query in sample.queries]
        single = together if is_joint else [p for one in split for p in model.predict([one], protocol=protocol)]
        for p, q, r in zip(together, alone, single, strict=True):
            assert p.text == q.text == r.text and p.exists == q.exists == r.exists
            assert p.mask.iou(q.mask) > 0.999 and p.mask.iou(r.mask) > 0.999


def test_half_precision_leaves_rotary_frequencies_alone(trained):
    """In bfloat16 they are off by a radian after a thousand positions."""
    _, _, folder = trained
    model = Perceiver.from_pretrained(folder, device="cpu", dtype="bfloat16").model
    kinds = {name: buffer.dtype for name, buffer in model.named_buffers() if "inv_freq" in name}
    assert kinds and set(kinds.values()) == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    sample = scenes(0)[0]
    assert len(model.predict([sample])) == len(sample.queries)
