"""The benchmark of depth as text: what it counts, and that both ways give the same answers."""

from __future__ import annotations

import json

import pytest
from heads.depth_text.cases import SHORT

from mmseg_llm.backbones import InternVLBackbone
from mmseg_llm.bench_depth import counted, grid_sample, measure, print_report
from mmseg_llm.heads import DepthTextHead
from mmseg_llm.model import PerceptionModel


@pytest.fixture(scope="module")
def tiny():
    head = DepthTextHead(focal=80.0, overflow="shrink", prompts=SHORT)
    return PerceptionModel(InternVLBackbone("internvl-tiny", template="plain"), {"depth": head}).eval()


def test_grid_has_a_point_in_the_middle_of_every_cell():
    sample = grid_sample("solid-128", (2, 4))
    assert [(q.points[0].x, q.points[0].y) for q in sample.queries] == [
        (x, y) for y in (31.5, 95.5) for x in (15.5, 47.5, 79.5, 111.5)
    ]


def test_report(tiny, capsys):
    report = measure(tiny, "solid-128", (4, 6))
    shared, single, whole = report["flows"].values()
    assert report["points"] == report["equal_answers"] == 24 and report["largest_difference_metres"] == 0
    assert (shared["images"], single["images"], whole["images"]) == (1, 24, 24)
    assert shared["language_tokens"] < 0.5 * single["language_tokens"] <= 0.5 * whole["language_tokens"]
    assert shared["ratio"] == 1 < single["ratio"]
    print_report(json.loads(json.dumps(report)), "title")
    assert "24 of 24 answers are the same" in capsys.readouterr().out


def test_counting_leaves_the_backbone_alone(tiny):
    sample = grid_sample("solid-128", (1, 2))
    with counted(tiny.backbone) as usage:
        tiny.predict([sample])
    before = (usage.tokens, usage.images)
    tiny.predict([sample])
    assert (usage.tokens, usage.images) == before and before[1] == 1 and before[0] > 36


def test_flat_scenes_have_no_depth(tiny):
    with pytest.raises(ValueError, match="has no depth"):
        measure(tiny, "flat-96", (1, 2))
