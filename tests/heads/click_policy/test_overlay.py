"""What a click policy sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmseg_llm.heads.click_policy.overlay import COLOURS, Overlay


def make_image(seed: int = 0, height: int = 37, width: int = 53) -> tuple[Image.Image, np.ndarray]:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values), rng.random((height, width)) < 0.4


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_every_pixel(colour: str, alpha: float):
    image, mask = make_image()
    shown, values = np.asarray(Overlay(colour, alpha)(image, mask)), np.asarray(image)
    for row, col in np.ndindex(mask.shape):
        expected = values[row, col]
        if mask[row, col]:
            expected = [int((1 - alpha) * float(v) + alpha * c) for v, c in zip(values[row, col], COLOURS[colour])]
        assert list(shown[row, col]) == list(expected)


def test_halves_are_cut_off():
    image = Image.new("RGB", (1, 1), (101, 101, 101))
    assert Overlay()(image, np.ones((1, 1), bool)).getpixel((0, 0)) == (50, 178, 50)


def test_an_empty_mask_shows_the_image_and_nothing_is_written_to_it():
    image, mask = make_image()
    before = np.array(image)
    assert np.array_equal(np.asarray(Overlay()(image, np.zeros_like(mask))), before)
    Overlay()(image, mask)
    assert np.array_equal(np.asarray(image), before)


def test_jpeg_is_what_a_file_gives(tmp_path: Path):
    image, mask = make_image()
    plain = Overlay()(image, mask)
    plain.save(tmp_path / "observation.jpg")
    expected = np.asarray(Image.open(tmp_path / "observation.jpg").convert("RGB"))
    shown = np.asarray(Overlay(jpeg_roundtrip=True)(image, mask))
    assert np.array_equal(shown, expected)
    assert not np.array_equal(shown, np.asarray(plain))


def test_other_modes_and_masks_of_integers():
    image, mask = make_image()
    grey = image.convert("L")
    expected = Overlay()(grey.convert("RGB"), mask)
    assert np.array_equal(np.asarray(Overlay()(grey, mask.astype(np.uint8))), np.asarray(expected))


def test_errors():
    image, mask = make_image()
    with pytest.raises(ValueError, match="colour is 'pink'; choose from green"):
        Overlay("pink")
    with pytest.raises(ValueError, match=r"alpha is 1\.5"):
        Overlay(alpha=1.5)
    with pytest.raises(ValueError, match="does not fit an image of size"):
        Overlay()(image, mask[1:])
