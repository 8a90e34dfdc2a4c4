"""Depth maps of a slanted plane, whose every value is known: on the grid, of every pixel, as files and as pictures."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from depth_fakes import CAMERA, SIZE, PlaneWorld, noise
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFont

from mmseg_llm.cameras import Camera
from mmseg_llm.inference import depth_pictures
from mmseg_llm.inference.depth_maps import DepthMap, grid_points, to_millimetres, within
from mmseg_llm.inference.depth_pictures import NO_ANSWER, Scale
from mmseg_llm.inference.perceiver import Perceiver

SLANTED = (0.12, 0.2, 0.3)
GRID = (12, 16)


def depth_map(world, image=None, **options):
    return Perceiver(world).depth_map(image or noise(), CAMERA, **{"grid": GRID} | options)


def pixels(size=SIZE):
    return np.stack(np.meshgrid(np.arange(size[1]), np.arange(size[0])), -1).astype(float)


@pytest.mark.parametrize("distance", ["ray", "planar"])
def test_grid_and_both_conventions(distance):
    world = PlaneWorld(distance, SLANTED)
    depth = depth_map(world)
    assert world.calls == [("depth_text", "generate", [12 * 16])]
    assert depth.distance == distance and depth.metres.dtype == np.float32 and depth.failures == {}
    assert depth.points[0, 0].tolist() == [3.5, 3.5] and depth.points[-1, -1].tolist() == [123.5, 91.5]
    assert depth.as_planar().metres == pytest.approx(world.planar(CAMERA, depth.points), rel=1e-6)
    assert depth.as_ray().metres == pytest.approx(world.ray(CAMERA, depth.points), rel=1e-6)
    assert depth.as_ray().as_planar().distance == "planar"
    assert (depth.as_ray().metres >= depth.as_planar().metres).all()


def test_answers_missing_are_nan_and_counted():
    depth = depth_map(PlaneWorld(fails=lambda x, y: "no_number" if x < 8 else "no_unit" if y < 8 else None))
    assert depth.failures == {"no_unit": 15, "no_number": 12}
    assert np.isnan(depth.metres[:, 0]).all() and (~depth.is_valid).sum() == 27
    assert len(depth.answers) == 192 and depth.answers[0].text == "somewhere"


@settings(max_examples=30, deadline=None)
@given(st.tuples(st.integers(1, 40), st.integers(1, 40)), st.tuples(st.integers(1, 30), st.integers(1, 30)))
def test_cells_tile_the_image(size, grid):
    points = grid_points(size, grid)
    rows, columns = min(grid[0], size[0]), min(grid[1], size[1])
    assert points.shape == (rows, columns, 2)
    assert points.mean(axis=(0, 1)) == pytest.approx([(size[1] - 1) / 2, (size[0] - 1) / 2])
    assert points[0, 0] == pytest.approx([size[1] / columns / 2 - 0.5, size[0] / rows / 2 - 0.5])


def test_a_grid_has_cells():
    with pytest.raises(ValueError, match=r"0x3 has no cells"):
        grid_points(SIZE, (0, 3))


@pytest.mark.parametrize("distance", ["ray", "planar"])
@pytest.mark.parametrize("slope", [(0.0, 0.0, 0.25), SLANTED, (-0.1, 0.3, 0.35)])
def test_planes_stay_planes_whatever_their_texture(distance, slope):
    world = PlaneWorld(distance, slope)
    dense = depth_map(world).resized()
    truth = (world.ray if distance == "ray" else world.planar)(CAMERA, pixels())
    assert dense.metres.shape == SIZE and dense.distance == distance and dense.is_valid.all()
    assert np.abs(dense.metres / truth - 1).max() < 5e-3
    assert np.array_equal(dense.points, pixels())


def test_edges_follow_the_image_and_nothing_floats_between():
    """Two walls at 2 m and 6 m whose edge, by its colour, is within a cell."""
    colours = np.full((*SIZE, 3), 200, np.uint8)
    colours[:, 69:] = (40, 60, 90)
    points = grid_points(SIZE, GRID)
    metres = np.where(points[..., 0] < 69, 2.0, 6.0).astype(np.float32)
    dense = DepthMap(metres, points, SIZE, CAMERA, "planar").resized(Image.fromarray(colours)).metres
    assert dense[:, :69] == pytest.approx(2, rel=0.02) and dense[:, 69:] == pytest.approx(6, rel=0.02)
    blocks = np.kron(metres, np.ones((8, 8)))
    assert (np.abs(blocks - np.where(pixels()[..., 0] < 69, 2, 6)) > 1).any()  # plain enlargement errs here


def test_small_gaps_are_filled_and_large_ones_stay():
    world = PlaneWorld("planar", SLANTED, lambda x, y: "no_number" if 40 <= x < 80 and 32 <= y < 72 else None)
    dense = depth_map(world).resized()
    truth, known = world.planar(CAMERA, pixels()), dense.is_valid
    assert np.isnan(dense.metres[48:56, 56:64]).all()  # more than a cell from any answer
    assert known[30:34].all() and known[:, 38:42].all() and 0 < (~known).sum() < 40 * 40
    assert np.abs(dense.metres / truth - 1)[known].max() < 0.02
    lonely = depth_map(PlaneWorld("planar", SLANTED, lambda x, y: "no_unit" if (x, y) == (59.5, 43.5) else None))
    assert lonely.failures == {"no_unit": 1} and lonely.resized().is_valid.all()


def test_nothing_known_gives_nothing():
    depth = depth_map(PlaneWorld(fails=lambda x, y: "no_number"))
    assert not depth.resized().is_valid.any()
    assert depth.picture().size[0] == depth.overlay().size[0]


def test_an_interpolated_map_says_so_and_keeps_its_answers():
    depth = depth_map(PlaneWorld("ray", SLANTED, lambda x, y: "no_number" if x < 8 else None))
    dense = depth.resized()
    assert dense.source == "interpolated from 180 answers (12x16)" and depth.source == "" and depth.grid is None
    assert dense.grid.metres == pytest.approx(depth.metres, rel=1e-6, nan_ok=True) and dense.grid.distance == "ray"
    planar = dense.as_planar()
    assert planar.grid.metres == pytest.approx(depth.as_planar().metres, rel=1e-6, nan_ok=True)


@settings(max_examples=60, deadline=None)
@given(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), st.integers(1, 4_000_000))
def test_maps_have_at_most_so_many_pixels(size, most):
    rows, columns = within(size, most)
    assert 1 <= rows <= size[0] and 1 <= columns <= size[1] and rows * columns <= most
    if size[0] * size[1] <= most:
        assert (rows, columns) == size


def test_maps_of_large_images_are_smaller_and_as_true():
    world = PlaneWorld("ray", SLANTED)
    dense = depth_map(world).resized(max_pixels=3072)
    assert dense.metres.shape == (48, 64) and dense.size == SIZE and dense.points[0, 0].tolist() == [0.5, 0.5]
    assert dense.metres == pytest.approx(world.ray(CAMERA, dense.points), rel=5e-3)
    ray = dense.pixel_camera.rays(np.array([10.0, 20.0]))
    assert ray == pytest.approx(CAMERA.rays(dense.points[20, 10]))  # the same place in its own pixels
    with pytest.raises(ValueError, match="max_pixels is 0"):
        depth_map(world).resized(max_pixels=0)


def test_places_that_the_camera_cannot_see_are_no_answers():
    """A distortion that folds over: no ray is seen in the corners."""
    camera = replace(CAMERA, distortion=(-0.9, 0.0, 0.0, 0.0))
    depth = replace(depth_map(PlaneWorld("ray")), camera=camera)
    planar, has_ray = depth.as_planar(), np.isfinite(camera.rays(depth.points)).all(-1)
    assert 0 < has_ray.sum() < has_ray.size and np.array_equal(planar.is_valid, has_ray)
    assert planar.failures == {"bad_camera": int((~has_ray).sum())}
    dense = depth.resized()
    assert dense.failures == planar.failures and not dense.is_valid.all()


def test_captions_are_whole(monkeypatch):
    """A narrow picture has more lines, not shorter ones."""
    drawn = []
    monkeypatch.setattr(depth_pictures.ImageDraw.ImageDraw, "text", lambda self, xy, text, *a, **k: drawn.append(text))
    narrow = depth_map(PlaneWorld(), Image.new("RGB", (100, 400))).picture()
    said = " ".join(drawn)
    assert "give a camera" not in said and "..." not in said and "px (" in said and "metres along the ray" in said
    assumed = Perceiver(PlaneWorld()).depth_map(noise(), grid=(4, 4))
    drawn.clear()
    wide = assumed.picture()
    assert "give a camera or a field of view" in " ".join(drawn) and not any("..." in text for text in drawn)
    font = ImageFont.load_default(max(13, round(wide.width / 56)))
    assert all(font.getlength(text) <= wide.width for text in drawn) and narrow.height > 400


def test_pictures_of_large_images_are_smaller(monkeypatch):
    monkeypatch.setattr(depth_pictures, "MAX_PIXELS", 3072)
    depth = depth_map(PlaneWorld(), image=noise((480, 640)))
    size = depth.picture().size
    assert size[0] == 448 and size[1] > 336  # 48x64, enlarged seven times
    assert depth.overlay().size == size


def test_maps_of_other_images_are_refused():
    depth = depth_map(PlaneWorld())
    with pytest.raises(ValueError, match=r"image is 20x30 .* map is of one of 96x128"):
        depth.resized(noise((20, 30)))
    with pytest.raises(ValueError, match="carries no image"):
        replace(depth, image=None).resized()


def test_kinds_of_metres_are_never_guessed():
    unsaid = depth_map(PlaneWorld("unspecified"))
    assert unsaid.distance == "unspecified" and unsaid.resized().distance == "unspecified"
    with pytest.raises(ValueError, match="unspecified kind cannot become planar"):
        unsaid.as_planar()
    assert depth_map(PlaneWorld("unspecified"), distance="planar").distance == "planar"
    assert depth_map(PlaneWorld("planar"), distance="planar").distance == "planar"
    with pytest.raises(ValueError, match="the head answers ray metres"):
        depth_map(PlaneWorld("ray"), distance="planar")


def test_files(tmp_path):
    depth = depth_map(PlaneWorld("ray", SLANTED, lambda x, y: "no_number" if x < 8 else None))
    with Image.open(depth.save(tmp_path / "new" / "a.png")) as image:
        millimetres = np.asarray(image)
        text = image.text
    assert text["distance"] == "ray" and Camera.from_json(json.loads(text["camera"])) == depth.pixel_camera
    assert "source" not in text and millimetres.dtype == np.uint16 and (millimetres[:, 0] == 0).all()
    assert np.abs(millimetres[:, 1:] / 1000 - depth.metres[:, 1:]).max() <= 5.01e-4
    content = np.load(depth.save(tmp_path / "a.npz"), allow_pickle=False)
    assert np.array_equal(content["metres"], depth.metres, equal_nan=True)
    about = json.loads(str(content["about"]))
    assert about == {"camera": CAMERA.to_json(), "distance": "ray", "failures": {"no_number": 12}}
    assert np.array_equal(content["points"], depth.points) and content["size"].tolist() == list(SIZE)
    dense = depth.resized()
    with np.load(dense.save(tmp_path / "dense.npz")) as content:
        assert np.array_equal(content["metres"], dense.metres, equal_nan=True)
        assert content["grid_metres"] == pytest.approx(depth.metres, rel=1e-6, nan_ok=True)
        assert np.array_equal(content["grid_points"], depth.points)
        assert json.loads(str(content["about"]))["source"] == dense.source
    with Image.open(depth.save(tmp_path / "a.jpg")) as picture:
        assert picture.size == depth.picture().size
    with pytest.raises(ValueError, match=r"'.tiff'; use .png"):
        depth.save(tmp_path / "a.tiff")


def test_what_millimetres_cannot_hold_is_said(tmp_path):
    values, num_beyond = to_millimetres(np.array([65.535, 65.536, np.nan, 0.0004, 80.0]))
    assert values.tolist() == [65535, 0, 0, 0, 0] and num_beyond == 2
    depth = depth_map(PlaneWorld("planar", (0.0, 0.0, 0.01)))
    with pytest.raises(ValueError, match=r"192 of 192 values are beyond 65\.535 m"):
        depth.save(tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_pictures_show_near_warm_far_cold_and_gaps_grey():
    depth = depth_map(PlaneWorld("planar", (0.3, 0.0, 0.3), lambda x, y: "no_number" if y > 88 else None))
    picture = np.asarray(depth.picture()).astype(int)  # enlarged four times
    far, near = picture[20, 2], picture[20, -3]
    assert near[0] > near[2] + 100 and far[2] > far[0] + 50
    assert (picture[4 * 94, 100] == NO_ANSWER).all() and len(picture) > 4 * 96
    over = np.asarray(depth.overlay(alpha=0.5)).astype(int)
    image = np.asarray(depth.image.resize((512, 384), Image.Resampling.BICUBIC)).astype(int)
    assert np.array_equal(over[4 * 89 : 4 * 96, :512], image[4 * 89 : 4 * 96])
    assert not np.array_equal(over[:300, :512], image[:300])
    with pytest.raises(ValueError, match="alpha is 2"):
        depth.overlay(alpha=2)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.05, 500), min_size=1, max_size=30))
def test_scales_are_ordered_and_their_ticks_within(metres):
    scale = Scale.of(np.array([*metres, np.nan]))
    places = scale.place(np.sort(metres))
    assert (np.diff(places) >= 0).all() and places[0] >= 0 and places[-1] <= 1
    assert scale.low < scale.high and all(scale.low <= tick <= scale.high for tick in scale.ticks())
    assert (scale.colours(np.array([np.nan])) == NO_ANSWER).all()


@pytest.mark.parametrize("reference", ["text", "marker"])
def test_the_head_itself(reference):
    """An untrained model of the library, with arrows that cannot be drawn at the border."""
    from mmseg_llm.backbones import InternVLBackbone
    from mmseg_llm.heads import DepthTextHead, MaskDecoderHead
    from mmseg_llm.model import PerceptionModel

    head = DepthTextHead(reference=reference, focal=50, max_new_tokens=96, distance="planar")
    heads = {"mask_decoder": MaskDecoderHead(heads=4, max_new_tokens=8), "depth_text": head}
    perceiver = Perceiver(PerceptionModel(InternVLBackbone("internvl-tiny"), heads))
    depth = perceiver.depth_map(noise(), CAMERA, grid=(12, 2))
    assert depth.distance == "planar" and len(depth.answers) == 24
    assert (~depth.is_valid).sum() == sum(depth.failures.values())
    moved = [answer.measurement.is_snapped for answer in depth.answers]
    assert any(moved) == (reference == "marker") and not all(moved)
    cells = grid_points(SIZE, (12, 2))
    assert np.array_equal((depth.points == cells).all(-1).ravel(), ~np.array(moved))
    assert np.abs(depth.points - cells).max() < 12
    (thing,) = perceiver.measure(noise(), "the box", CAMERA, masks=[np.ones(SIZE, bool)], points_per_object=4)
    assert thing.num_answered + sum(thing.failures.values()) == 4
