"""GrabCutEnvironment: the oracle reaches good masks with it, it is reproducible, and its states are exact."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmseg_llm.segmenters.environment import Environment
from mmseg_llm.segmenters.grabcut_clicks import GrabCutEnvironment
from mmseg_llm.segmenters.recorder import record
from mmseg_llm.structures import Click


def scene(size: tuple[int, int] = (60, 80), radius: int = 18) -> tuple[Image.Image, np.ndarray]:
    """A red disk on blue, with noise."""
    rows, cols = np.mgrid[: size[0], : size[1]]
    mask = (rows - size[0] // 2) ** 2 + (cols - size[1] // 2) ** 2 < radius**2
    noise = np.random.default_rng(0).integers(-12, 12, (*size, 3))
    pixels = np.where(mask[..., None], (200, 40, 40), (40, 60, 160)) + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), mask


def test_one_click_cuts_out_a_disk():
    image, mask = scene()
    trajectory = record(GrabCutEnvironment(), image, mask, iou_threshold=0.97)
    assert len(trajectory.steps) == 1
    assert trajectory.iou > 0.97


def test_the_oracle_improves_masks_of_photographs(shared_data):
    folder = shared_data / "interactive_mini" / "GrabCut"
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist")
    ious = []
    for path in sorted((folder / "boundary_GT").iterdir())[::4]:
        image = Image.open(next((folder / "data_GT").glob(f"{path.stem}.*"))).convert("RGB")
        labels = np.asarray(Image.open(path).convert("L"))
        trajectory = record(
            GrabCutEnvironment(max_side=160),
            image,
            labels == 255,
            ignore=labels == 128,
            max_clicks=5,
            on_low_gain="discard",
        )
        ious.append((trajectory.steps[0].iou, trajectory.iou))
    first, last = np.mean(ious, 0)
    assert last > 0.75, ious
    assert last > first + 0.05, ious


def test_states_are_exact_and_runs_reproducible():
    image, _ = scene()
    clicks = [Click(30, 40, True), Click(5, 5, True), Click(30, 45, False), Click(40, 40, True)]

    def masks(environment: Environment) -> list[np.ndarray]:
        environment.reset(image)
        return [environment.step(click).mask for click in clicks]

    environment = GrabCutEnvironment()
    expected = masks(environment)
    for again in (masks(environment), masks(GrabCutEnvironment())):
        assert all((a == b).all() for a, b in zip(expected, again, strict=True))
    environment.reset(image)
    environment.step(clicks[0])
    state = environment.snapshot()
    tried = environment.step_many([clicks[1], clicks[3]])
    assert (tried[0][0].mask == expected[1]).all()
    environment.step(Click(1, 1, False))
    environment.restore(state)
    for click, mask in zip(clicks[1:], expected[1:], strict=True):
        assert (environment.step(click).mask == mask).all()
    environment.restore(tried[0][1])
    shown = environment.step(clicks[2])
    assert (shown.mask == expected[2]).all()
    assert shown.clicks == tuple(clicks[:3])


def test_changes_stay_with_their_click():
    """A positive click only adds, a negative one only removes."""
    image, _ = scene()
    environment = GrabCutEnvironment()
    before = environment.reset(image).mask
    for click in (Click(30, 40, True), Click(30, 60, True), Click(31, 44, False), Click(2, 2, True)):
        after = environment.step(click).mask
        assert not ((before & ~after) if click.is_positive else (after & ~before)).any()
        assert after[click.row, click.col] == click.is_positive
        before = after


@settings(max_examples=30, deadline=None)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 90)),
    seed=st.integers(0, 2**16),
    is_flat=st.booleans(),
    kinds=st.lists(st.booleans(), min_size=1, max_size=4),
)
def test_any_image_and_clicks_give_a_mask_that_agrees_with_them(size, seed, is_flat, kinds):
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 1 if is_flat else 256, (*size, 3), np.uint8))
    places = list(dict.fromkeys(tuple(int(value) for value in rng.integers(0, size)) for _ in kinds))
    clicks = [Click(*place, is_positive) for place, is_positive in zip(places, kinds)]
    environment = GrabCutEnvironment()
    assert not environment.reset(image).mask.any()
    for click in clicks:
        shown = environment.step(click)
    assert shown.mask.shape == size and shown.mask.dtype == bool
    assert shown.clicks == tuple(clicks)
    assert all(shown.mask[click.row, click.col] == click.is_positive for click in clicks)
    small = GrabCutEnvironment(max_side=32)
    small.reset(image)
    assert [small.step(click).mask.shape for click in clicks] == [size] * len(clicks)


def test_errors_name_the_value():
    environment = GrabCutEnvironment()
    with pytest.raises(ValueError, match="reset"):
        environment.step(Click(0, 0, True))
    with pytest.raises(ValueError, match="reset"):
        environment.snapshot()
    environment.reset(scene()[0])
    with pytest.raises(ValueError, match="row 60"):
        environment.step(Click(60, 0, True))
    for options, words in (
        ({"sure": -0.1}, "sure is -0.1"),
        ({"first": 0.01}, "first is 0.01; it must be at least 0.02"),
        ({"reach": 0.0}, r"reach is 0\.0"),
        ({"iterations": 0}, "iterations is 0"),
        ({"max_side": 8}, "max_side is 8"),
        ({"workers": 0}, "workers is 0"),
    ):
        with pytest.raises(ValueError, match=words):
            GrabCutEnvironment(**options)
