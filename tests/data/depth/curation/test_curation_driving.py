import json
import shutil

import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from slanted import (
    PLANE,
    Plane,
    as_json,
    expected,
    grid,
    labels,
    moved,
    open_as_configured,
    picture,
    pinhole_rays,
    read,
)

from mmseg_llm.data.depth.curation import curate
from mmseg_llm.data.depth.curation.nuscenes import MINI, VAL

LENS = (60.0, 62.0, 30.0, 22.0)  # fx fy cx cy of a 64 x 48 image, fx unlike fy


def pose(seed):
    """A motion (4, 4): somewhere, turned somehow."""
    rng = np.random.default_rng(seed)
    motion = np.eye(4)
    motion[:3, :3] = Rotation.from_rotvec(rng.normal(size=3)).as_matrix()
    motion[:3, 3] = rng.normal(size=3) * 5
    return motion


def wxyz(motion):
    x, y, z, w = Rotation.from_matrix(motion[:3, :3]).as_quat()
    return [float(value) for value in (w, x, y, z)]


def seen_points(step=3, plane=PLANE, lens=LENS):
    """Points of the plane, in the axes of the camera, that are seen in the centres of every third pixel."""
    rays = pinhole_rays(grid(64, 48)[::step, ::step].reshape(-1, 2), *lens)
    return rays * plane.along_axis(rays)[:, None]


def hidden_points():
    """Points behind the plane and behind the camera."""
    points = seen_points(5)
    return np.concatenate((points * 1.6, -points))


def assert_on_plane(record, rtol=1e-4, plane=PLANE):
    _, metres = labels(record)
    assert len(metres) > 50
    np.testing.assert_allclose(metres, expected(record, plane), rtol=rtol)


# nuScenes


def nuscenes(root, scenes=("scene-0001", "scene-0003"), version="v1.0-trainval"):
    """One keyframe a scene; the vehicle has moved between the sweep and the image."""
    tables = {name: [] for name in ("scene", "sample", "sensor", "calibrated_sensor", "ego_pose", "sample_data")}
    channels = ("CAM_FRONT", "LIDAR_TOP")
    mounts = {channel: pose(place) for place, channel in enumerate(channels)}
    for channel, mount in mounts.items():
        tables["sensor"] += [{"token": f"s-{channel}", "channel": channel}]
        lens = [[LENS[0], 0, LENS[2]], [0, LENS[1], LENS[3]], [0, 0, 1]] if channel != "LIDAR_TOP" else []
        motion = {"rotation": wxyz(mount), "translation": mount[:3, 3].tolist()}
        tables["calibrated_sensor"] += [
            {"token": f"c-{channel}", "sensor_token": f"s-{channel}", "camera_intrinsic": lens, **motion}
        ]
    for number, scene in enumerate(scenes):
        tables["scene"] += [{"token": f"t-{scene}", "name": scene}]
        tables["sample"] += [{"token": f"k-{scene}", "scene_token": f"t-{scene}", "timestamp": number}]
        poses = {channel: pose(10 * number + place + 100) for place, channel in enumerate(channels)}
        for channel in channels:
            suffix = "pcd.bin" if channel == "LIDAR_TOP" else "jpg"
            name, motion = f"samples/{channel}/{scene}.{suffix}", poses[channel]
            row = {"sample_token": f"k-{scene}", "ego_pose_token": f"p-{scene}-{channel}", "is_key_frame": True}
            row |= {"token": name, "calibrated_sensor_token": f"c-{channel}", "filename": name}
            tables["sample_data"] += [row, row | {"is_key_frame": False, "filename": f"sweeps/{channel}/x"}]
            tables["ego_pose"] += [
                {"token": f"p-{scene}-{channel}", "rotation": wxyz(motion), "translation": motion[:3, 3].tolist()}
            ]
            if suffix == "jpg":
                picture(root / name)
                world = poses[channel] @ mounts[channel]
                points = np.concatenate((seen_points(), hidden_points()))
                points = moved(np.linalg.inv(poses["LIDAR_TOP"] @ mounts["LIDAR_TOP"]) @ world, points)
        path = root / f"samples/LIDAR_TOP/{scene}.pcd.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.pad(points, ((0, 0), (0, 2))).astype(np.float32).tofile(path)
    for name, rows in tables.items():
        as_json(root / version / f"{name}.json", rows)


def test_nuscenes_is_planar_and_compensates_the_motion(tmp_path):
    nuscenes(tmp_path / "n")
    stats = curate("nuscenes", tmp_path / "n", tmp_path / "out.jsonl", "all")
    records = read(tmp_path / "out.jsonl")
    assert [record["image"] for record in records] == [f"samples/CAM_FRONT/scene-000{number}.jpg" for number in (1, 3)]
    assert stats["skipped"] == {} and stats["depth"]["min"] > 1
    for record in records:
        assert record["distance_type"] == "z" and record["intrinsics"] == [*LENS, 64, 48]
        assert_on_plane(record)


def test_nuscenes_splits_are_scenes(tmp_path):
    nuscenes(tmp_path / "n", ["scene-0061"], "v1.0-mini")
    nuscenes(tmp_path / "n", ["scene-0001", "scene-0003", "scene-0061"])
    scenes = {}
    for split in ("train", "val", "mini", "all"):
        curate("nuscenes", tmp_path / "n", tmp_path / f"{split}.jsonl", split)
        scenes[split] = sorted({record["scene_id"] for record in read(tmp_path / f"{split}.jsonl")})
    assert scenes == {
        "train": ["scene-0001"],
        "val": ["scene-0003"],
        "mini": ["scene-0061"],
        "all": ["scene-0001", "scene-0003", "scene-0061"],
    }
    assert len(VAL) == 150 and len(MINI) == 10 and {3, 12, 18, 110, 916, 1073} <= VAL and not {1, 19, 111} & VAL


def test_a_missing_nuscenes_sweep_is_counted_and_the_rest_is_done(tmp_path):
    nuscenes(tmp_path / "n", ["scene-0001", "scene-0002"])
    (tmp_path / "n" / "samples/LIDAR_TOP/scene-0001.pcd.bin").unlink()
    stats = curate("nuscenes", tmp_path / "n", tmp_path / "out.jsonl", "train")
    assert stats["skipped"] == {"unreadable frame": 1} and stats["frames"] == 1
    with pytest.raises(ValueError, match=r"nuscenes, frame samples/CAM_FRONT/scene-0001\.jpg: it cannot be read"):
        curate("nuscenes", tmp_path / "n", tmp_path / "b.jsonl", "train", on_error="raise")


def test_nuscenes_is_opened_by_the_mixture_as_it_is_curated(tmp_path):
    nuscenes(tmp_path / "data" / "raw" / "nuscenes")
    dataset = open_as_configured(tmp_path, "nuscenes", "train")
    assert [sample.load_image().size for sample in dataset] == [(64, 48)] and dataset.skipped == {}


def change(path, change_row):
    rows = json.loads(path.read_text())
    as_json(path, [row for row in rows if change_row(row) is not False])


def test_nuscenes_keyframes_without_a_sensor_are_counted(tmp_path):
    nuscenes(tmp_path / "n", ["scene-0001", "scene-0002", "scene-0004"])
    gone = ("samples/LIDAR_TOP/scene-0001.pcd.bin", "samples/CAM_FRONT/scene-0002.jpg")
    change(tmp_path / "n/v1.0-trainval/sample_data.json", lambda row: row["filename"] not in gone)
    stats = curate("nuscenes", tmp_path / "n", tmp_path / "out.jsonl", "train")
    assert stats["skipped"] == {"missing image": 1, "missing lidar": 1} and stats["frames"] == 1


@pytest.mark.parametrize(
    ("table", "content", "cause"),
    [
        ("scene", [{"token": "t-scene-0001"}], "'name'"),
        ("scene", [{"token": "t-scene-0001", "name": "scene"}], "invalid literal"),
        ("sample", [], "KeyError"),  # named by sample_data, which does not fit it
        ("sensor", [3], "TypeError"),
        ("ego_pose", {"rows": []}, "TypeError"),
        ("sample_data", 3, "TypeError"),
    ],
)
def test_nuscenes_tables_of_another_form_are_named(tmp_path, table, content, cause):
    nuscenes(tmp_path / "n")
    as_json(tmp_path / f"n/v1.0-trainval/{table}.json", content)
    name = "sample_data" if table == "sample" else table
    with pytest.raises(
        ValueError, match=rf"{name}\.json has not the form of its dataset \(.*{cause}.*download it again"
    ):
        curate("nuscenes", tmp_path / "n", tmp_path / "out.jsonl", "all")


# DDAD


def ddad_pose(motion):
    w, x, y, z = wxyz(motion)
    a, b, c = motion[:3, 3].tolist()
    return {"rotation": {"qw": w, "qx": x, "qy": y, "qz": z}, "translation": {"x": a, "y": b, "z": c}}


def ddad(root, scenes=("000000", "000150")):
    for number, scene in enumerate(scenes):
        now, then = pose(number), pose(number + 50)
        folder = root / scene
        picture(folder / "rgb/CAMERA_05/7.png")
        (folder / "point_cloud/LIDAR").mkdir(parents=True)
        points = moved(np.linalg.inv(then) @ now, np.concatenate((seen_points(), hidden_points())))
        cloud = {"filename": "point_cloud/LIDAR/7.npz", "pose": ddad_pose(then)}
        np.savez(folder / cloud["filename"], data=np.pad(points, ((0, 0), (0, 2))).astype(np.float32))
        image = {"filename": "rgb/CAMERA_05/7.png", "pose": ddad_pose(now)}
        data = [
            {"key": "a", "id": {"name": "camera_05"}, "datum": {"image": image}},
            {"key": "b", "id": {"name": "LIDAR"}, "datum": {"point_cloud": cloud}},
        ]
        samples = [{"datum_keys": ["a", "b"], "calibration_key": "k"}]
        as_json(folder / "scene_x.json", {"samples": samples, "data": data})
        lens = dict(zip(("fx", "fy", "cx", "cy"), LENS))
        as_json(folder / "calibration/k.json", {"names": ["LIDAR", "CAMERA_05"], "intrinsics": [{}, lens]})
    splits = {str(key): {"filenames": [f"{scene}/scene_x.json"]} for key, scene in enumerate(scenes)}
    as_json(root / "ddad.json", {"scene_splits": splits})


def test_ddad_is_planar_and_takes_each_sensor_at_its_pose(tmp_path):
    ddad(tmp_path / "d")
    for split, scene in (("train", "000000"), ("val", "000150")):
        curate("ddad", tmp_path / "d", tmp_path / f"{split}.jsonl", split)
        (record,) = read(tmp_path / f"{split}.jsonl")
        assert record["image"] == f"{scene}/rgb/CAMERA_05/7.png" and record["scene_id"] == scene
        assert record["distance_type"] == "z" and record["intrinsics"] == [*LENS, 64, 48]
        assert_on_plane(record)


def test_a_broken_ddad_scene_is_counted(tmp_path):
    ddad(tmp_path / "d")
    (tmp_path / "d/000000/scene_x.json").write_text("{")
    as_json(
        tmp_path / "d/ddad.json", {"scene_splits": {"0": {"filenames": ["000000/scene_x.json", "000150/scene_x.json"]}}}
    )
    stats = curate("ddad", tmp_path / "d", tmp_path / "out.jsonl", "train")
    assert stats["skipped"] == {"unreadable scene": 1} and stats["frames"] == 1


def test_ddad_samples_without_a_sensor_and_images_elsewhere_are_counted(tmp_path):
    ddad(tmp_path / "d", [f"00000{number}" for number in range(4)])
    as_json(
        tmp_path / "d/ddad.json",
        {"scene_splits": {"0": {"filenames": [f"00000{number}/scene_x.json" for number in range(4)]}}},
    )
    for number, keys in ((1, ["a"]), (2, ["b"])):
        path = tmp_path / f"d/00000{number}/scene_x.json"
        content = json.loads(path.read_text())
        content["samples"][0]["datum_keys"] = keys
        as_json(path, content)
    shutil.copy(tmp_path / "d/000003/rgb/CAMERA_05/7.png", tmp_path / "7.png")
    path = tmp_path / "d/000003/scene_x.json"
    path.write_text(path.read_text().replace("rgb/CAMERA_05/7.png", "../../7.png"))
    stats = curate("ddad", tmp_path / "d", tmp_path / "out.jsonl", "train")
    assert stats["skipped"] == {"missing image": 1, "missing lidar": 1, "path out of the folder": 1}
    assert [record["scene_id"] for record in read(tmp_path / "out.jsonl")] == ["000000"]


@pytest.mark.parametrize("content", [[], {"scene_splits": []}, {"scene_splits": {"0": {}}}, {"scene_splits": {"0": 3}}])
def test_a_ddad_index_of_another_form_is_named(tmp_path, content):
    as_json(tmp_path / "ddad.json", content)
    with pytest.raises(
        ValueError, match=r"ddad\.json ha(s not the form of its dataset|s no scene split).*download it again"
    ):
        curate("ddad", tmp_path, tmp_path / "out.jsonl", "train")


# Argoverse 2


def argoverse(root, logs=("log-a", "log-b", "log-c")):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import feather

    def write(path, columns):
        path.parent.mkdir(parents=True, exist_ok=True)
        feather.write_feather(pa.table(columns), path)

    def motions(first, names, poses):
        columns = {first: names}
        for place, name in enumerate(("qw", "qx", "qy", "qz")):
            columns[name] = [wxyz(motion)[place] for motion in poses]
        return columns | {
            name: [motion[place, 3] for motion in poses] for place, name in enumerate(("tx_m", "ty_m", "tz_m"))
        }

    for number, log in enumerate(logs):
        folder = root / "train" / log
        mount, then, now = pose(number), pose(number + 20), pose(number + 40)
        camera = "ring_side_right"
        picture(folder / "sensors/cameras" / camera / "1030000000.jpg")
        points = moved(np.linalg.inv(then) @ now @ mount, np.concatenate((seen_points(), hidden_points())))
        cloud = {name: points[:, place].astype(np.float32) for place, name in enumerate("xyz")}
        write(folder / "sensors/lidar/1000000000.feather", cloud | {"intensity": np.zeros(len(points), np.uint8)})
        write(folder / "sensors/lidar/1100000000.feather", {name: np.full(3, 9.0, np.float32) for name in "xyz"})
        lens = {name: [value] for name, value in zip(("fx_px", "fy_px", "cx_px", "cy_px"), LENS)}
        noise = {"k1": [-0.2], "k2": [-0.1], "k3": [0.1], "height_px": [48], "width_px": [64]}
        write(folder / "calibration/intrinsics.feather", {"sensor_name": [camera], **lens, **noise})
        write(
            folder / "calibration/egovehicle_SE3_sensor.feather",
            motions("sensor_name", ["up_lidar", camera], [pose(7), mount]),
        )
        times = [1000000000, 1030000000, 1100000000]
        write(folder / "city_SE3_egovehicle.feather", motions("timestamp_ns", times, [then, now, pose(5)]))
    return root


def test_argoverse_does_all_logs_and_writes_both_focal_lengths(tmp_path):
    stats = curate("argoverse2", argoverse(tmp_path / "a"), tmp_path / "out.jsonl", "train")
    records = read(tmp_path / "out.jsonl")
    assert [record["scene_id"] for record in records] == ["log-a", "log-b", "log-c"] and stats["skipped"] == {}
    for record in records:
        assert record["intrinsics"] == [*LENS, 64, 48] and record["distance_type"] == "euclidean"
        assert "distortion" not in record and record["camera"] == "ring_side_right"
        assert_on_plane(record, rtol=1e-4)


def test_one_failing_argoverse_frame_does_not_stop_its_camera(tmp_path):
    root = argoverse(tmp_path / "a", ["log-a"])
    camera = root / "train/log-a/sensors/cameras/ring_side_right"
    (camera / "1020000000.jpg").write_bytes(b"no image")
    picture(camera / "1025000000.jpg")  # no pose
    picture(camera / "1400000000.jpg")  # no sweep
    stats = curate("argoverse2", root, tmp_path / "out.jsonl", "train")
    assert stats["skipped"] == {"corrupt image": 1, "no lidar sweep nearby": 1, "no pose of the vehicle": 1}
    assert stats["frames"] == 1


def test_an_argoverse_log_without_cameras_is_counted(tmp_path):
    root = argoverse(tmp_path / "data" / "raw" / "argoverse2", ["log-a", "log-b"])
    shutil.rmtree(root / "train/log-b/sensors/cameras")
    dataset = open_as_configured(tmp_path, "argoverse2", "train")
    assert [sample.load_image().size for sample in dataset] == [(64, 48)]
    stats = json.loads((tmp_path / "data/depth/argoverse2_train.jsonl.stats.json").read_text())
    assert stats["skipped"] == {"missing image": 1} and "log-b" in stats["first_skipped"]["missing image"]


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"Argoverse 2 needs pyarrow.*pip install 'mmseg_llm\[depth-data\]'"):
        curate("argoverse2", tmp_path, tmp_path / "out.jsonl", "train")


def test_what_is_behind_the_plane_is_hidden(tmp_path):
    ddad(tmp_path / "d", ["000000"])
    with np.load(tmp_path / "d/000000/point_cloud/LIDAR/7.npz") as content:
        data = content["data"]
    alone = data[len(seen_points()) : len(seen_points()) + len(seen_points(5))]
    np.savez(tmp_path / "d/000000/point_cloud/LIDAR/7.npz", data=alone)
    curate("ddad", tmp_path / "d", tmp_path / "out.jsonl", "train")  # nothing hides them now
    assert_on_plane(read(tmp_path / "out.jsonl")[0], plane=Plane(PLANE.normal, PLANE.offset * 1.6))
