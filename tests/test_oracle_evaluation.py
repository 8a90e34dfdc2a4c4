"""The oracle's protocol: every click counts, lock-step changes nothing, the file can be scored again."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mmseg_llm.cli import main
from mmseg_llm.data import SampleDataset
from mmseg_llm.evaluation import format_report, score_file, score_records
from mmseg_llm.masks import Mask
from mmseg_llm.oracle_evaluation import measure_clicks, play
from mmseg_llm.segmenters.fakes import DisksEnvironment, TargetDisksEnvironment
from mmseg_llm.segmenters.oracle import next_click
from mmseg_llm.structures import Prediction, Query, Sample

SIZE = (30, 40)


def disk(row: int, col: int, radius: int) -> np.ndarray:
    return (np.arange(SIZE[0])[:, None] - row) ** 2 + (np.arange(SIZE[1])[None] - col) ** 2 <= radius**2


class Disks(SampleDataset):
    """Three images with two disks each; `change` alters the queries."""

    name, skipped = "disks", {}

    def __init__(self, change=lambda query: query) -> None:
        self.change = change

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Sample:
        index = range(3)[index]
        masks = [disk(8 + index, 10, 6), disk(18, 28 - index, 9 - index)]
        queries = [Query(f"q{i}", masks=(Mask.from_array(mask),), id=str(i)) for i, mask in enumerate(masks)]
        image = Image.new("RGB", SIZE[::-1])
        return Sample(image, SIZE, tuple(map(self.change, queries)), id=f"s{index}", source=self.name)


def one_by_one(environment, sample, index, max_clicks):
    """The masks of an episode, by the plain loop; None once nothing is wrong."""
    query = sample.queries[index]
    wanted, masks, used = query.target(SIZE).array, [], []
    shown = environment.reset(sample.load_image())
    masks.append(shown.mask)
    for _ in range(max_clicks):
        click = next_click(wanted, shown.mask, clicked=used, rule="clean")
        if click is None:
            break
        used.append(click)
        shown = environment.step(click)
        masks.append(shown.mask)
    return masks, used


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_lock_step_equals_the_plain_loop(batch_size, tmp_path):
    environment, output = DisksEnvironment(4, 2), tmp_path / "deep" / "o.json"
    report = measure_clicks(environment, Disks(), max_clicks=6, batch_size=batch_size, output=output)
    content = json.loads(output.read_text())
    found = {(r["sample_id"], r["query_id"]): Prediction.from_json(r) for r in content["predictions"]}
    assert len(found) == report["scores"]["num_episodes"] == 6 and list(tmp_path.rglob("*.part")) == []
    ious = []
    for sample in Disks():
        for index in range(2):
            prediction = found[sample.id, str(index)]
            masks, clicks = one_by_one(environment, sample, index, 6)
            assert [step.mask for step in prediction.trajectory] == [Mask.from_array(mask) for mask in masks]
            assert [step.click for step in prediction.trajectory] == [None, *clicks]
            assert prediction.mask == prediction.trajectory[-1].mask
            target = sample.queries[index].target(SIZE)
            ious.append([Mask.from_array(masks[min(k, len(masks) - 1)]).iou(target) for k in range(7)])
    for k in (1, 3, 5):
        assert report["scores"][f"mIoU@{k}"] == pytest.approx(np.mean(ious, 0)[k])
    first = [next((k for k in range(1, 7) if iou[k] >= 0.8), 6) for iou in ious]
    assert report["scores"]["NoC@80"] == np.mean(first) and "mIoU@7" not in report["scores"]
    assert content["scores"] == score_records(content["predictions"][::-1], "interactive", 6)


def test_clicks_go_on_without_gain():
    """Disks of one pixel that are set only: each click adds a pixel, and negative ones do nothing."""
    report = measure_clicks(DisksEnvironment(0.5, 0.5), Disks(), max_clicks=9)
    assert report["scores"]["clicks"] == 9 and report["scores"]["failures@80"] == 6
    assert report["scores"]["NoC@80"] == 9


@pytest.mark.parametrize("rule", ["clean", "official"])
def test_a_perfect_mask_ends_an_episode(rule):
    """It is carried forward; the official rule would spoil it with a click at the corner."""
    sample = Disks()[0]
    wanted = sample.queries[1].target(SIZE).array
    sample = replace(sample, queries=sample.queries[1:])
    ((prediction, _),) = play(TargetDisksEnvironment(wanted, 50, 50), [sample], 5, rule)
    assert [step.mask.area for step in prediction.trajectory] == [0, int(wanted.sum())]
    assert prediction.stop == "nothing_wrong"
    ((prediction, _),) = play(TargetDisksEnvironment(wanted, 2, 2), [sample], 3, rule)
    assert len(prediction.trajectory) == 4 and prediction.stop == "max_clicks"


def test_given_masks_ignored_pixels_and_missing_targets():
    border = Mask.from_array(disk(18, 28, 12) & ~disk(18, 28, 6))

    def change(query):
        if query.id == "0":
            return replace(query, start=query.masks[0])
        return replace(query, ignore=border)

    report = measure_clicks(DisksEnvironment(6.2, 3), Disks(change), max_clicks=5)
    assert report["scores"]["mIoU@0"] == 0.5, "one of two begins with a perfect mask"
    assert report["scores"]["worse"] == 0.0
    found = list(play(DisksEnvironment(6, 3), list(Disks(change)), 5, "clean"))
    for prediction, query in found:
        if query.id == "0":
            assert len(prediction.trajectory) == 1 and prediction.stop == "nothing_wrong"
        else:
            clicks = [step.click for step in prediction.trajectory[1:]]
            assert clicks and not any(border.array[click.row, click.col] for click in clicks)
    empty = measure_clicks(DisksEnvironment(6, 3), Disks(lambda query: replace(query, masks=())), max_clicks=2)
    assert (empty["scores"]["num_episodes"], empty["scores"]["num_without_target"]) == (0, 6)


def test_the_report_says_how():
    report = measure_clicks(DisksEnvironment(4, 2), Disks(), max_clicks=3)
    text = format_report(report)
    assert "environment: DisksEnvironment(positive_radius=4, negative_radius=2)" in text
    assert "at most 3 clicks" in text and "dataset: disks" in text and "num_episodes  6\n" in text
    assert report["dataset"]["queries"] == 6 and report["seconds_per_click"] >= 0


def test_what_is_refused():
    environment = DisksEnvironment(4, 2)
    for arguments in ({"max_clicks": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="both must be at least 1"):
            measure_clicks(environment, Disks(), **arguments)
    with pytest.raises(ValueError, match="has no mask label"):
        measure_clicks(environment, Disks(lambda query: replace(query, masks=None)))
    with pytest.raises(ValueError, match="clicker is 'me'; use one of oracle, random, centre"):
        measure_clicks(environment, Disks(), clicker="me")
    with pytest.raises(ValueError, match="nothing to score; give predictions"):
        score_records([], "interactive", 3)


def test_baselines():
    """Random clicks are the same however they are batched; the centre is clicked once."""
    environment = DisksEnvironment(6, 3)
    scores = {
        (clicker, batch): measure_clicks(environment, Disks(), clicker=clicker, max_clicks=4, batch_size=batch)[
            "scores"
        ]
        for clicker in ("oracle", "random", "centre")
        for batch in (1, 16)
    }
    for clicker in ("oracle", "random", "centre"):
        assert scores[clicker, 1] == scores[clicker, 16]
    assert scores["centre", 1]["clicks"] == 1 and scores["random", 1]["clicks"] == 4
    assert scores["oracle", 1]["mIoU@3"] > scores["random", 1]["mIoU@3"] + 0.2
    other = measure_clicks(environment, Disks(), clicker="random", max_clicks=4, seed=1)["scores"]
    assert other["mIoU@3"] != scores["random", 1]["mIoU@3"]


def test_verb_on_photographs(shared_data, tmp_path, capsys):
    """GrabCut's own data set: a few clicks make good masks, and the file holds the episodes."""
    root = shared_data / "interactive_mini" / "GrabCut"
    if not root.is_dir():
        pytest.skip(f"real data is absent: {root} does not exist")
    output = tmp_path / "o.json"
    words = ["--environment", "configs/environments/grabcut.yaml", "--root", str(root), "--output", str(output)]
    assert main(["clicks", "measure", *words, "--max_clicks", "5", "--max_samples", "3"]) == 0
    printed = capsys.readouterr().out
    scores = json.loads(output.read_text())["scores"]
    assert "dataset: GrabCut" in printed and f"mIoU@5  {scores['mIoU@5']:.4f}" in printed and "per click" in printed
    assert scores["mIoU@5"] > 0.7 and scores["num_episodes"] == 3
    again = score_file(output)
    assert again["scores"] == scores and again["protocol"]["metric"] == "interactive"
    assert main(["clicks", "measure", *words[:2]]) == 2
    assert "give either --root" in capsys.readouterr().err
