import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from slanted import pinhole_rays
from toy_curator import CAMERA, LENS

from mmseg_llm.data.depth.curation.lidar import camera_from_lidar, inverse, move, project, rigid, visible_points

# motions


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31))
def test_quaternions_turn_as_scipy_says(seed):
    w, x, y, z = np.random.default_rng(seed).normal(size=4)
    motion = rigid([w, x, y, z], [1, 2, 3])
    np.testing.assert_allclose(motion[:3, :3], Rotation.from_quat([x, y, z, w]).as_matrix(), atol=1e-12)
    np.testing.assert_allclose(inverse(motion) @ motion, np.eye(4), atol=1e-12)
    np.testing.assert_allclose(move(motion, [[0, 0, 0]]), [[1, 2, 3]])


def test_a_quaternion_of_length_zero_is_refused():
    with pytest.raises(ValueError, match=r"quaternion \[0, 0, 0, 0\] is no rotation"):
        rigid([0, 0, 0, 0], [0, 0, 0])


def test_driving_between_sweep_and_image_moves_the_points():
    """The vehicle drives 2 m ahead and turns left by 90 degrees; a point 10 m ahead is then 8 m to its right."""
    turned = rigid([np.sqrt(0.5), 0, 0, np.sqrt(0.5)], [2, 0, 0])
    camera = rigid([0.5, -0.5, 0.5, -0.5], [0, 0, 1.5])  # X right, Y down, Z ahead; 1.5 m up
    point = np.array([[10.0, 0.0, 0.5]])
    seen = move(camera_from_lidar(np.eye(4), np.eye(4), turned, camera), point)
    np.testing.assert_allclose(seen, [[8.0, 1.0, 0.0]], atol=1e-12)
    still = move(camera_from_lidar(np.eye(4), np.eye(4), np.eye(4), camera), point)
    np.testing.assert_allclose(still, [[0.0, 1.0, 10.0]], atol=1e-12)


# occlusion


BEAMS = np.deg2rad(
    np.concatenate((np.arange(-25, -4, 1.5), np.arange(-4, 1.7, 0.17)))
)  # close to the horizon they are dense


def swept(distance_of, mount=(0.0, -0.3, 0.0)):
    """Pixels and depths of a 2048 x 1550 camera 1.4 m above the road, of rings of a lidar beside it; the distance follows from
    origin and directions, infinite where nothing is hit.
    """
    up, aside = (angles.ravel() for angles in np.meshgrid(BEAMS, np.deg2rad(np.arange(-30, 30, 0.2))))
    rays = np.stack((np.cos(up) * np.sin(aside), -np.sin(up), np.cos(up) * np.cos(aside)), -1)
    lengths = distance_of(np.array(mount), rays)
    points = (np.array(mount) + lengths[:, None] * rays)[np.isfinite(lengths) & (lengths < 250)]
    pixels = np.floor(1690 * points[:, :2] / points[:, 2:] + (1024.5, 775.5)).astype(int)
    is_inside = ((pixels >= 0) & (pixels < (2048, 1550))).all(-1)
    return pixels[is_inside], points[is_inside]


def test_a_flat_road_hides_nothing():
    def road(origin, rays):
        with np.errstate(divide="ignore"):
            return np.where(rays[:, 1] > 0, (1.4 - origin[1]) / rays[:, 1], np.inf)

    pixels, points = swept(road)
    is_seen = visible_points(pixels, points[:, 2], (1550, 2048))
    for nearest, farthest in ((0, 40), (40, 80), (80, 250)):
        is_asked = (points[:, 2] >= nearest) & (points[:, 2] < farthest)
        assert is_asked.sum() > 500 and is_seen[is_asked].mean() > 0.99


def test_a_panel_hides_the_wall_behind_it():
    """The lidar is mounted 1 m beside the camera and sees the wall at 30 m past a panel at 10 m that hides it from the camera."""

    def scene(origin, rays):
        near, far = 10 / rays[:, 2], 30 / rays[:, 2]
        x, y = (origin + near[:, None] * rays)[:, :2].T
        return np.where((np.abs(x) < 1.5) & (np.abs(y) < 1.0), near, far)

    pixels, points = swept(scene, (1.0, -0.3, 0.0))
    is_seen = visible_points(pixels, points[:, 2], (1550, 2048))
    at_panel = points / points[:, 2:] * 10
    is_wall = points[:, 2] > 20
    is_covered = ((at_panel[:, :2] > (-1.45, -0.5)) & (at_panel[:, :2] < (1.45, 0.35))).all(-1)  # by dense beams
    is_free = (np.abs(at_panel[:, :2]) > (1.6, 1.1)).any(-1)
    assert (is_wall & is_covered).sum() > 300 and is_seen[is_wall & is_covered].mean() < 0.1
    assert is_seen[is_wall & is_free].all() and is_seen[~is_wall].all()


def test_what_hides_a_point_is_both_above_and_below_it():
    pixels = np.array([[20, 20], [20, 17], [22, 22], [40, 20], [20, 20]])
    depth = np.array([9.0, 5.0, 5.0, 9.0, 9.5])
    assert visible_points(pixels, depth, (48, 64), 3).tolist() == [False, True, True, True, False]
    assert visible_points(pixels, depth, (48, 64), 3, tolerance=0.5).tolist() == [True, True, True, True, False]
    assert visible_points(pixels, depth, (48, 64), 2).tolist() == [True, True, True, True, False]
    for kept in ([0, 1, 3, 4], [0, 2, 3, 4]):  # nearer on one side only
        assert visible_points(pixels[kept], depth[kept], (48, 64), 3).tolist() == [True, True, True, False]
    corners = np.array([[0, 0], [63, 47], [0, 47], [63, 0]])
    assert visible_points(corners, np.ones(4), (48, 64)).all()


def test_projected_points_are_one_per_pixel_in_the_image_and_in_front():
    rays = pinhole_rays(np.array([[20, 20], [20, 20], [63, 47], [64, 20], [20.4, 30.4]]), *LENS)
    points = np.concatenate((rays * [[4], [7], [5], [5], [6]], -rays))
    pixels, metres = project(points, CAMERA, (48, 64), "planar", radius=0)
    assert sorted(map(tuple, pixels.tolist())) == [(20, 20), (20, 30), (63, 47)]
    assert sorted(metres) == [4, 5, 6]
    _, along = project(points[:1], CAMERA, (48, 64), "ray")
    assert along == pytest.approx(4 * np.linalg.norm(rays[0]))
