"""Parity with the picture and the words of DepthLM (goldens README, "depthlm"); its answers and metrics are tested elsewhere."""

from __future__ import annotations

import random
import zlib
from pathlib import Path

import numpy as np
import pytest
from golden_files import golden_files, read_golden, z
from PIL import Image

from mmseg_llm.cameras import Camera
from mmseg_llm.heads.depth_text.marker import draw_marker, fits
from mmseg_llm.heads.depth_text.prompts import ARROWS, DepthPrompts
from mmseg_llm.heads.depth_text.references import MarkerReference
from mmseg_llm.heads.depth_text.views import View, central_crop, unify

pytestmark = [
    pytest.mark.golden,
    pytest.mark.parametrize("path", golden_files("depthlm*"), ids=lambda path: path.stem),
]


def photograph(height: int, width: int, seed: int) -> Image.Image:
    """The image of `meta["image_formula"]`."""
    y, x = np.mgrid[:height, :width]
    plain = np.stack(((255 * x) // (width - 1), (255 * y) // (height - 1), (3 * (x + 2 * y)) % 256), axis=-1)
    noise = np.rint(np.float32(20) * z("input.image", (height, width, 3), seed))
    return Image.fromarray((plain + noise).clip(0, 250).astype(np.uint8))


def checksum(image: Image.Image) -> int:
    return zlib.crc32(image.tobytes())


def test_depthlm_marker(path: Path):
    tensors, meta = read_golden(path)
    case = meta["marker"]
    image = photograph(case["height"], case["width"], meta["seed"])
    view = unify(image, Camera(*case["intrinsics"]), case["focal"], "legacy")
    plain = np.asarray(view.picture.image)
    assert np.array_equal(plain, tensors["marker.canvas"].numpy())
    assert checksum(view.picture.image) == int(tensors["marker.canvas_crc32"])
    painted = tensors["marker.painted_pixels"].numpy()
    for number, (x, y, mapped_x, mapped_y, is_drawn) in enumerate(tensors["marker.points"].tolist()):
        pixel = view.locate(np.array([x, y]))
        assert pixel.tolist() == [mapped_x, mapped_y]
        assert fits(view.inner, pixel) == bool(is_drawn)
        if not is_drawn:
            with pytest.raises(ValueError, match="cannot be drawn"):
                draw_marker(view.picture.image, (mapped_x, mapped_y))
            continue
        marked = draw_marker(view.picture.image, (mapped_x, mapped_y))
        assert checksum(marked) == int(tensors["marker.crc32"][number])
        rows, columns = np.nonzero((np.asarray(marked) != plain).any(-1))
        wanted = painted[painted[:, 0] == number][:, 1:]
        assert set(zip(columns.tolist(), rows.tolist())) == set(map(tuple, wanted.tolist()))


def test_depthlm_cameras(path: Path):
    """Canvas sizes, unified intrinsics, and where points fall, in both geometries."""
    tensors, meta = read_golden(path)
    for number, case in enumerate(meta["cameras"]):
        fx, fy, cx, cy = case["intr"]
        camera = Camera(fx or fy, fy or fx, cx, cy)  # readers repair a zero from the other one
        view = unify(Image.new("RGB", (case["W"], case["H"])), camera, case["f"], "legacy")
        assert [view.inner[1], view.inner[0]] == case["canvas"]
        (sx, sy) = view.scale
        unified = [camera.fx * sx, camera.fy * sy, cx * sx, cy * sy]
        assert unified == pytest.approx(case["unified_intrinsics"], abs=meta["tolerance"]["intrinsics"])
        rows = tensors[f"camera{number}.points"].numpy()
        found = view.locate(rows[:, :2])
        assert np.array_equal(found, rows[:, 2:4])
        assert np.array_equal(fits(view.inner, found), rows[:, 4].astype(bool))
        clean = View(view.picture, view.inner, camera, "clean", view.scale)
        assert np.array_equal(clean.locate(rows[:, :2]), rows[:, 5:7])
        assert np.abs(clean.place(rows[:, :2]) - rows[:, 5:7]).max() <= 0.5
    print(path.stem, f"{len(meta['cameras'])} cameras equal")


def test_depthlm_training_items(path: Path):
    """Centred crops and targets of the official loader, its draws in its order."""
    tensors, meta = read_golden(path)
    case = meta["train"]
    camera, points = Camera(*case["intrinsics"]), np.array(case["pixel_coords"])
    prompts = DepthPrompts()
    for row, texts in zip(tensors["train.rows"].tolist(), case["texts"], strict=True):
        seed, width, height, x, y, num_painted = row
        random.seed(seed)
        random.random()  # the data set
        crop = (int(random.uniform(700, 1200)), int(random.uniform(1000, 1400)))
        view = unify(photograph(case["height"], case["width"], meta["seed"] + 1), camera, case["focal"], "legacy")
        capped = Image.fromarray(np.asarray(view.picture.image).clip(0, 240))
        view = central_crop(view, crop)
        assert view.inner == (height, width)
        pixels = view.locate(points)
        usable = np.flatnonzero(MarkerReference().can(view, pixels))
        drawn = random.sample(range(len(points)), 1)[0]
        chosen = min(usable, key=lambda index: (abs(index - drawn), index))
        assert pixels[chosen].tolist() == [x, y]
        marked = np.asarray(draw_marker(capped.crop((0, 0, width, height)), (x, y)))
        assert ((marked == (255, 0, 0)).all(-1)).sum() == num_painted
        answer = "".join(prompts.answer("depth", [prompts.write(case["depth"][chosen])]))
        assert answer == "\n\n".join(texts)


def test_depthlm_prompts(path: Path):
    _, meta = read_golden(path)
    prompts = DepthPrompts()
    assert prompts.question("depth", ARROWS[:1], "", None) == meta["prompt"]["question"]
    for metres, texts in zip(meta["prompt"]["depths"], meta["prompt"]["targets"], strict=True):
        assert "".join(prompts.answer("depth", [prompts.write(metres)])) == "\n\n".join(texts)
