"""SimpleClickEnvironment: states, regions, looks and starts; its numbers are checked by test_simple_click_goldens.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mmseg_llm.segmenters import Environment
from mmseg_llm.segmenters.simple_click import SimpleClickEnvironment, convert_simple_click
from mmseg_llm.segmenters.simple_click.predictor import expanded, overlap
from mmseg_llm.structures import Click
from segmenters.test_simple_click_network import tiny

CLICKS = (Click(30, 50, True), Click(38, 61, True), Click(20, 42, False), Click(50, 70, True), Click(0, 0, False))


class Blobs(torch.nn.Module):
    """Everything near a positive click and not near a negative one, brighter where it was before; keeps its calls."""

    def __init__(self, radius: float = 20.0) -> None:
        super().__init__()
        self.radius = radius
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, inputs: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        self.calls.append((inputs, points))
        y, x = torch.arange(inputs.shape[-2]).float()[:, None], torch.arange(inputs.shape[-1]).float()
        distance = torch.hypot(y - points[..., 0, None, None], x - points[..., 1, None, None])
        distance = torch.where((points[..., :2].amax(-1) >= 0)[..., None, None], distance, 1e4)
        positive, negative = (sign.amin(1, keepdim=True) for sign in distance.chunk(2, 1))
        return (negative.clamp(max=self.radius) - positive) / 4 + inputs[:, 3:]


def photo(height: int = 70, width: int = 90, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def make(network: torch.nn.Module | None = None, **options) -> SimpleClickEnvironment:
    return SimpleClickEnvironment(network or tiny(), **{"size": 64, "min_crop": 20, "device": "cpu"} | options)


def same(one, other) -> bool:
    return (
        np.array_equal(one.mask, other.mask)
        and np.array_equal(one.chances, other.chances)
        and one.clicks == other.clicks
    )


def test_reset_and_step():
    environment = make()
    assert isinstance(environment, Environment)
    shown = environment.reset(photo())
    assert shown.mask.shape == shown.chances.shape == (70, 90)
    assert not shown.mask.any()
    assert not shown.chances.any()
    assert shown.clicks == ()
    for count, click in enumerate(CLICKS, 1):
        shown = environment.step(click)
        assert shown.clicks == CLICKS[:count]
        assert shown.score is None
        assert shown.chances.dtype == np.float32
        assert np.array_equal(shown.mask, shown.chances > np.float32(0.49))
    environment.reset(photo().convert("L"))
    assert environment.step(CLICKS[0]).clicks == CLICKS[:1]


@pytest.mark.parametrize("network", [tiny(5), Blobs()], ids=["network", "blobs"])
def test_restore_equals_replay(network: torch.nn.Module):
    environment = make(network)
    environment.reset(photo())
    states, seen = [environment.snapshot()], []
    for click in CLICKS:
        seen.append(environment.step(click))
        states.append(environment.snapshot())
    for index in (4, 0, 2, 3, 1):
        environment.restore(states[index])
        environment.step(Click(69, 89, True))  # a branch that must leave nothing behind
        environment.restore(states[index])
        for click, expected in zip(CLICKS[index:], seen[index:]):
            assert same(environment.step(click), expected)
    fresh = make(network)
    fresh.reset(photo())
    assert all(same(fresh.step(click), expected) for click, expected in zip(CLICKS, seen))


def test_observations_are_copies():
    environment = make(Blobs())
    environment.reset(photo())
    state = environment.snapshot()
    shown = environment.step(CLICKS[0])
    kept = environment.snapshot()
    shown.chances[:] = 1
    second = environment.step(CLICKS[1])
    environment.restore(state)
    environment.step(CLICKS[0])
    assert torch.equal(environment.snapshot().chances, kept.chances)
    assert same(environment.step(CLICKS[1]), second)


def test_step_many_equals_steps():
    network = Blobs()
    environment = make(network)
    environment.reset(photo())
    environment.step(CLICKS[0])
    start = environment.snapshot()
    network.calls.clear()
    tried = environment.step_many(CLICKS[1:])
    assert len(network.calls) == 1
    assert network.calls[0][0].shape == (8, 4, 64, 64)
    assert environment.snapshot() is start
    for click, (shown, state) in zip(CLICKS[1:], tried, strict=True):
        environment.restore(start)
        expected = environment.step(click)
        assert np.allclose(shown.chances, expected.chances, atol=1e-6)
        assert shown.clicks == expected.clicks
        assert state.region == environment.snapshot().region
        environment.restore(state)
        assert environment.step(CLICKS[-1]).clicks == (*expected.clicks, CLICKS[-1])
    environment.restore(start)
    assert environment.step_many([]) == []


def test_looks():
    network = Blobs()
    environment = make(network)
    environment.reset(photo())
    environment.step(CLICKS[0])
    inputs, points = network.calls[-1]
    assert torch.equal(inputs[1], inputs[0].flip(2))
    row, column = 64 * 30 / 70, 64 * 50 / 90
    none = [-1.0, -1, -1]
    assert torch.allclose(points, torch.tensor([[[row, column, 0], none], [[row, 64 - column - 1, 0], none]]))
    environment.step(CLICKS[2])
    assert network.calls[-1][1].shape == (2, 2, 3)
    plain = make(network, flip_tta=False)
    plain.reset(photo())
    plain.step(CLICKS[0])
    assert network.calls[-1][0].shape == (1, 4, 64, 64)


def test_average_is_of_logits():
    class Halves(torch.nn.Module):
        def forward(self, inputs: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
            logits = inputs.new_full((2, 1, 64, 64), -2.0)
            logits[0], logits[1, :, :, :32] = 10.0, 4.0  # the left half of the mirrored look is the right half
            return logits

    environment = make(Halves())
    environment.reset(photo())
    shown = environment.step(CLICKS[0])
    assert np.allclose(shown.chances[:, [0, -1]], torch.tensor([4.0, 7.0]).sigmoid().numpy(), atol=1e-6)


def test_zoom():
    environment = make(Blobs(8.0))
    environment.reset(photo(200, 300))
    environment.step(Click(100, 150, True))
    assert environment.snapshot().region == (0, 199, 0, 299)
    shown = environment.step(Click(101, 150, True))
    top, bottom, left, right = environment.snapshot().region
    assert 0 < top < 100 < bottom < 199
    assert 0 < left < 150 < right < 299
    outside = shown.chances.copy()
    outside[top : bottom + 1, left : right + 1] = 0
    assert not outside.any()
    environment.step(Click(102, 151, True))
    kept = environment.snapshot().region
    environment.step(Click(kept[1], 150, True))  # the last row counts as outside
    assert environment.snapshot().region[1] > kept[1]

    whole = make(Blobs(8.0), zoom_in=False)
    whole.reset(photo(200, 300))
    for row in (100, 101, 102):
        whole.step(Click(row, 150, True))
        assert whole.snapshot().region == (0, 199, 0, 299)


def test_what_lies_outside_of_a_region_can_stay():
    """Officially it becomes 0 with every look."""
    for merge_outside in (False, True):
        environment = make(Blobs(radius=6), merge_outside=merge_outside)
        environment.reset(photo(200, 300))
        before = environment.step(Click(30, 40, True))
        after = environment.step(Click(30, 44, True))
        top, bottom, left, right = environment.snapshot().region
        outside = np.ones(before.chances.shape, bool)
        outside[top : bottom + 1, left : right + 1] = False
        assert outside.any() and before.chances[outside].any()
        assert np.array_equal(after.chances[outside], before.chances[outside]) == merge_outside
        assert after.chances[outside].any() == merge_outside
        assert f"merge_outside={merge_outside}" in repr(environment)


def test_region_arithmetic():
    assert expanded((140, 160, 300, 309), (1000, 1000), 1.4, 200) == (
        50,
        250,
        204,
        404,
    )  # 201 inclusive; halves to even
    assert expanded((0, 9, 90, 99), (100, 100), 1.4, 1) == (0, 12, 88, 99)
    assert expanded((0, 4, 0, 6), (5, 7), 1.4, 200) == (0, 4, 0, 6)
    assert overlap((0, 9, 0, 9), (0, 9, 0, 9)) == 1
    assert overlap((0, 9, 0, 9), (5, 14, 0, 19)) == pytest.approx(5 / 15 * 10 / 20)
    assert overlap((0, 4, 0, 4), (7, 9, 0, 4)) == 0


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (3, 2)])
def test_small_images(size: tuple[int, int]):
    environment = make(Blobs())
    environment.reset(photo(*size))
    for _ in range(3):
        shown = environment.step(Click(size[0] - 1, size[1] - 1, True))
    assert shown.mask.shape == size
    assert np.isfinite(shown.chances).all()


def test_clicks_limit_and_threshold():
    network = Blobs()
    environment = make(network, net_clicks_limit=2, threshold=0.9)
    environment.reset(photo())
    for click in CLICKS:
        shown = environment.step(click)
    assert network.calls[-1][1].shape == (2, 4, 3)
    assert sorted(network.calls[-1][1][0, :, 2].tolist()) == [-1, -1, 0, 1]
    assert len(shown.clicks) == 5
    assert np.array_equal(shown.mask, shown.chances > np.float32(0.9))


def disk(centre: tuple[int, int], radius: float, size: tuple[int, int] = (70, 90)) -> np.ndarray:
    rows, cols = np.mgrid[: size[0], : size[1]]
    return np.hypot(rows - centre[0], cols - centre[1]) < radius


def test_start_from_a_mask():
    mask = disk((30, 45), 25)
    direct = make(Blobs(), init_mode="direct")
    shown = direct.reset(photo(), mask=mask)
    assert np.array_equal(shown.mask, mask)
    assert shown.clicks == ()
    direct.step(CLICKS[0])
    inputs = direct._module.calls[-1][0]
    assert inputs[:, 3].max() == 1  # the mask is the previous prediction
    assert direct.snapshot().region != (0, 69, 0, 89)  # and what the zoom starts from

    clicked = make(Blobs(25.0))
    target = make(Blobs(25.0))
    target.reset(photo())
    reached = target.step(Click(30, 45, True)).mask
    shown = clicked.reset(photo(), mask=reached)
    assert len(shown.clicks) >= 1
    assert (shown.mask & reached).sum() / (shown.mask | reached).sum() >= 0.8

    far = disk((10, 10), 5) | disk((60, 80), 5) | disk((10, 80), 5) | disk((60, 10), 5)
    shown = clicked.reset(photo(), mask=far.astype(np.uint8))
    assert np.array_equal(shown.mask, far)
    assert shown.clicks == ()
    assert not clicked.reset(photo(), mask=np.zeros((70, 90), bool)).mask.any()


def test_errors():
    environment = make()
    with pytest.raises(ValueError, match="call reset"):
        environment.step(CLICKS[0])
    with pytest.raises(ValueError, match="call reset"):
        environment.step_many(CLICKS)
    environment.reset(photo())
    before = environment.snapshot()
    with pytest.raises(ValueError, match="row 70, column 3 lies outside"):
        environment.step(Click(70, 3, True))
    with pytest.raises(ValueError, match="lies outside"):
        environment.step_many([CLICKS[0], Click(0, -1, True)])
    assert environment.snapshot() is before
    other = make()
    other.reset(photo())
    for state in (other.snapshot(), None):
        with pytest.raises(ValueError, match="not of this environment"):
            environment.restore(state)
    with pytest.raises(ValueError, match=r"shape \(3, 3\) does not fit"):
        environment.reset(photo(), mask=np.zeros((3, 3), bool))
    with pytest.raises(ValueError, match=r"from 0\.5 to 0\.5"):
        environment.reset(photo(), mask=np.full((70, 90), 0.5))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threshold", 0),
        ("threshold", float("nan")),
        ("size", 0),
        ("min_crop", 0),
        ("expand", 0.9),
        ("expand", float("nan")),
        ("net_clicks_limit", 0),
        ("batch_size", 0),
        ("init_mode", "both"),
    ],
)
def test_settings(name: str, value: object):
    with pytest.raises(ValueError, match=f"{name} is '?{value}"):
        make(**{name: value})


def test_weights_are_read_on_the_first_image(tmp_path):
    torch.save(tiny(6).state_dict(), tmp_path / "w.pth")
    written = convert_simple_click(tmp_path / "w.pth", tmp_path / "w.safetensors")
    from_file, from_module = (SimpleClickEnvironment(source, size=64, device="cpu") for source in (written, tiny(6)))
    absent = SimpleClickEnvironment(tmp_path / "none.pth", device="cpu")
    assert absent.image_size is None
    assert "none.pth" in repr(absent)
    assert "threshold=0.49, min_crop=200, expand=1.4" in repr(absent)
    with pytest.raises(ValueError, match="do not exist"):
        absent.reset(photo())
    for environment in (from_file, from_module):
        environment.reset(photo())
    assert same(from_file.step(CLICKS[0]), from_module.step(CLICKS[0]))
