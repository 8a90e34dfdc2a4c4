import io
import json

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation
from slanted import labels, moved, open_as_configured, pinhole_rays, read

from mmseg_llm.data.depth.curation import curate
from mmseg_llm.data.depth.curation.range_image import range_image_points, rotations
from mmseg_llm.data.depth.jsonl import DepthJsonlDataset

WIDTH, HEIGHT = 200, 150
WAYMO = (100.0, 101.0, 95.0, 70.0)
DISTORTION = (-0.25, 0.06, 0.003, -0.002, -0.005)
ROWS, COLUMNS = 40, 900


def distorted(rays):
    """OpenCV's model, written out."""
    k1, k2, p1, p2, k3 = DISTORTION
    x, y = rays[:, 0] / rays[:, 2], rays[:, 1] / rays[:, 2]
    r = x * x + y * y
    radial = 1 + k1 * r + k2 * r**2 + k3 * r**3
    u = x * radial + 2 * p1 * x * y + p2 * (r + 2 * x * x)
    v = y * radial + p1 * (r + 2 * y * y) + 2 * p2 * x * y
    return np.stack((u * WAYMO[0] + WAYMO[2], v * WAYMO[1] + WAYMO[3]), -1)


def yaw_motion(angle, *translation):
    motion = np.eye(4)
    motion[:3, :3] = Rotation.from_euler("z", angle).as_matrix()
    motion[:3, 3] = translation
    return motion


WORLD_PLANE = (np.array([1.0, 0.35, -0.25]), 14.0)  # ahead of the vehicle, slanted
AXES = np.array(
    [[0, 0, 1], [-1, 0, 0], [0, -1, 0]]
)  # vehicle axes (ahead, left, up) of camera axes (right, down, ahead)


def waymo(root, segments=("segment-1",)):
    """One time; the vehicle moves while the lidar turns, and has moved again when the image is taken."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    normal, offset = WORLD_PLANE
    lidar = yaw_motion(0.4, 1.0, 0.1, 2.0)
    camera = yaw_motion(0.05, 1.5, 0.2, 1.6)
    vehicle, taken = yaw_motion(0.02, 0.3, 0.1, 0.0), yaw_motion(-0.03, 0.8, -0.2, 0.05)
    inclinations = np.linspace(-0.5, 0.45, ROWS)  # from the lowest up
    columns, rows = np.meshgrid(np.arange(COLUMNS), np.arange(ROWS))
    azimuth = np.pi - (columns + 0.5) * 2 * np.pi / COLUMNS - 0.4  # the middle column looks along the vehicle
    up = inclinations[::-1][rows]
    directions = np.stack((np.cos(azimuth) * np.cos(up), np.sin(azimuth) * np.cos(up), np.sin(up)), -1)
    yaws, ahead = 0.1 * columns / COLUMNS, 0.5 * columns / COLUMNS
    turn = Rotation.from_euler("z", yaws.reshape(-1, 1))
    shift = np.stack((ahead, 0 * ahead, 0 * ahead), -1).reshape(-1, 3)
    start = turn.apply(np.tile(lidar[:3, 3], (ROWS * COLUMNS, 1))) + shift
    heading = turn.apply(directions.reshape(-1, 3) @ lidar[:3, :3].T)
    lengths = (offset - start @ normal) / (heading @ normal)
    lengths[(lengths < 1) | (lengths > 80)] = -1
    in_world = start + heading * lengths[:, None]
    in_camera = moved(np.linalg.inv(taken @ camera), in_world) @ AXES
    spots = distorted(np.where(in_camera[:, 2:] > 0.1, in_camera, 1.0))
    x, y = in_camera[:, 0] / in_camera[:, 2], in_camera[:, 1] / in_camera[:, 2]
    is_seen = (lengths > 0) & (in_camera[:, 2] > 0.1) & (x**2 + y**2 < 1.5)
    pixels = np.round(spots).astype(int)
    is_seen &= (pixels >= 0).all(-1) & (pixels < (WIDTH, HEIGHT)).all(-1)
    projection = np.zeros((ROWS * COLUMNS, 6), np.int32)
    projection[is_seen, 3] = 2
    projection[is_seen, 4:] = pixels[is_seen]
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)).save(buffer, "JPEG")

    ranges = np.stack((lengths, *[np.zeros_like(lengths)] * 3), -1)
    poses = np.stack((0 * yaws, 0 * yaws, yaws, ahead, 0 * ahead, 0 * ahead), -1)
    time, head = {"key.frame_timestamp_micros": [55]}, {"key.segment_context_name": ["s"]}
    seen, laser = {"key.camera_name": [2]}, {"key.laser_name": [1]}

    def image(component, values, channels):
        name = f"[{component}].range_image_return1"
        return {f"{name}.values": [values.ravel().tolist()], f"{name}.shape": [[ROWS, COLUMNS, channels]]}

    lens = {
        f"[CameraCalibrationComponent].intrinsic.{name}": [value]
        for name, value in zip(("f_u", "f_v", "c_u", "c_v", "k1", "k2", "p1", "p2", "k3"), (*WAYMO, *DISTORTION))
    }
    size = {"[CameraCalibrationComponent].width": [WIDTH], "[CameraCalibrationComponent].height": [HEIGHT]}
    beams = {
        f"[LiDARCalibrationComponent].beam_inclination.{name}": [value]
        for name, value in zip(("values", "min", "max"), (inclinations.tolist(), -0.5, 0.45))
    }
    tables = {
        "camera_image": {**head, **time, **seen, "[CameraImageComponent].image": [buffer.getvalue()],
                         "[CameraImageComponent].pose.transform": [taken.ravel().tolist()]},
        "camera_calibration": {**head, **seen, **lens, **size,
                               "[CameraCalibrationComponent].extrinsic.transform": [camera.ravel().tolist()]},
        "lidar": {**head, **time, **laser, **image("LiDARComponent", ranges, 4)},
        "lidar_camera_projection": {**head, **time, **laser, **image("LiDARCameraProjectionComponent", projection, 6)},
        "lidar_pose": {**head, **time, **laser, **image("LiDARPoseComponent", poses, 6)},
        "lidar_calibration": {**head, **laser, **beams,
                              "[LiDARCalibrationComponent].extrinsic.transform": [lidar.ravel().tolist()]},
        "vehicle_pose": {**head, **time,
                         "[VehiclePoseComponent].world_from_vehicle.transform": [vehicle.ravel().tolist()]},
    }  # fmt: skip
    for segment in segments:
        for component, columns in tables.items():
            path = root / "training" / component / f"{segment}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            parquet.write_table(pa.table(columns), path)
    return taken @ camera, buffer.getvalue()


def test_waymo_labels_are_where_the_distorted_image_shows_them(tmp_path):
    camera, content = waymo(tmp_path / "w", ["segment-1", "segment-2"])
    stats = curate("waymo", tmp_path / "w", tmp_path / "o" / "out.jsonl", "train")
    records = read(tmp_path / "o" / "out.jsonl")
    assert [record["scene_id"] for record in records] == ["segment-1", "segment-2"] and stats["skipped"] == {}
    record = records[0]
    assert record["intrinsics"] == [*WAYMO, WIDTH, HEIGHT] and record["distortion"] == list(DISTORTION)
    assert (tmp_path / "o" / record["image"]).read_bytes() == content  # not encoded again
    sample = DepthJsonlDataset(tmp_path / "o" / "out.jsonl", tmp_path / "o")[0]
    pixels, metres = labels(record)
    normal, offset = WORLD_PLANE

    def along(rays):
        """Metres from the camera to the plane."""
        headings = rays / np.linalg.norm(rays, axis=-1, keepdims=True) @ AXES.T @ camera[:3, :3].T
        return (offset - camera[:3, 3] @ normal) / (headings @ normal)

    assert len(metres) == 100
    np.testing.assert_allclose(metres, along(sample.camera.rays(pixels)), rtol=0.01)
    wrong = distorted(pinhole_rays(pixels, *WAYMO))  # the inverse map, as the reference has it
    assert np.abs(along(pinhole_rays(wrong, *WAYMO)) / metres - 1).max() > 0.05


def test_range_images_without_poses_are_of_one_moment():
    mount, world = yaw_motion(0.3, 1, 2, 3), yaw_motion(-0.8, 4, 5, 6)
    ranges = np.zeros((2, 4))
    ranges[1, 1] = 10.0  # the lower row; the second column looks 45 degrees to the left of the vehicle
    points = range_image_points(ranges, mount, None, -0.2, 0.2, None, world)
    up, azimuth = -0.1, np.pi / 4 - 0.3
    place = 10 * np.array([np.cos(azimuth) * np.cos(up), np.sin(azimuth) * np.cos(up), np.sin(up)])
    np.testing.assert_allclose(points, moved(world @ mount, place[None]))


def test_rotations_are_roll_then_pitch_then_yaw():
    angles = np.random.default_rng(0).normal(size=(5, 3))
    np.testing.assert_allclose(rotations(*angles.T), Rotation.from_euler("xyz", angles).as_matrix(), atol=1e-12)


def test_waymo_statistics_say_where_the_images_are(tmp_path):
    waymo(tmp_path / "w")
    curate("waymo", tmp_path / "w", tmp_path / "o" / "out.jsonl", "train", points_per_image=20)
    stats = json.loads((tmp_path / "o" / "out.jsonl.stats.json").read_text())
    assert stats["images"] == str(tmp_path / "o") and stats["points"] == 20
    assert stats["split_rule"] == "official: folders of segments" and stats["distance"] == "ray"


def test_waymo_is_opened_by_the_mixture_as_it_is_curated(tmp_path):
    waymo(tmp_path / "data" / "raw" / "waymo")
    dataset = open_as_configured(tmp_path, "waymo", "train")
    assert len(dataset) == 1 and dataset.name == "waymo" and dataset.skipped == {}
    assert dataset[0].load_image().size == (WIDTH, HEIGHT)
