import json
import shutil

import numpy as np
import pytest
from PIL import Image
from slanted import PLANE, as_json, expected, grid, labels, open_as_configured, picture, pinhole_rays, png8, png16, read

from mmseg_llm.data.depth.curation import curate
from mmseg_llm.data.depth.curation.sunrgbd import decode, scene_of
from mmseg_llm.data.depth.curation.thin_prism import thin_prism_pixels, thin_prism_rays
from mmseg_llm.data.depth.jsonl import DepthJsonlDataset

LENS = (60.0, 62.0, 30.0, 22.0)  # fx fy cx cy of a 64 x 48 image, fx unlike fy


def plane_map(lens=LENS, width=64, height=48):
    return PLANE.along_axis(pinhole_rays(grid(width, height), *lens))


def ibims(root, names=("corridor_01", "corridor_02", "lab_01")):
    mask = np.full((48, 64), 255)
    for name in names:
        picture(root / "rgb" / f"{name}.png")
        png16(root / "depth" / f"{name}.png", np.round(plane_map() * 65535 / 50))
        (root / "calib").mkdir(exist_ok=True)
        (root / "calib" / f"{name}.txt").write_text(",".join(map(str, LENS)))
        png8(root / "mask_invalid" / f"{name}.png", np.where(grid(64, 48)[..., 0] < 20, 0, mask))
        png8(root / "mask_transp" / f"{name}.png", np.where(grid(64, 48)[..., 1] < 15, 0, mask))


def test_ibims_is_planar_and_has_no_label_under_a_mask(tmp_path):
    ibims(tmp_path / "ibims")
    output = tmp_path / "out.jsonl"
    stats = curate("ibims1", tmp_path / "ibims", output, "test")
    records = read(output)
    assert [record["scene_id"] for record in records] == ["corridor", "corridor", "lab"]
    for record in records:
        pixels, metres = labels(record)
        assert record["distance_type"] == "z" and record["intrinsics"] == [*LENS, 64, 48]
        assert pixels[:, 0].min() >= 20 and pixels[:, 1].min() >= 15
        np.testing.assert_allclose(metres, expected(record), atol=50 / 65535)
        np.testing.assert_allclose(metres * 65535 / 50, np.round(metres * 65535 / 50), atol=1e-6)
    assert (stats["frames"], stats["points"], stats["scenes"]) == (3, 300, 2)


def test_ibims_is_opened_by_the_mixture_as_it_is_curated(tmp_path):
    ibims(tmp_path / "data" / "raw" / "ibims1")
    dataset = open_as_configured(tmp_path, "ibims1", "test")
    assert len(dataset) == 3 and dataset.skipped == {} and dataset[0].load_image().size == (64, 48)


def test_ibims_takes_a_matrix_as_calibration_too(tmp_path):
    ibims(tmp_path, ["lab_01"])
    fx, fy, cx, cy = LENS
    (tmp_path / "calib" / "lab_01.txt").write_text(f"{fx} 0 {cx}\n0 {fy} {cy}\n0 0 1\n")
    curate("ibims1", tmp_path, tmp_path / "out.jsonl", "test")
    assert read(tmp_path / "out.jsonl")[0]["intrinsics"][:4] == list(LENS)


def test_records_are_read_by_the_dataset(tmp_path):
    ibims(tmp_path / "ibims")
    stats = curate("ibims1", tmp_path / "ibims", tmp_path / "out.jsonl", "test", points_per_image=7)
    dataset = DepthJsonlDataset(tmp_path / "out.jsonl", tmp_path / "ibims")
    assert str(tmp_path / "ibims") == stats["images"] and len(dataset) == 3 and dataset.skipped == {}
    sample, record = dataset[1], read(tmp_path / "out.jsonl")[1]
    assert sample.camera.distance == "planar" and sample.size == (48, 64)
    point = sample.queries[3].points[0]
    assert [point.x, point.y] == record["pixel_coords"][3] and point.metres == record["depth"][3]


NYU = (518.857901, 519.469611, 324.582449, 252.736166)


def nyu(root, h5py):
    from scipy.io import savemat

    depth = plane_map(NYU, 640, 480).astype(np.float32)
    depth[:, ::2] = 0  # holes, which `depths` has filled
    images = np.random.default_rng(0).integers(0, 255, (3, 480, 640, 3), np.uint8)
    root.mkdir()
    with h5py.File(root / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"] = images.transpose(0, 3, 2, 1)
        file["rawDepths"] = np.stack([depth.T] * 3)
        file["depths"] = np.stack([np.full((640, 480), 9, np.float32)] * 3)
        names = []
        for number, scene in enumerate(("kitchen_0001", "kitchen_0001", "office_0002")):
            file[f"#refs#/{number}"] = np.array([[ord(letter)] for letter in scene], np.uint16)
            names.append(file[f"#refs#/{number}"].ref)
        file.create_dataset("scenes", data=np.array([names], dtype=h5py.ref_dtype), dtype=h5py.ref_dtype)
    savemat(root / "splits.mat", {"trainNdxs": np.array([[1], [2]]), "testNdxs": np.array([[3]])})
    return images


def test_nyu_takes_raw_depth_and_the_official_split(tmp_path):
    images = nyu(tmp_path / "nyu", pytest.importorskip("h5py"))
    stats = curate("nyuv2", tmp_path / "nyu", tmp_path / "a" / "test.jsonl", "test")
    (record,) = read(tmp_path / "a" / "test.jsonl")
    pixels, metres = labels(record)
    assert record["scene_id"] == "office_0002" and record["distance_type"] == "euclidean"
    assert (pixels[:, 0] % 2 == 1).all() and pixels[:, 0].min() >= 40 and pixels[:, 0].max() <= 600
    assert pixels[:, 1].min() >= 44 and pixels[:, 1].max() <= 470
    np.testing.assert_allclose(metres, expected(record), rtol=1e-5)
    written = Image.open(tmp_path / "a" / record["image"])
    assert stats["images"] == str(tmp_path / "a") and (np.asarray(written) == images[2]).all()
    train = curate("nyuv2", tmp_path / "nyu", tmp_path / "a" / "train.jsonl", "train")
    assert train["frames"] == 2 and {r["scene_id"] for r in read(tmp_path / "a" / "train.jsonl")} == {"kitchen_0001"}


def test_nyu_without_its_split_says_what_to_do(tmp_path):
    nyu(tmp_path / "nyu", pytest.importorskip("h5py"))
    (tmp_path / "nyu" / "splits.mat").unlink()
    with pytest.raises(ValueError, match=r"splits\.mat does not exist; download splits\.mat"):
        curate("nyuv2", tmp_path / "nyu", tmp_path / "out.jsonl", "test")
    assert curate("nyuv2", tmp_path / "nyu", tmp_path / "out.jsonl", "all")["frames"] == 3


def test_a_missing_library_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(ValueError, match=r"needs h5py, which is not installed: pip install 'mmseg_llm\[depth-data\]'"):
        curate("nyuv2", tmp_path, tmp_path / "out.jsonl", "test")
    assert not (tmp_path / "out.jsonl").exists()


def sun_frame(folder, metres, kind="depth_bfx"):
    fx, fy, cx, cy = LENS
    picture(folder / "image" / "0.jpg")
    millimetres = np.round(metres * 1000).astype(np.uint16)
    png16(folder / kind / "0.png", (millimetres << 3) | (millimetres >> 13))
    (folder / "intrinsics.txt").write_text(f"{fx} 0 {cx} 0 {fy} {cy} 0 0 1")


def test_sun_is_at_true_scale_and_without_nyu(tmp_path):
    sun_frame(tmp_path / "kv2" / "kinect2data" / "000002_2014_rgbf000103-resize", plane_map())
    sun_frame(tmp_path / "kv1" / "NYUdata" / "NYU0001", plane_map())
    curate("sunrgbd", tmp_path, tmp_path / "out.jsonl", "all")
    (record,) = read(tmp_path / "out.jsonl")
    assert record["image"] == "kv2/kinect2data/000002_2014_rgbf000103-resize/image/0.jpg"
    _, metres = labels(record)
    np.testing.assert_allclose(metres, expected(record), rtol=5e-4)  # 0.8 of it with raw / 10000


def test_sun_decoding_turns_all_bits():
    metres = np.array([0, 1, 1234, 8191, 8192, 65535], np.uint16)
    stored = ((metres.astype(int) << 3) | (metres >> 13)) & 0xFFFF
    np.testing.assert_allclose(decode(stored) * 1000, metres, rtol=1e-12)


def test_sun_has_no_label_where_the_toolbox_clips(tmp_path):
    far = np.where(grid(64, 48)[..., 0] < 32, 3.0, 8.0)
    sun_frame(tmp_path / "xtion" / "a", far)
    curate("sunrgbd", tmp_path, tmp_path / "out.jsonl", "all")
    pixels, metres = labels(read(tmp_path / "out.jsonl")[0])
    assert pixels[:, 0].max() < 32 and metres.max() < 8


def test_frames_of_one_sun_recording_are_one_scene():
    assert scene_of("kv2/align_kv2/2014_260_rgbf000102-resize") == scene_of("kv2/align_kv2/2014_260_rgbf000007-resize")
    assert scene_of("xtion/sun3ddata/mit/room/0001-1") == scene_of("xtion/sun3ddata/mit/room/0002-2")
    assert scene_of("kv1/b3dodata/img_0063") != scene_of("kv1/b3dodata/img_0064")


def test_nyu_frames_inside_sun_are_a_dataset_of_their_own(tmp_path):
    sun_frame(tmp_path / "kv1" / "NYUdata" / "NYU0001", plane_map(), "depth")
    sun_frame(tmp_path / "kv1" / "b3dodata" / "img_1", plane_map(), "depth")
    curate("nyuv2_sun", tmp_path, tmp_path / "out.jsonl", "all")
    (record,) = read(tmp_path / "out.jsonl")
    assert record["image"].startswith("kv1/NYUdata/") and record["dataset"] == "nyuv2_sun"
    np.testing.assert_allclose(labels(record)[1], expected(record), rtol=5e-4)


def scannetpp(root):
    """One scene of 11 frames, of which two are taken; intrinsics of every frame are others, names are padded differently."""
    folder = root / "data" / "scene" / "iphone"
    matrices = {}
    for number in range(2, 13):
        picture(folder / "rgb" / f"frame_{number}.jpg")
        fx = 1500.0 + 30 * number
        matrices[f"frame_{number:06d}"] = {"intrinsic": [[fx, 0, 950.0], [0, fx + 15, 700.0], [0, 0, 1]]}
        depth = 2000 + 10 * number + 3 * grid(16, 12)[..., 0]
        depth[:, 5:8] = 0
        png16(folder / "depth" / f"frame_{number:06d}.png", depth)
        png8(folder / "rgb_masks" / f"frame_{number:06d}.png", np.where(grid(64, 48)[..., 1] < 20, 0, 255))
    as_json(folder / "pose_intrinsic_imu.json", matrices)
    return folder


def test_scannetpp_matches_by_number_and_measures_along_the_ray(tmp_path):
    folder = scannetpp(tmp_path)
    curate("scannetpp", tmp_path, tmp_path / "out.jsonl", "all", points_per_image=500)
    records = read(tmp_path / "out.jsonl")
    assert [record["image"].rpartition("/")[2] for record in records] == ["frame_2.jpg", "frame_12.jpg"]
    for number, record in zip((2, 12), records):
        fx, fy, cx, cy = record["intrinsics"][:4]
        assert fx == pytest.approx((1500 + 30 * number) / 30) and fy == pytest.approx((1515 + 30 * number) / 30)
        pixels, metres = labels(record)
        assert pixels[:, 1].min() >= 20
        columns = (pixels[:, 0] - 2) // 4  # depth pixels of 4 image pixels, whose centre rounds to the third
        assert not np.isin(columns, (5, 6, 7)).any()
        z = (2000 + 10 * number + 3 * columns) / 1000
        x, y = (pixels[:, 0] - cx) / fx, (pixels[:, 1] - cy) / fy
        np.testing.assert_allclose(metres, z * np.sqrt(x**2 + y**2 + 1))
        assert np.abs(metres - np.sqrt(x**2 + y**2 + z**2)).max() > 0.1  # the formula of the reference
    depth = folder / "depth" / "frame_000012.png"
    depth.unlink()
    assert curate("scannetpp", tmp_path, tmp_path / "b.jsonl", "all")["skipped"] == {"missing depth": 1}


def matterport(root, scan="1pXnuDYAj8r", broken=False):
    folder = root / scan
    lines = ["dataset matterport", "n_images 3", "depth_directory undistorted_depth_images"]
    lines += ["color_directory undistorted_color_images", ""]
    for number, (fx, fy, cx, cy) in enumerate((LENS, (70.0, 71.0, 33.0, 25.0))):
        lines += [f"intrinsics_matrix {fx} 0 {cx}  0 {fy} {47 - cy} 0 0 1"]  # rows of the files count from below
        picture(folder / "undistorted_color_images" / f"a_i{number}_0.jpg")
        png16(
            folder / "undistorted_depth_images" / f"a_d{number}_0.png",
            np.round(plane_map((fx, fy, cx, cy)) * 4000),
        )
        lines += [f"scan a_d{number}_0.png a_i{number}_0.jpg " + " ".join(["0"] * 16)]
    if broken:
        lines += ["scan a_d9_0.png a_i9_0.jpg " + " ".join(["0"] * 16)]
    (folder / "undistorted_camera_parameters").mkdir(parents=True)
    (folder / "undistorted_camera_parameters" / f"{scan}.conf").write_text("\n".join(lines))


def test_matterport_has_the_image_key_and_turns_the_principal_point(tmp_path):
    matterport(tmp_path)
    curate("matterport3d", tmp_path, tmp_path / "out.jsonl", "all")
    records = read(tmp_path / "out.jsonl")
    assert [record["image"] for record in records] == [
        "1pXnuDYAj8r/undistorted_color_images/a_i0_0.jpg",
        "1pXnuDYAj8r/undistorted_color_images/a_i1_0.jpg",
    ]
    assert records[0]["intrinsics"][:4] == list(LENS) and records[1]["intrinsics"][:2] == [70.0, 71.0]
    for record in records:
        assert list(record)[:4] == ["image", "intrinsics", "pixel_coords", "depth"]
        np.testing.assert_allclose(labels(record)[1], expected(record), rtol=2e-4)


def test_matterport_needs_fifty_labels_however_few_are_written(tmp_path):
    matterport(tmp_path)
    path = tmp_path / "1pXnuDYAj8r" / "undistorted_depth_images" / "a_d0_0.png"
    depth = np.zeros((48, 64))
    depth[20, 10:59] = 4000
    png16(path, depth)  # 44 inside the margin
    stats = curate("matterport3d", tmp_path, tmp_path / "out.jsonl", "all", points_per_image=5)
    assert stats["skipped"] == {"too few labels": 1} and stats["points"] == 5


PRISM = (55.0, 56.0, 32.2, 23.6, -0.12, 0.05, 0.004, -0.003, 0.02, -0.01, 0.006, -0.005)


def eth3d(root):
    """Two scenes with images of the same name, two cameras of another lens in one; planes at other depths."""
    rays = thin_prism_rays(grid(64, 48).reshape(-1, 2), PRISM)
    for scene, factor in (("courtyard", 1.0), ("office", 2.0)):
        folder = root / scene
        (folder / "dslr_calibration_jpg").mkdir(parents=True)
        cameras = ["# CAMERA_ID, MODEL, WIDTH, HEIGHT, PARAMS[]", "0 PINHOLE 64 48 60 62 30.5 22.5"]
        cameras += ["7 THIN_PRISM_FISHEYE 64 48 " + " ".join(map(str, PRISM))]
        (folder / "dslr_calibration_jpg" / "cameras.txt").write_text("\n".join(cameras) + "\n")
        images = ["# IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME", "# POINTS2D[]"]
        images += [
            "2 1 0 0 0 0 0 0 7 dslr_images/DSC_0002.JPG",
            "1.5 2.5 -1",
            "1 1 0 0 0 0 0 0 0 dslr_images/DSC_0001.JPG",
            "",
        ]
        (folder / "dslr_calibration_jpg" / "images.txt").write_text("\n".join(images) + "\n")
        depths = {"DSC_0001.JPG": plane_map(), "DSC_0002.JPG": PLANE.along_axis(rays).reshape(48, 64)}
        for name, depth in depths.items():
            picture(folder / "images" / "dslr_images" / name)
            depth = (depth * factor).astype(np.float32)
            depth[:, 30:34] = np.inf
            path = folder / "ground_truth_depth" / "dslr_images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            depth.tofile(path)


def test_eth3d_undistorts_with_the_whole_lens_and_pairs_by_path(tmp_path):
    eth3d(tmp_path)
    stats = curate("eth3d", tmp_path, tmp_path / "out.jsonl", "train")
    records = read(tmp_path / "out.jsonl")
    assert [record["image"] for record in records] == [
        f"{scene}/images/dslr_images/DSC_000{number}.JPG" for scene in ("courtyard", "office") for number in (1, 2)
    ]
    for record, factor in zip(records, (1, 1, 2, 2)):
        pixels, metres = labels(record)
        assert not np.isin(pixels[:, 0], range(30, 34)).any() and record["distance_type"] == "euclidean"
        if "lens" in record:
            assert record["lens"] == {"model": "THIN_PRISM_FISHEYE", "params": list(PRISM)}
            assert record["intrinsics"][:4] == pytest.approx([55, 56, 31.7, 23.1])
            rays = thin_prism_rays(pixels, PRISM)
        else:
            assert record["intrinsics"][:4] == list(LENS)
            rays = pinhole_rays(pixels, *LENS)
        wanted = factor * PLANE.along_axis(rays) * np.linalg.norm(rays, axis=-1)
        np.testing.assert_allclose(metres, wanted, rtol=1e-5)
    assert stats["skipped"] == {} and sum("lens" in record for record in records) == 2


def test_every_number_of_the_thin_prism_lens_counts():
    pixels = grid(64, 48).reshape(-1, 2)
    rays = thin_prism_rays(pixels, PRISM)
    np.testing.assert_allclose(thin_prism_pixels(rays, PRISM), pixels, atol=1e-7)
    for place in range(4, 12):
        without = [0.0 if number == place else value for number, value in enumerate(PRISM)]
        assert np.abs(thin_prism_pixels(rays, without) - pixels).max() > 0.02, place


def test_the_thin_prism_lens_is_that_of_colmap():
    """At (0.2, 0.1) radians r^2 is 0.05 and the radial term 0.00554; worked out by hand."""
    scale = np.tan(np.sqrt(0.05)) / np.sqrt(0.05)
    params = (100.0, 100.0, 50.0, 50.0, 0.1, 0.2, 0.03, 0.05, 0.3, 0.4, 0.06, 0.07)
    spot = thin_prism_pixels(np.array([[0.2 * scale, 0.1 * scale, 1.0]]), params)
    np.testing.assert_allclose(spot, [[20 + 1.1808 + 49.5, 10 + 0.8154 + 49.5]])


def test_the_thin_prism_lens_without_terms_is_an_equidistant_fisheye():
    angle = 0.7
    ray = np.array([[np.tan(angle) * 0.6, np.tan(angle) * 0.8, 1.0]])
    spot = thin_prism_pixels(ray, (100.0, 100.0, 50.0, 50.0, *[0.0] * 8))
    np.testing.assert_allclose(spot, [[100 * angle * 0.6 + 49.5, 100 * angle * 0.8 + 49.5]])


def test_a_depth_of_another_size_is_counted(tmp_path):
    eth3d(tmp_path / "eth3d")
    np.ones(10, np.float32).tofile(
        tmp_path / "eth3d" / "office" / "ground_truth_depth" / "dslr_images" / "DSC_0001.JPG"
    )
    stats = curate("eth3d", tmp_path / "eth3d", tmp_path / "a.jsonl", "train")
    assert stats["skipped"] == {"depth of another size": 1} and stats["frames"] == 3
    ibims(tmp_path / "ibims", ["lab_01", "lab_02"])
    png16(tmp_path / "ibims" / "depth" / "lab_01.png", np.ones((4, 4)))
    assert curate("ibims1", tmp_path / "ibims", tmp_path / "b.jsonl", "test")["skipped"] == {"depth of another size": 1}
    assert json.loads((tmp_path / "b.jsonl.stats.json").read_text())["skipped"] == {"depth of another size": 1}


def test_an_eth3d_scene_without_calibration_is_counted(tmp_path):
    eth3d(tmp_path / "e")
    shutil.rmtree(tmp_path / "e" / "office" / "dslr_calibration_jpg")
    stats = curate("eth3d", tmp_path / "e", tmp_path / "out.jsonl", "train")
    assert stats["skipped"] == {"missing calibration": 1} and stats["frames"] == 2
    assert "office/dslr_calibration_jpg/images.txt does not exist" in stats["first_skipped"]["missing calibration"]


def test_an_eth3d_lens_that_a_camera_cannot_say_is_told(tmp_path):
    eth3d(tmp_path / "e")
    curate("eth3d", tmp_path / "e", tmp_path / "out.jsonl", "train")
    dataset = DepthJsonlDataset(tmp_path / "out.jsonl", tmp_path / "e")
    assert len(dataset) == 4 and dataset.skipped == {"unsupported lens": 2} == dataset.describe()["skipped"]


def test_a_scannetpp_scene_without_images_is_counted(tmp_path):
    scannetpp(tmp_path / "s")
    (tmp_path / "s/data/other/iphone/depth").mkdir(parents=True)
    (tmp_path / "s/data/third/dslr").mkdir(parents=True)
    stats = curate("scannetpp", tmp_path / "s", tmp_path / "out.jsonl", "all")
    assert stats["skipped"] == {"missing image": 2} and stats["frames"] == 2


def test_sun_frames_without_image_or_intrinsics_are_counted(tmp_path):
    for name in ("whole", "blind", "unknown", "unmade"):
        sun_frame(tmp_path / "s/kv1/b3dodata" / name, plane_map())
    shutil.rmtree(tmp_path / "s/kv1/b3dodata/blind/image")
    (tmp_path / "s/kv1/b3dodata/unknown/intrinsics.txt").unlink()
    for path in (tmp_path / "s/kv1/b3dodata/unmade/image").iterdir():
        path.unlink()
    stats = curate("sunrgbd", tmp_path / "s", tmp_path / "out.jsonl", "all")
    assert stats["skipped"] == {"missing image": 2, "missing intrinsics": 1} and stats["frames"] == 1


def test_an_nyu_file_of_another_form_is_named(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "nyu_depth_v2_labeled.mat"
    path.write_bytes(b"no matrix")
    with pytest.raises(ValueError, match=r"labeled\.mat has not the form of its dataset \(OSError"):
        curate("nyuv2", tmp_path, tmp_path / "out.jsonl", "all")
    h5py.File(path, "w").close()
    with pytest.raises(ValueError, match=r"labeled\.mat has not the form of its dataset \(KeyError"):
        curate("nyuv2", tmp_path, tmp_path / "out.jsonl", "all")
