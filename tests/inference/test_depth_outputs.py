"""`mmseg-llm predict --task depth`: files, what is printed, and errors in one sentence."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from depth_fakes import SIZE, PlaneWorld, box_mask, noise
from PIL import Image

from mmseg_llm.cameras import Camera
from mmseg_llm.cli import main
from mmseg_llm.inference import perceiver as module
from mmseg_llm.inference.depth_outputs import parse_grid, parse_points, read_cameras

MAP_FILES = {
    "a_cloud.html",
    "a_cloud.ply",
    "a_depth.json",
    "a_depth.npz",
    "a_depth.png",
    "a_depth_grid.png",
    "a_depth_overlay.jpg",
    "a_depth_picture.png",
}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the verb on `a.png` with a model of known geometry; status, printed lines, error and output folder."""
    noise().save(tmp_path / "a.png")

    def call(*arguments, world=None, image=None):
        made = module.Perceiver(world or PlaneWorld("ray", (0.1, 0.2, 0.3)))
        monkeypatch.setattr(module.Perceiver, "from_pretrained", lambda *_, **__: made)
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        common = ["predict", "--checkpoint", "run", "--image", str(image or tmp_path / "a.png"), "--output", str(out)]
        status = main([*common, *arguments])
        printed = capsys.readouterr()
        return status, printed.out.splitlines(), printed.err.strip(), out

    return call


def names(folder):
    return {path.name for path in folder.iterdir()}


def content(folder, stem="a"):
    return json.loads((folder / f"{stem}_depth.json").read_text())


def test_a_map_is_made_where_nothing_else_is_asked(run):
    status, lines, _, out = run("--task", "depth", "--fov", "70")
    assert status == 0 and names(out) == MAP_FILES
    assert (
        lines[0].startswith("a.png: intrinsics are an assumption, and metres scale with it") and "(70 deg" in lines[0]
    )
    assert lines[1].startswith("a.png: 3072 of 3072 points answered, ") and lines[-1] == f"written: {out}"
    written = content(out)
    assert written["camera"]["origin"] == "assumed" and written["map"]["grid"] == [48, 64]
    assert (
        written["map"]["distance"] == "ray"
        and written["map"]["failures"] == {}
        and len(written["map"]["answers"]) == 3072
    )
    with Image.open(out / "a_depth.png") as image:
        assert image.size == SIZE[::-1]
        millimetres = np.asarray(image)
    first = written["map"]["answers"][0]
    assert first["text"] == f"{first['metres']:.2f} m" and millimetres[0, 0] / 1000 == pytest.approx(
        first["metres"], rel=0.03
    )


def test_points(run):
    failing = PlaneWorld("planar", fails=lambda x, y: "no_number" if x == 9 else None)
    options = ("--task", "depth", "--points", "10,20;9,9;500,4", "--camera", "100,110,61,40")
    status, lines, _, out = run(*options, world=failing)
    assert status == 0 and names(out) == {"a_depth.json", "a_points.jpg"}
    assert lines[:5] == [
        "a.png: intrinsics as given: fx 100.0, fy 110.0, cx 61.0, cy 40.0 px (65 degrees)",
        "a.png: (10, 20): 4.00 m along the optical axis",
        "a.png: (9, 9): no_number",
        "a.png: (500, 4): outside_image",
        "a.png: 1 of 3 points answered, 4.00 to 4.00 m; without an answer: no_number 1, outside_image 1",
    ]
    points = content(out)["points"]
    assert points["failures"] == {"no_number": 1, "outside_image": 1} and points["num_answered"] == 1
    assert points["answers"][1] == {
        "x": 9.0, "y": 9.0, "metres": None, "reason": "no_number", "text": "somewhere", "score": 0.5
    }  # fmt: skip
    _, _, _, out = run(*options, "--grid", "4x5")
    assert names(out) == MAP_FILES | {"a_points.jpg"} and content(out)["map"]["grid"] == [4, 5]


def test_objects(run):
    world = PlaneWorld("planar", masks={"the cube": box_mask(20, 60, 70, 120)})
    options = ("--task", "depth", "--camera", "100,110,61,40")
    status, lines, _, out = run(*options, "--query", "the cube", "--query", "the sofa", world=world)
    assert status == 0 and names(out) == {"a_depth.json", "a_objects.jpg"}
    assert lines[1].startswith("a.png: the cube: 4.") and lines[1].endswith(" m, 2.00 x 1.45 m")
    assert lines[2] == "a.png: the sofa: no target"
    cube, sofa = content(out)["objects"]
    assert cube["planar"]["median"] == pytest.approx(4) and cube["mask"]["sample_id"] == "a.png"
    assert sofa["distance"] is None


def test_folders_and_cameras_by_file_name(run, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("b.png", "b.jpg", "c.png"):
        noise().save(folder / name)
    cameras = {
        name: Camera(90.0 + number, 90.0, 60.0, 40.0).to_json() for number, name in enumerate(("b.png", "b.jpg"))
    }
    (tmp_path / "cameras.json").write_text(json.dumps(cameras))
    options = ("--task", "depth", "--points", "1,1", "--camera", str(tmp_path / "cameras.json"))
    status, _, error, out = run(*options, image=folder)
    assert status == 2 and "no camera of c.png, only of b.jpg, b.png" in error
    assert content(out, "b_png")["camera"]["fx"] == 90 and content(out, "b_jpg")["camera"]["fx"] == 91
    (folder / "c.png").unlink()
    status, lines, _, out = run(*options, image=folder)
    assert status == 0 and len(lines) == 7 and {line[:5] for line in lines[:-1]} == {"b.png", "b.jpg"}


def test_metres_of_unspecified_kind_make_no_cloud_and_it_is_said(run):
    status, lines, _, out = run("--task", "depth", "--grid", "6x8", world=PlaneWorld("unspecified"))
    assert status == 0 and names(out) == MAP_FILES - {"a_cloud.ply", "a_cloud.html"}
    assert lines[2].startswith("a.png: no cloud, as the head does not say")
    *_, out = run("--task", "depth", "--grid", "6x8", "--distance", "ray", world=PlaneWorld("unspecified"))
    assert names(out) == MAP_FILES and content(out)["map"]["distance"] == "ray"


def test_failures_and_far_values_are_said(run):
    none = PlaneWorld(fails=lambda x, y: "no_number")
    status, lines, _, out = run("--task", "depth", "--grid", "2x3", world=none)
    assert status == 0 and lines[1:3] == [
        "a.png: 0 of 6 points answered; without an answer: no_number 6",
        "a.png: no cloud, as no point was answered",
    ]
    status, lines, _, out = run("--task", "depth", "--grid", "4x4", world=PlaneWorld("planar", (0, 0, 0.01)))
    assert status == 0 and lines[2] == "a.png: 12288 pixels beyond 65.535 m are 0 in the 16-bit PNG; the npz has them"
    assert np.load(out / "a_depth.npz")["metres"] == pytest.approx(100)


def test_segmentation_is_as_it_was(run):
    world = PlaneWorld(masks={"the cube": box_mask(20, 60, 70, 120)})
    world.predict_masks, mask = world._mask, lambda sample, query: world.predict_masks(sample, query)
    image = noise()

    def with_image(sample, query):
        from dataclasses import replace

        return replace(mask(sample, query), image=image)

    world._mask = with_image
    status, lines, _, out = run("--query", "the cube", world=world)
    assert status == 0 and lines[0] == "a.png: the cube: 2000 px, score 0.900"
    assert names(out) == {"a_overlay.jpg", "a_0_mask.png", "predictions.json"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to predict; give --query 'the red cube', or --task depth"),
        (["--query", "a", "--points", "1,2", "--fov", "60"], "--points, --fov needs --task depth"),
        (["--task", "depth", "--query", " . "], "is empty"),
        (["--task", "depth", "--points", "1,2,3"], "points are '1,2,3'; write them as x,y;x,y"),
        (["--task", "depth", "--grid", "48"], "grid is '48'; write rows and columns"),
        (["--task", "depth", "--grid", "0x4"], "0x4 has no cells"),
        (["--task", "depth", "--camera", "1,2"], "camera is '1,2'; write fx,fy,cx,cy"),
        (["--task", "depth", "--camera", "0,2,3,4"], "fx is 0.0; a focal length is a positive number"),
        (["--task", "depth", "--camera", "nan,2,3,4"], "fx is nan"),
        (["--task", "depth", "--camera", "nowhere.json"], "camera file nowhere.json does not exist"),
        (["--task", "depth", "--camera", "1,2,3,4", "--fov", "60"], "both a camera and a field of view"),
        (["--task", "depth", "--head", "mask_decoder"], "use head 'depth_text'"),
    ],
)
def test_errors_are_one_sentence(run, arguments, message):
    status, _, error, _ = run(*arguments)
    assert status == 2 and message in error and "\n" not in error


def test_options_as_text(tmp_path):
    assert parse_points(" 120,80; 40.5,-6 ;") == [(120, 80), (40.5, -6)] and parse_grid("48X64") == (48, 64)
    path = tmp_path / "camera.json"
    path.write_text(json.dumps({"fx": 1, "fy": 2, "cx": 3, "cy": 4, "distance": "ray"}))
    assert read_cameras(str(path)) == Camera(1, 2, 3, 4, "ray")
    for text in ("[1, 2]", "{", '{"fx": 1, "focal": 2}', '{"a.png": 3}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"camera\.json holds no camera"):
            read_cameras(str(path))
