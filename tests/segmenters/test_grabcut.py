"""GrabCutRefiner: it gains on scenes and photographs, is reproducible, and steps back where colours say nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmseg_llm.data.synthetic import make_scene
from mmseg_llm.masks import Mask
from mmseg_llm.segmenters import GrabCutRefiner, RefineError
from mmseg_llm.segmenters.prompts import upsample_logits


def coarsen(mask: np.ndarray, cell: float) -> torch.Tensor:
    """Logits `(1, h, w)` of a grid whose cells are foreground where more than half of their area is."""
    grid = tuple(max(1, round(side / cell)) for side in mask.shape)
    area = functional.interpolate(torch.from_numpy(mask)[None, None].float(), grid, mode="area")[0]
    return torch.where(area > 0.5, 10.0, -10.0)


def scene_masks(level: str, count: int) -> list[tuple[Image.Image, Mask]]:
    pairs = []
    for index in range(count):
        sample = make_scene(level, 1, index).to_sample()
        masks = {mask.counts: mask for query in sample.queries for mask in query.masks or () if mask.area >= 64}
        pairs += [(sample.load_image(), mask) for mask in masks.values()]
    return pairs


def gains(pairs: list[tuple[Image.Image, Mask]], refiner: GrabCutRefiner, cells: int = 16) -> np.ndarray:
    """IoU before (nearest upsampling) and after, `(N, 2)`; masks that vanish on the grid are left out."""
    ious = []
    for image, mask in pairs:
        logits = coarsen(mask.array, mask.size[0] / cells)
        if (logits > 0).any():
            before = Mask.from_array((upsample_logits(logits, mask.size)[0] > 0).numpy())
            ious.append((before.iou(mask), refiner.refine(image, logits)[0].iou(mask)))
    return np.array(ious)


@pytest.mark.parametrize(("level", "count"), [("flat-96", 6), ("solid-224", 5)])
def test_it_gains_on_rendered_scenes(level, count):
    before, after = gains(scene_masks(level, count), GrabCutRefiner()).mean(0)
    assert after > before + 0.12, (before, after)


def test_it_gains_on_photographs(shared_data):
    folder = shared_data / "interactive_mini" / "GrabCut"
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist")
    pairs = []
    for path in sorted((folder / "boundary_GT").iterdir())[:8]:
        image = next((folder / "data_GT").glob(f"{path.stem}.*"))
        pairs.append((Image.open(image).convert("RGB"), Mask.from_array(np.asarray(Image.open(path)) == 255)))
    before, after = gains(pairs, GrabCutRefiner()).mean(0)
    assert after > before + 0.06, (before, after)


def disk(size: int = 96, radius: int = 25) -> tuple[Image.Image, np.ndarray]:
    y, x = np.mgrid[:size, :size]
    mask = (y - 40) ** 2 + (x - 50) ** 2 < radius**2
    noise = np.random.default_rng(0).integers(-12, 12, (size, size, 3))
    pixels = np.where(mask[..., None], (200, 40, 40), (40, 60, 160)) + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), mask


def test_a_disk_becomes_exact():
    image, mask = disk()
    logits = coarsen(mask, 12)
    assert Mask.from_array((upsample_logits(logits, mask.shape)[0] > 0).numpy()).iou(Mask.from_array(mask)) < 0.87
    assert GrabCutRefiner().refine(image, logits)[0].iou(Mask.from_array(mask)) > 0.98


def test_batches_seeds_and_empty_rows():
    image, mask = disk()
    logits = torch.cat((coarsen(mask, 12), torch.full((1, 8, 8), -1.0), coarsen(~mask, 12)))
    before = torch.get_rng_state()
    masks = GrabCutRefiner().refine(image, logits)
    assert torch.equal(torch.get_rng_state(), before)
    assert masks == GrabCutRefiner().refine(image, logits)
    assert masks == [GrabCutRefiner().refine(image, row[None])[0] for row in logits]
    assert masks[1] == Mask.empty((96, 96))
    assert masks[2].iou(Mask.from_array(~mask)) > 0.97


def test_large_crops_are_worked_on_smaller():
    image, mask = disk(256, 60)
    refined = GrabCutRefiner(max_side=64).refine(image, coarsen(mask, 16))[0]
    assert refined.size == (256, 256)
    assert refined.iou(Mask.from_array(mask)) > 0.95


def test_the_coarse_mask_stays_where_grabcut_cannot_work():
    image, mask = disk()
    everything = GrabCutRefiner().refine(image, torch.ones(1, 4, 4))[0]
    assert everything.area == 96 * 96, "no background to compare with"
    logits = coarsen(mask, 12)
    coarse = Mask.from_array((upsample_logits(logits, (96, 96), "bilinear")[0] > 0).numpy())
    assert GrabCutRefiner(max_change=1.0).refine(image, logits)[0] == coarse, "ran away by this measure"


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    grid=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    seed=st.integers(0, 2**16),
    is_flat=st.booleans(),
)
def test_any_image_and_map_give_a_mask_of_the_image(height, width, grid, seed, is_flat):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 1 if is_flat else 256, (height, width, 3), np.uint8)
    logits = torch.from_numpy(rng.normal(size=(2, *grid)).astype(np.float32)) - rng.choice((0.0, 1.5))
    masks = GrabCutRefiner().refine(Image.fromarray(pixels), logits.float())
    assert [mask.size for mask in masks] == [(height, width)] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inner": -1.0}, "inner is -1.0; it must be at least 0"),
        ({"context": 0.5}, "context is 0.5; it must be at least 0.75"),
        ({"iterations": 0}, "iterations is 0"),
        ({"max_change": 0.5}, "max_change is 0.5"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        GrabCutRefiner(**arguments)


def test_failures_are_raised(monkeypatch):
    import cv2

    def fail(*args):
        raise cv2.error("broken")

    monkeypatch.setattr(cv2, "grabCut", fail)
    image, mask = disk()
    with pytest.raises(RefineError, match=r"GrabCut failed on a crop of .*broken"):
        GrabCutRefiner().refine(image, coarsen(mask, 12))
