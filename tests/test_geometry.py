"""Canvases and masks: exact inverses, pixel centres, errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmseg_llm.geometry import (
    box_iou,
    canvas_to_original,
    crop,
    letterbox,
    load_image,
    mask_to_canvas,
    stretch,
    upright,
)
from mmseg_llm.structures import Mask

sides = st.integers(1, 80)
sizes = st.tuples(sides, sides)
KINDS = ("stretch", "letterbox", "crop")


def make(kind, original, size, left=0, top=0):
    image = Image.new("RGB", (original[1], original[0]), (255, 128, 0))
    if kind == "crop":
        return crop(stretch(image, size), left, top, (max(1, size[0] // 2), max(1, size[1] // 2)))
    return (stretch if kind == "stretch" else letterbox)(image, size)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(KINDS), sizes, sizes, st.integers(-20, 20), st.integers(-20, 20), st.integers(0, 2**32 - 1))
def test_canvas_mapping_is_inverse(kind, original, size, left, top, seed):
    canvas = make(kind, original, size, left, top)
    points = np.random.default_rng(seed).uniform(-5, 85, (7, 3, 2))
    assert np.abs(canvas.to_original(canvas.to_canvas(points)) - points).max() <= 1e-9
    assert np.abs(canvas.to_canvas(canvas.to_original(points)) - points).max() <= 1e-9
    assert canvas.original_size == original


@settings(max_examples=60, deadline=None)
@given(sizes, sizes)
def test_edges_map_to_edges(original, size):
    """Pixel edges are at -0.5 and length - 0.5; a stretched canvas covers the image from edge to edge."""
    height, width = original
    edges = make("stretch", original, size).to_canvas([(-0.5, -0.5), (width - 0.5, height - 0.5)])
    assert np.abs(edges - [(-0.5, -0.5), (size[1] - 0.5, size[0] - 0.5)]).max() <= 1e-9
    boxed = make("letterbox", original, size).to_canvas([(width - 0.5, height - 0.5)])[0] + 0.5
    assert (np.abs(boxed - boxed.round()) <= 1e-9).all() and (boxed <= np.array(size[::-1]) + 1e-9).all()


def test_canvas_pictures():
    image = Image.new("RGB", (4, 2), (255, 255, 255))
    assert np.asarray(stretch(image, (6, 6)).image).min() == 255
    boxed = np.asarray(letterbox(image, (8, 8), fill=(9, 9, 9)).image)
    assert (boxed[:4] == 255).all() and (boxed[4:] == 9).all()
    assert stretch(image, (2, 4)).image is image
    outside = crop(stretch(image, (2, 4)), -1, 0, (2, 3))
    assert np.asarray(outside.image)[0, :, 0].tolist() == [0, 255, 255]


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(KINDS), sizes, sizes, st.integers(-20, 20), st.integers(-20, 20), st.integers(0, 2**32 - 1))
def test_mask_to_canvas_takes_the_pixel_under_the_centre(kind, original, size, left, top, seed):
    array = np.random.default_rng(seed).random(original) < 0.5
    canvas = make(kind, original, size, left, top)
    seen = mask_to_canvas(Mask.from_array(array), canvas)
    assert seen.shape == canvas.size and seen.dtype == bool
    rows, columns = np.mgrid[: canvas.size[0], : canvas.size[1]]
    exact = canvas.to_original(np.stack((columns, rows), -1)) + 0.5
    x, y = np.moveaxis(np.floor(exact).astype(int), -1, 0)
    inside = (x >= 0) & (y >= 0) & (x < original[1]) & (y < original[0])
    expected = np.zeros(canvas.size, bool)
    expected[inside] = array[y[inside], x[inside]]
    decided = (np.abs(exact - exact.round()) > 1e-9).all(-1)  # centres on a pixel edge may go either way
    assert (seen == expected)[decided].all()


def test_mask_on_its_own_canvas_is_untouched():
    mask = Mask.from_array(np.eye(6, 9))
    canvas = make("stretch", (6, 9), (6, 9))
    assert mask_to_canvas(mask, canvas) is mask.array
    with pytest.raises(ValueError, match=r"mask of size \(9, 6\) does not fit"):
        mask_to_canvas(Mask.empty((9, 6)), canvas)


@pytest.mark.parametrize("kind", KINDS)
def test_mask_there_and_back(kind):
    """A blob drawn on the canvas comes back where it was; cropped parts are compared inside the window."""
    array = np.zeros((60, 90), bool)
    array[12:30, 20:44] = True
    canvas = make(kind, (60, 90), (120, 120), 10, 5)
    seen = torch.from_numpy(mask_to_canvas(Mask.from_array(array), canvas)).float()[None]
    back = canvas_to_original(seen, canvas)
    assert back.shape == (1, 60, 90)
    back = back[0].numpy() >= 0.5
    if kind == "crop":
        corner = canvas.to_original([canvas.size[1] - 1, canvas.size[0] - 1]).astype(int)
        back, array = back[4 : corner[1], 10 : corner[0]], array[4 : corner[1], 10 : corner[0]]
    assert (back & array).sum() / (back | array).sum() > 0.9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", [1, 4])
def test_linear_maps_come_back_exactly(kind, reduction):
    """Bilinear interpolation keeps a ramp: each pixel gets its own canvas coordinate, away from the border."""
    canvas = make(kind, (30, 50), (64, 64), 6, 3)
    height, width = canvas.size[0] // reduction, canvas.size[1] // reduction
    x = (torch.arange(width, dtype=torch.float64) + 0.5) * canvas.size[1] / width - 0.5
    y = (torch.arange(height, dtype=torch.float64) + 0.5) * canvas.size[0] / height - 0.5
    maps = torch.stack((x.expand(height, width), y[:, None].expand(height, width)))
    back = canvas_to_original(maps, canvas).numpy()  # (2, 30, 50)
    rows, columns = np.mgrid[:30, :50]
    expected = np.moveaxis(canvas.to_canvas(np.stack((columns, rows), -1)), -1, 0)
    low, high = float(x[0]), np.array([float(x[-1]), float(y[-1])])[:, None, None]
    inside = ((expected >= low) & (expected <= high)).all(0)
    assert inside.sum() > 100
    assert np.abs(back - expected)[:, inside].max() < 1e-9


def test_load_image(tmp_path):
    Image.new("L", (3, 2)).save(tmp_path / "grey.png")
    assert load_image(tmp_path / "grey.png").mode == "RGB"
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    cases = [("none.jpg", r"none\.jpg does not exist"), ("broken.jpg", r"broken\.jpg cannot be decoded")]
    for name, message in cases:
        with pytest.raises(ValueError, match=message):
            load_image(tmp_path / name)


def test_orientation_is_applied_only_when_asked(tmp_path):
    image = Image.new("RGB", (4, 2))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (4, 2)
    with Image.open(tmp_path / "turned.jpg") as turned:
        assert upright(turned).size == (2, 4)


def test_box_iou():
    assert box_iou((0, 0, 4, 4), (0, 0, 4, 2)) == 0.5
    assert (
        box_iou((0, 0, 1, 1), (1, 0, 2, 1)) == box_iou(None, (0, 0, 1, 1)) == box_iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0
    )


def test_images_of_every_depth(tmp_path):
    """16-bit greyscale is scaled, not clipped to white; other modes become RGB."""
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    path = tmp_path / "deep.png"
    Image.fromarray(ramp).save(path)
    loaded = np.asarray(load_image(path))
    assert loaded.shape == (16, 16, 3) and np.abs(loaded[..., 0].ravel().astype(int) - np.arange(256)).max() <= 1
    for mode in ("L", "P", "1", "RGBA", "CMYK"):
        assert load_image(Image.new(mode, (4, 3))).mode == "RGB"


def test_what_is_no_image(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="must be a path or a PIL image, got ndarray; wrap an array"):
        load_image(np.zeros((4, 4, 3), np.uint8))
    path = tmp_path / "large.png"
    Image.new("L", (400, 400)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="too large to be opened safely"):
        load_image(path)
