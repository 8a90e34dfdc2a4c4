"""Depth of solid scenes against the closed form of the ground plane and of a sphere."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mmseg_llm.data.synthetic import make_scene
from mmseg_llm.data.synthetic.camera import Viewpoint
from mmseg_llm.data.synthetic.solid import MAX_DEPTH, SolidObject, cast


def _points(depth: np.ndarray, camera: object) -> np.ndarray:
    """Camera-frame points `(H, W, 3)` of a planar depth map, from nothing but the intrinsics."""
    ys, xs = np.mgrid[: depth.shape[0], : depth.shape[1]]
    return np.stack(((xs - camera.cx) / camera.fx * depth, (ys - camera.cy) / camera.fy * depth, depth), -1)


def _solid(shape: str, **changes: float) -> SolidObject:
    values = {"x": 0.2, "y": 4.0, "radius": 0.5, "height": 1.0, "yaw": 0.3, **changes}
    return SolidObject(shape, "red", "", "plain", rgb=(200.0, 30.0, 30.0), **values)


@pytest.mark.parametrize("level", ["solid-128", "solid-224"])
def test_ground_is_one_horizontal_plane(level: str) -> None:
    for index in range(5):
        scene = make_scene(level, 6, index)
        assert scene.depth.dtype == np.float32 and scene.depth.max() <= MAX_DEPTH
        is_ground = (scene.instances == 0) & (scene.depth > 0)
        ground = _points(scene.depth.astype(np.float64), scene.camera)[is_ground]
        # n . p = 1 for all ground points, without sideways tilt for there is no roll; 1 / |n| is the camera's height.
        plane = np.linalg.lstsq(ground, np.ones(len(ground)), rcond=None)[0]
        assert np.abs(ground @ plane - 1).max() < 1e-4
        assert abs(plane[0]) < 1e-5 and 1.6 < 1 / np.linalg.norm(plane) < 2.7


def test_objects_stand_before_the_ground_and_nothing_is_unlabelled() -> None:
    scene = make_scene("solid-128", 6, 1)
    for mask, thing in zip(scene.masks, scene.facts.things, strict=True):
        assert scene.depth[mask].min() == pytest.approx(thing.distance)
        assert (scene.depth[mask] > 0).all()


def test_sphere_depth_and_outline_follow_the_closed_form() -> None:
    view = Viewpoint(height=2.0, tilt=0.4, focal=140.0, size=128)
    sphere = _solid("sphere")
    buffers = cast(view, [sphere])
    mask = buffers.owner == 0
    forward, down = sphere.y, view.height - sphere.radius
    cos, sin = math.cos(view.tilt), math.sin(view.tilt)
    centre = np.asarray([sphere.x, down * cos - forward * sin, forward * cos + down * sin])
    points = _points(buffers.depth, view.camera)
    assert np.abs(np.linalg.norm(points[mask] - centre, axis=1) - sphere.radius).max() < 1e-9
    rays = _points(np.ones_like(buffers.depth), view.camera)
    off_axis = np.linalg.norm(np.cross(rays, centre), axis=-1) / np.linalg.norm(rays, axis=-1)
    assert np.array_equal(off_axis < sphere.radius, mask)


@pytest.mark.parametrize("shape", ["sphere", "cube", "cylinder", "cone", "pyramid"])
def test_nearer_object_hides_the_farther_whatever_the_order(shape: str) -> None:
    view = Viewpoint(height=1.8, tilt=0.3, focal=120.0, size=96)
    near, far = _solid(shape), _solid("cube", y=5.5)
    one, other = cast(view, [near, far]), cast(view, [far, near])
    assert np.array_equal(one.depth, other.depth)
    assert np.array_equal(one.owner == 0, other.owner == 1)
    alone = cast(view, [near])
    assert np.array_equal(one.owner == 0, alone.owner == 0)
    assert np.count_nonzero(alone.owner == 0) == alone.whole[0] > 100
    assert np.count_nonzero(one.owner == 1) < one.whole[1]


@pytest.mark.parametrize("shape", ["cube", "cylinder", "cone", "pyramid"])
def test_surface_points_lie_on_the_primitive(shape: str) -> None:
    view = Viewpoint(height=2.2, tilt=0.4, focal=140.0, size=128)
    thing = _solid(shape)
    buffers = cast(view, [thing])
    rows, columns = np.nonzero(buffers.owner == 0)
    dx, dy, dz = view.rays
    t = buffers.depth[rows, columns]
    x, y = dx[0, columns] * t - thing.x, dy[rows, 0] * t - thing.y
    z = dz[rows, 0] * t + view.height
    cos, sin = math.cos(thing.yaw), math.sin(thing.yaw)
    u, v = x * cos + y * sin, y * cos - x * sin
    across = np.hypot(u, v) if shape in ("cylinder", "cone") else np.maximum(abs(u), abs(v))
    if shape in ("cube", "cylinder"):  # on the side or on the lid
        gap = np.minimum(abs(across - thing.radius), abs(z - thing.height))
    else:
        gap = abs(across - thing.radius * (1 - z / thing.height))
    assert gap.max() < 1e-9 and z.min() > -1e-9 and across.max() < thing.radius + 1e-9
