"""Training SimpleClick: loss, views, points, simulated clicks, and the train door."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentError

from mmseg_llm.data import Part
from mmseg_llm.data.base import SampleDataset
from mmseg_llm.data.synthetic import make_scene
from mmseg_llm.masks import Mask
from mmseg_llm.segmenters import Environment, Observation
from mmseg_llm.segmenters.oracle import next_click
from mmseg_llm.segmenters.simple_click import SimpleClick, load_simple_click
from mmseg_llm.segmenters.simple_click.weights import save_simple_click
from mmseg_llm.structures import Query, Sample
from mmseg_llm.training.simple_click import ClickOptimization, SimpleClickModule
from mmseg_llm.training.simple_click_cli import WEIGHTS, train_simple_click
from mmseg_llm.training.simple_click_data import SimpleClickDataModule
from mmseg_llm.training.simple_click_objects import ClickViews, collate_clicks
from mmseg_llm.training.simple_click_start import load_initial
from mmseg_llm.training.simple_click_steps import (
    ClickIoU,
    add_clicks,
    normalized_focal_loss,
    oracle_ious,
    packed,
    simulated_click,
)
from mmseg_llm.training.simple_click_views import PointSampling, Views, draw_map, draw_points, warp

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def one_thread():
    """Networks of a few thousand parameters are slower on two threads, and much slower where others compute, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Scenes(SampleDataset):
    """Scenes made on the fly."""

    def __init__(self, count: int = 4, level: str = "flat-96") -> None:
        self.count, self.level, self.name, self.skipped = count, level, "scenes", {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        return make_scene(self.level, 0, index).to_sample()


def blob(rng: np.random.Generator, side: int = 40) -> np.ndarray:
    """A random mask of a few rectangles."""
    mask = np.zeros((side, side), bool)
    for _ in range(3):
        top, left = rng.integers(0, side - 8, 2)
        mask[top : top + rng.integers(3, 16), left : left + rng.integers(3, 16)] = True
    return mask


def small_views(**changes) -> ClickViews:
    views = Views(min_crop=24, min_area=16, colour="none", **changes)
    return ClickViews([Scenes()], 64, views=views, points=PointSampling(6, 0.6, 0.5), seed=3)


# Loss


def test_loss_by_hand():
    chances = np.array([[0.9, 0.6], [0.2, 0.5]])
    target = np.array([[True, False], [False, True]])
    right = np.where(target, chances, 1 - chances)
    focal = (1 - right) ** 2
    expected = np.mean(0.5 * focal * 4 / focal.sum() * -np.log(right))
    logits = torch.from_numpy(np.log(chances / (1 - chances)))[None]
    assert normalized_focal_loss(logits, torch.from_numpy(target)[None]).item() == pytest.approx(expected, rel=1e-5)


def test_loss_is_half_cross_entropy_without_focus_and_ignores():
    logits, target = torch.randn(3, 8, 8), torch.rand(3, 8, 8) > 0.5
    plain = torch.nn.functional.binary_cross_entropy_with_logits(logits, target.float())
    assert torch.isclose(normalized_focal_loss(logits, target, gamma=0.0), plain / 2, atol=1e-6)
    ignore = torch.zeros_like(target)
    ignore[:, :, 4:] = True
    part = normalized_focal_loss(logits[:, :, :4], target[:, :, :4])
    changed = logits.masked_fill(ignore, 50.0)
    assert torch.isclose(normalized_focal_loss(changed, target, ignore=ignore), part, atol=1e-6)


def test_loss_weighs_images_alike_and_its_gradient_does_not_fade():
    easy = torch.full((1, 16, 16), 6.0)
    target = torch.ones(1, 16, 16, dtype=torch.bool)
    target[0, 0, 0] = False  # the one error among easy pixels
    logits = easy.clone().requires_grad_()
    normalized_focal_loss(logits, target).backward()
    fading = easy.clone().requires_grad_()
    right = torch.where(target, fading, -fading)
    (0.5 * torch.sigmoid(-right).pow(2) * -torch.nn.functional.logsigmoid(right)).mean().backward()
    assert logits.grad[0, 0, 0] > 100 * fading.grad[0, 0, 0]
    both = normalized_focal_loss(torch.cat((easy, easy / 3)), target.expand(2, -1, -1))
    single = [normalized_focal_loss(one, target) for one in (easy, easy / 3)]
    assert torch.isclose(both, sum(single) / 2)
    far = normalized_focal_loss(torch.full((1, 4, 4), 200.0), torch.zeros(1, 4, 4))
    assert far.isfinite() and far > 90


# Points and clicks


def test_points_lie_where_they_should():
    rng = np.random.default_rng(0)
    for _ in range(60):
        target, others = blob(rng), blob(rng)
        points = draw_points(target, others, rng, PointSampling(5, 0.7, 0.5))
        assert points.shape == (2, 5, 3)
        for sign, expected in ((0, True), (1, False)):
            real = points[sign][points[sign, :, 0] >= 0].astype(int)
            assert all(target[row, col] == expected for row, col, _ in real)
        assert (points[0, 0] >= 0).all()


def test_numbers_of_points_decay():
    how = PointSampling(3, 0.5)
    assert how.chances(1) == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    assert how.chances(0).sum() == pytest.approx(1) and len(how.chances(0)) == 4
    rng, target = np.random.default_rng(1), np.zeros((20, 20), bool)
    target[5:15, 5:15] = True
    counts = np.array([(draw_points(target, target, rng, how)[..., 0] >= 0).sum(1) for _ in range(1500)])
    for sign, start in ((0, 1), (1, 0)):
        found = [(counts[:, sign] == number).mean() for number in range(start, 4)]
        assert found == pytest.approx(how.chances(start), abs=0.05)


def test_a_target_that_fills_the_view_gets_no_negative_points():
    points = draw_points(np.ones((9, 9), bool), np.zeros((9, 9), bool), np.random.default_rng(0), PointSampling(4, 1.0))
    assert (points[1] == -1).all()


def test_simulated_clicks_are_those_of_the_oracle_or_nearly_as_deep():
    rng = np.random.default_rng(2)
    for _ in range(40):
        target, mask = blob(rng), blob(rng)
        assert simulated_click(target, mask) == next_click(target, mask, rule="clean")
        click, best = simulated_click(target, mask, rng), next_click(target, mask, rule="clean")
        assert click.is_positive == best.is_positive
        assert target[click.row, click.col] == click.is_positive and mask[click.row, click.col] != click.is_positive
    assert simulated_click(target, target, rng) is None


def test_added_clicks_and_packing():
    rng = np.random.default_rng(4)
    targets = np.stack([blob(rng) for _ in range(3)])
    chances = np.stack([blob(rng) for _ in range(2)] + [targets[2]]).astype(np.float32)
    points = torch.full((3, 2, 4, 3), -1.0)
    points[:, 0, 0] = torch.tensor([3.0, 4.0, 0.0])
    more = add_clicks(points, torch.from_numpy(targets), torch.from_numpy(chances), None, order=7)
    assert more.shape == (3, 2, 5, 3) and torch.equal(more[:, :, :4], points)
    for index in range(2):
        click = next_click(targets[index], chances[index] > 0.5, rule="clean")
        assert more[index, 1 - click.is_positive, 4].tolist() == [click.row, click.col, 7]
        assert (more[index, int(click.is_positive), 4] == -1).all()
    assert (more[2, :, 4] == -1).all(), "nothing is wrong there"
    rows = packed(more)
    signs = rows.unflatten(1, (2, -1))
    assert signs.shape[2] == int((more[..., 0] >= 0).sum(-1).max()) < 5
    for index in range(3):
        for sign in range(2):
            real = more[index, sign][more[index, sign, :, 0] >= 0]
            assert torch.equal(signs[index, sign][: len(real)], real)
    assert packed(torch.full((2, 2, 4, 3), -1.0)).shape == (2, 2, 3)


def test_packing_changes_no_answer_and_a_batch_equals_its_parts():
    torch.manual_seed(0)
    network = SimpleClick("test").eval()
    batch = collate_clicks([small_views()[(index, 0)] for index in range(4)])
    inputs = torch.cat((batch["image"] / 255, torch.rand(4, 1, 64, 64)), 1)
    with torch.inference_mode():
        whole = network(inputs, packed(batch["points"]))
        assert torch.allclose(whole, network(inputs, batch["points"].flatten(1, 2)), atol=1e-5)
        for index in range(4):
            part = slice(index, index + 1)
            assert torch.allclose(whole[part], network(inputs[part], packed(batch["points"][part])), atol=1e-5)


# Views


@pytest.mark.parametrize("turn", [0.0, 25.0])
def test_image_and_mask_stay_aligned(turn: float):
    rng = np.random.default_rng(5)
    views = Views(whole=0.3, min_crop=20, min_area=1, rotate=turn)
    rows, cols = np.mgrid[:120, :160]
    for _ in range(20):
        centre = rng.uniform((30, 30), (90, 130))
        target = ((rows - centre[0]) ** 2 + (cols - centre[1]) ** 2 < rng.uniform(8, 25) ** 2).astype(np.uint8)
        image = np.repeat(target[:, :, None] * np.uint8(255), 3, 2)
        seen, (mask,) = warp(image, (target,), draw_map(target, 64, rng, views), 64)
        assert mask.any() and ((seen[..., 0] > 127) == mask).all()


def test_whole_view_is_that_of_the_predictor():
    rng = np.random.default_rng(6)
    image, target = rng.integers(0, 256, (45, 70, 3), dtype=np.uint8), np.ones((45, 70), np.uint8)
    matrix = draw_map(target, 32, rng, Views(whole=1.0, flip=0.0, min_area=1))
    seen, _ = warp(image, (target,), matrix, 32)
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(tensor, size=(32, 32), mode="bilinear", align_corners=True)
    difference = np.abs(seen.astype(np.float32) - expected[0].permute(1, 2, 0).numpy())
    assert difference.max() < 6  # OpenCV rounds places to 1/32 pixel
    flipped, _ = warp(image, (target,), draw_map(target, 32, rng, Views(whole=1.0, flip=1.0, min_area=1)), 32)
    assert np.abs(flipped[:, ::-1].astype(int) - seen).max() <= 12


def test_views_are_reproducible_and_differ():
    views, again = small_views(), small_views()
    first = views[(1, 0)]
    assert np.array_equal(first.image, again[(1, 0)].image) and np.array_equal(first.points, again[(1, 0)].points)
    assert not np.array_equal(first.image, views[(1, 1)].image)
    strong = ClickViews([Scenes()], 64, views=Views(min_crop=24, colour="strong"), cached_images=2)
    assert np.array_equal(strong[(1, 5)].image, strong[(1, 5)].image) and strong[(1, 5)].image.dtype == np.uint8
    assert len(strong._cache) <= 2


def test_merged_objects_and_shares():
    views = ClickViews([Scenes(), Scenes(9)], 64, [0, 1], views=Views(whole=1.0, min_area=1, colour="none"), merge=1.0)
    for index in range(6):
        views[(index, 0)]
    with pytest.raises(ValueError, match=r"shares \[1\] do not fit 2 datasets"):
        ClickViews([Scenes(), Scenes()], 64, [1])


# Scores


class Painter(Environment):
    """Gives the whole object at the second click."""

    def __init__(self, target: np.ndarray) -> None:
        self.target, self.clicks = target, ()

    def reset(self, image):
        self.clicks = ()
        return Observation(np.zeros_like(self.target), None, None)

    def step(self, click):
        self.clicks = (*self.clicks, click)
        mask = self.target.copy()
        if len(self.clicks) == 1:
            mask[:, mask.shape[1] // 2 :] = False
        return Observation(mask, None, None, self.clicks)

    def snapshot(self):
        return self.clicks

    def restore(self, state):
        self.clicks = state


def test_oracle_episodes_and_their_mean():
    target = np.zeros((10, 20), bool)
    target[2:8, 4:16] = True
    environment = Painter(target)
    ious = oracle_ious(environment, None, target, 5)
    assert ious == [0.5, 1.0, 1.0, 1.0, 1.0] and len(environment.clicks) == 2
    ignore = np.zeros_like(target)
    ignore[:, 10:] = True
    assert oracle_ious(environment, None, target, 2, ignore=ignore) == [1.0, 1.0]
    metric = ClickIoU((1, 3))
    metric.update(ious, 0.5)
    metric.update([0.0] * 5, 0.1)
    assert metric.compute() == pytest.approx({"mIoU@1": 0.25, "mIoU@3": 0.5, "loss": 0.3})


# Training


def module(**changes) -> SimpleClickModule:
    torch.manual_seed(0)
    return SimpleClickModule("test", optimization=ClickOptimization(lr=3e-3), **changes)


def test_loss_falls():
    learner = module()
    batch = collate_clicks([small_views(whole=1.0)[(index, 0)] for index in range(4)])
    optimizer = torch.optim.AdamW(learner.parameters(), 3e-3)
    losses = []
    for _ in range(28):
        loss = learner.loss(batch, 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.65 * losses[0], losses


def test_further_clicks_pass_no_gradient_and_leave_the_mode():
    learner = module().train()
    batch = collate_clicks([small_views()[(index, 0)] for index in range(2)])
    calls = []
    learner.model.register_forward_hook(
        lambda net, args, out: calls.append((net.training, out.requires_grad, args[0][:, 3].max().item() > 0))
    )
    learner.loss(batch, 2)
    assert calls == [(False, False, False), (False, False, True), (True, True, True)]
    assert learner.model.training


def test_schedules():
    steps = ClickOptimization(drop_epochs=(2, 4))
    assert [steps.factor(0.5, epoch) for epoch in (0, 2, 4)] == pytest.approx([1, 0.1, 0.01])
    cosine = ClickOptimization(schedule="cosine", warmup=0.1)
    assert [cosine.factor(at, 0) for at in (0.05, 0.1, 0.55, 1.0)] == pytest.approx([0.5, 1, 0.5, 0], abs=1e-9)


def test_starting_weights(tmp_path: Path):
    network, other = SimpleClick("test"), SimpleClick("test")
    save_simple_click(network, tmp_path / "a.safetensors", torch.float16)
    load_initial(other, tmp_path / "a.safetensors")
    assert torch.equal(other.head.conv_seg.weight, network.head.conv_seg.weight.half().float())
    with pytest.raises(ValueError, match=r"holds SimpleClick 'test', the model is 'tiny'; set model\.size"):
        load_initial(SimpleClick("tiny"), tmp_path / "a.safetensors")
    mae = {key: value.clone() for key, value in network.backbone.state_dict().items()}
    mae["pos_embed"] = torch.randn(1, 1 + 36, 16)
    torch.save({"model": mae | {"decoder.weight": torch.zeros(1), "norm.weight": torch.ones(16)}}, tmp_path / "mae.pth")
    load_initial(other, tmp_path / "mae.pth")
    assert torch.equal(other.backbone.blocks[3].mlp.fc1.weight, mae["blocks.3.mlp.fc1.weight"])
    assert other.backbone.pos_embed.shape == (1, 17, 16)
    with pytest.raises(ValueError, match="does not fit the backbone of this size"):
        load_initial(SimpleClick("tiny"), tmp_path / "mae.pth")
    with pytest.raises(ValueError, match="do not exist"):
        load_initial(other, tmp_path / "none.pth")


def test_no_half_written_or_diverged_weights(tmp_path: Path):
    network = SimpleClick("test")
    with torch.no_grad():
        network.head.conv_seg.bias.fill_(1e6)
    with pytest.raises(ValueError, match=r"head\.conv_seg\.bias is not finite as torch\.float16"):
        save_simple_click(network, tmp_path / "a.safetensors", torch.float16)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Views(whole=2.0), "whole is 2.0; it is a share"),
        (lambda: Views(expand=(0.5, 2.0)), "1 or more"),
        (lambda: Views(min_crop=0), "1 or more pixels"),
        (lambda: PointSampling(0), "max_points of 1 or more"),
        (lambda: Part(Scenes(), start=4), "are none; widen them"),
        (lambda: SimpleClickDataModule([Scenes()], side=0), "side is 0; give 1 or more"),
        (lambda: SimpleClickDataModule([Scenes()], merge=1.5), "merge is 1.5; it is a share"),
        (lambda: SimpleClickModule("test", max_clicks=-1), "max_clicks is -1"),
        (lambda: SimpleClickModule("test", average=1.0), "average is 1.0"),
        (lambda: SimpleClickModule("huge2"), "has no size 'huge2'; choose from"),
        (lambda: ClickIoU(()), "numbers of 1 or more"),
    ],
)
def test_errors_say_what_to_do(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_dataset_without_objects_is_named():
    class Empty(Scenes):
        def __getitem__(self, index: int) -> Sample:
            sample = super().__getitem__(index)
            return Sample(sample.image, sample.size, (Query("x", (Mask.empty(sample.size),)),), "0", "e")

    with pytest.raises(ValueError, match=r"scenes show no object of 100 pixels; lower data\.min_object"):
        ClickViews([Empty()], 64)[(0, 0)]


CONFIG = """
seed_everything: 0
model: {size: test, average: 0.9, min_crop: 16, optimization: {lr: 1.0e-3}}
data:
  train:
  - class_path: mmseg_llm.data.CocoInstances
    init_args: &scenes {annotations: scenes/instances.json, images: scenes/images}
  val:
    class_path: mmseg_llm.data.Part
    init_args: {dataset: {class_path: mmseg_llm.data.CocoInstances, init_args: *scenes}, stop: 2}
  side: 64
  batch_size: 4
  views: {min_crop: 24, min_area: 16}
  val_objects: 2
  num_workers: 0
trainer: {accelerator: cpu, max_steps: 3, enable_progress_bar: false, enable_model_summary: false, log_every_n_steps: 1}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with scenes, a config, and a run of it."""
    from mmseg_llm.data.synthetic.writer import write_dataset

    path = tmp_path_factory.mktemp("clicks")
    write_dataset(path / "scenes", "flat-96", {"train": 8})
    (path / "clicks.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setattr("sys.argv", ["train"])
        train_simple_click(["fit", "--config", "clicks.yaml", "--output", "run"])
    return path


def test_run_folder(folder: Path):
    network = load_simple_click(folder / "run" / WEIGHTS)
    assert network.size == SimpleClick("test").size
    report = json.loads((folder / "run/report.json").read_text())
    assert report["steps"] == 3 and 0 <= report["best"]["val/mIoU@5"] <= 1
    assert math.isfinite(report["last"]["train/loss"]) and math.isfinite(report["last"]["val/loss"])
    assert "SimpleClickEnvironment" in report["protocol"]["predict"]
    assert "min_crop: 24" in (folder / "run/config.yaml").read_text()


def test_a_run_is_not_overwritten(folder: Path, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["train"])
    with pytest.raises(ValueError, match="already trained; choose another --output"):
        train_simple_click(["fit", "--config", "clicks.yaml", "--output", "run"])


def test_unknown_key_is_named(folder: Path, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["train"])
    with pytest.raises(ArgumentError, match="learning_rate"):
        train_simple_click(["fit", "--config", "clicks.yaml", "--output", "b", "--model.learning_rate", "1"])


def test_the_shipped_network_finds_objects_of_the_synthetic_world():
    from mmseg_llm.configuration import read_environment

    environment = read_environment(ROOT / "configs/environments/simple_click_tiny.yaml")
    ious = []
    for index in range(4):
        sample = make_scene("solid-128", 7, index).to_sample()
        target = max((mask for query in sample.queries for mask in query.masks), key=lambda mask: mask.area)
        ious.append(oracle_ious(environment, sample.load_image(), target.array, 3))
    assert np.mean(ious, axis=0)[0] > 0.4 and np.mean(ious, axis=0)[2] > 0.7, ious
