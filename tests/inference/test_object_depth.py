"""Objects on planes: distance, size and place by the formulas, and a reason wherever there are none."""

from __future__ import annotations

import json

import numpy as np
import pytest
from depth_fakes import CAMERA, SIZE, PlaneWorld, box_mask, noise
from hypothesis import given, settings
from hypothesis import strategies as st

from mmseg_llm.cameras import Camera
from mmseg_llm.inference.object_depth import draw_objects, points_inside
from mmseg_llm.inference.perceiver import Perceiver
from mmseg_llm.structures import Mask, Prediction

CUBE, BALL = box_mask(20, 60, 70, 120), box_mask(10, 30, 5, 35)
MASKS = {"the cube": CUBE, "the ball": BALL}


def measure(world, texts=("the cube", "the ball"), **options):
    return Perceiver(world).measure(noise(), list(texts), CAMERA, **options)


@pytest.mark.parametrize("distance", ["ray", "planar"])
def test_a_wall_is_as_wide_as_its_box(distance):
    """On a wall at 4 m every number has a closed form, but for the scatter of the points along the ray."""
    world = PlaneWorld(distance, masks=MASKS)
    cube, ball = measure(world)
    assert world.calls == [
        ("mask_decoder", "generate", [2]),
        ("depth_text", "generate", [64]),
    ]  # one call for all objects
    assert (cube.extent.width, cube.extent.height) == pytest.approx((50 / 100 * 4, 40 / 110 * 4))
    assert cube.extent.depth == pytest.approx(0, abs=1e-9) and cube.planar.median == pytest.approx(4)
    assert (ball.extent.width, ball.extent.height) == pytest.approx((30 / 100 * 4, 20 / 110 * 4))
    rays = [world.ray(CAMERA, np.array(item.measurement.points[0])) for item in cube.answers]
    assert cube.distance == cube.ray.median == pytest.approx(np.median(rays))
    assert (cube.ray.nearest, cube.ray.farthest) == pytest.approx(tuple(np.percentile(rays, (5, 95))))
    assert cube.measured == distance and cube.raw == (cube.ray if distance == "ray" else cube.planar)
    middle = (94.5 - 61) / 100 * 4, (39.5 - 40) / 110 * 4
    assert cube.centroid == pytest.approx((*middle, 4), abs=0.3)
    assert (cube.expression, cube.num_answered, cube.reason) == ("the cube", 32, "")


def test_slanted_objects_have_depth():
    slope = (0.5, 0.0, 0.3)
    (cube,) = measure(PlaneWorld("planar", slope, masks=MASKS), ["the cube"])
    z = 1 / (0.5 * (np.array([70, 119]) - CAMERA.cx) / CAMERA.fx + 0.3)  # at its left and right edge
    assert z[1] < cube.planar.nearest < cube.planar.median < cube.planar.farthest < z[0]
    assert cube.extent.depth == pytest.approx(cube.planar.farthest - cube.planar.nearest)
    assert 0.5 * (z[0] - z[1]) < cube.extent.depth < z[0] - z[1]
    assert np.dot(cube.centroid, (0.5, 0, 0.3)) == pytest.approx(1, abs=0.02)


def test_border_pixels_do_not_count():
    """Masks are wrong at their border; here it belongs to what is behind."""
    world = PlaneWorld("planar", masks=MASKS)
    inner = box_mask(22, 58, 72, 118)
    truth = world.planar
    world.planar = lambda camera, point: truth(camera, point) if inner[int(point[1]), int(point[0])] else 40.0
    (cube,) = measure(world, ["the cube"], points_per_object=500)
    assert cube.planar.farthest == pytest.approx(4) and cube.num_answered == 500


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 90),
    st.integers(0, 120),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 64),
    st.integers(0, 9),
)
def test_points_are_inside_once_and_repeatable(top, left, height, width, count, seed):
    mask = Mask.from_array(box_mask(top, top + height, left, left + width))
    points = points_inside(mask, count, np.random.default_rng(seed))
    assert mask.array[points[:, 1], points[:, 0]].all()
    assert 1 <= len(points) <= count and len(np.unique(points, axis=0)) == len(points)
    assert np.array_equal(points, points_inside(mask, count, np.random.default_rng(seed)))


def test_thin_masks_are_asked_too():
    line = Mask.from_array(box_mask(40, 41, 10, 90))
    assert len(points_inside(line, 32, np.random.default_rng(0))) == 32


def test_the_seed_chooses_the_points_and_other_objects_do_not():
    def points(thing):
        return [item.measurement.points for item in thing.answers]

    world = PlaneWorld(masks=MASKS)
    (alone,), (first, _) = measure(world, ["the cube"]), measure(world)
    assert points(alone) == points(first)
    assert points(measure(world, ["the cube"], seed=1)[0]) != points(alone)


def test_what_has_no_distance_has_a_reason():
    world = PlaneWorld(masks=MASKS | {"dust": np.zeros(SIZE, bool)}, fails=lambda x, y: "no_number" if x < 60 else None)
    sofa, dust, ball, cube = found = measure(world, ["the sofa", "dust", "the ball", "the cube"])
    assert [thing.reason for thing in found] == ["no_target", "empty_mask", "no_depth", ""]
    assert [thing.distance for thing in found[:3]] == [None] * 3 and ball.failures == {"no_number": 32}
    assert [thing.label() for thing in found[:3]] == ["no target", "empty mask", "no depth"]
    assert sofa.extent is None and dust.centroid is None and sofa.num_answered == ball.num_answered == 0
    assert cube.distance is not None and cube.mask.query == "the cube"


def test_nothing_found_asks_nothing():
    world = PlaneWorld()
    assert [thing.reason for thing in measure(world, ["a", "b"])] == ["no_target"] * 2
    assert [head for head, *_ in world.calls] == ["mask_decoder"]


def test_failures_among_answers_are_counted():
    (cube,) = measure(PlaneWorld(masks=MASKS, fails=lambda x, y: "no_unit" if y < 40 else None), ["the cube"])
    assert 0 < cube.failures["no_unit"] < 32 and cube.num_answered == 32 - cube.failures["no_unit"]
    assert cube.planar.median == pytest.approx(4)


def test_given_masks_of_any_kind():
    world = PlaneWorld(masks=MASKS)
    perceiver = Perceiver(world)
    others = perceiver.predict(noise(), ["the cube"])
    found = perceiver.measure(noise(), camera=CAMERA, masks=[CUBE, Mask.from_array(CUBE), others[0]])
    assert [thing.expression for thing in found] == ["object 0", "object 1", "the cube"]
    assert [thing.extent.width for thing in found] == pytest.approx([2.0] * 3)
    named = perceiver.measure(noise(), "crate", CAMERA, masks=[CUBE])
    assert [thing.mask.query for thing in named] == ["crate"]
    assert [head for head, *_ in world.calls] == [None, "depth_text", "depth_text"]


@pytest.mark.parametrize("kind", [bool, np.uint8, np.int64, np.float32])
def test_masks_of_0_and_1_are_masks(kind):
    (thing,) = Perceiver(PlaneWorld()).measure(noise(), camera=CAMERA, masks=[CUBE.astype(kind)])
    assert thing.mask.mask == Mask.from_array(CUBE)


def test_answers_about_depth_are_no_masks():
    perceiver = Perceiver(PlaneWorld())
    with pytest.raises(ValueError, match="mask 0 is an answer about depth"):
        perceiver.measure(noise(), camera=CAMERA, masks=perceiver.predict(noise(), points=[(3, 3)]))


def test_points_without_a_ray_are_counted_and_do_not_spoil_the_others():
    camera = Camera(60.0, 60.0, 61.0, 40.0, distortion=(-0.5, 0.0, 0.0, 0.0))
    perceiver = Perceiver(PlaneWorld("planar"))
    thing, corner = perceiver.measure(noise(), camera=camera, masks=[np.ones(SIZE, bool), box_mask(86, 96, 116, 128)])
    assert 0 < thing.failures["bad_camera"] < 32 and thing.num_answered == 32 - thing.failures["bad_camera"]
    assert np.isfinite([thing.distance, thing.ray.farthest, *thing.centroid]).all() and thing.extent is None
    assert corner.reason == "no_depth" and corner.failures == {"bad_camera": 32}


def test_metres_nobody_knows_the_kind_of():
    (cube,) = measure(PlaneWorld("unspecified", masks=MASKS), ["the cube"])
    assert cube.distance == cube.raw.median == pytest.approx(4) and cube.label() == "4.00 m"
    assert (cube.planar, cube.ray, cube.extent, cube.centroid) == (None,) * 4
    (said,) = measure(PlaneWorld("unspecified", masks=MASKS), ["the cube"], distance="planar")
    assert said.planar.median == pytest.approx(4) and said.extent is not None


def test_json_and_picture():
    found = measure(PlaneWorld("planar", masks=MASKS), ["the cube", "the sofa"])
    cube, sofa = json.loads(json.dumps([thing.to_json() for thing in found]))
    assert cube["extent"]["width"] == pytest.approx(2) and cube["planar"]["median"] == pytest.approx(4)
    assert len(cube["points"]) == 32 and cube["points"][0]["metres"] == pytest.approx(4) and cube["camera"]["fx"] == 100
    assert Prediction.from_json(cube["mask"]).mask.array.sum() == CUBE.sum()
    assert sofa["distance"] is None and sofa["reason"] == "no_target" and sofa["extent"] is None
    assert found[0].label() == f"{found[0].distance:.2f} m, 2.00 x 1.45 m"
    picture = np.asarray(draw_objects(noise(), found))
    plain = np.asarray(draw_objects(noise(), found[1:]))
    assert len(picture) > len(plain) > 96 and not np.array_equal(picture[: 96 * 4], plain[: 96 * 4])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to measure"),
        ({"expressions": []}, "nothing to measure"),
        ({"expressions": ["a"], "masks": [CUBE, BALL]}, "2 masks for 1 expressions"),
        ({"masks": [np.ones((5, 5), bool)]}, r"mask of 'object 0' is 5x5 but its image is 96x128"),
        ({"masks": [CUBE * 0.7]}, r"a mask holds values from 0 to 0\.7; give bool, or 0 and 1, such as mask > 0\.5"),
        ({"masks": [CUBE * np.uint8(255)]}, "values from 0 to 255"),
        ({"masks": [np.where(CUBE, np.nan, 0)]}, "a mask holds values"),
        ({"masks": [CUBE], "points_per_object": 0}, "points_per_object is 0"),
        ({"masks": [CUBE], "depth_head": "mask_decoder"}, "none that measures depth"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Perceiver(PlaneWorld()).measure(noise(), camera=CAMERA, **options)


def test_models_that_lack_a_head_say_which():
    world = PlaneWorld()
    del world.heads["mask_decoder"]
    with pytest.raises(ValueError, match="no head that finds objects, only depth_text; give masks"):
        measure(world)
    assert Perceiver(world).measure(noise(), camera=CAMERA, masks=[CUBE])[0].distance is not None
