"""`mmseg-llm predict --task depth`: files, what is printed, and errors in one sentence."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from depth_fakes import SIZE, PlaneWorld, box_mask, noise
from PIL import Image

from mmseg_llm.cameras import Camera
from mmseg_llm.cli import main
from mmseg_llm.inference import perceiver as module
from mmseg_llm.inference.depth_outputs import ENDINGS

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
        "a.png: 1 of 3 points answered, 4.00 to 4.00 m along the optical axis; without an answer: no_number 1, outside_image 1",
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
    status, lines, error, out = run(*options, image=folder)
    assert status == 2 and error == "error: 1 of 3 images were left out (c.png); mend or remove them"
    assert lines[0] == "c.png: left out: the camera file has no camera of c.png, only of b.jpg, b.png, ..."
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
    with np.load(out / "a_depth.npz") as written:  # every pixel, as the line says
        assert written["metres"].shape == SIZE and written["metres"] == pytest.approx(100)
        assert written["grid_metres"].shape == (4, 4) and written["grid_points"].shape == (4, 4, 2)


def _with_images(world):
    """Masks that carry the image, as those of a model do."""
    answer = world._mask
    world._mask = lambda sample, query: replace(answer(sample, query), image=sample.image)
    return world


def test_segmentation_is_as_it_was(run):
    world = _with_images(PlaneWorld(masks={"the cube": box_mask(20, 60, 70, 120)}))
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
        (["--task", "depth", "--points", "1,nan"], "points are '1,nan'"),
        (["--task", "depth", "--fov", "180"], "fits no pinhole camera"),
        (["--task", "depth", "--batch_size", "4"], "--batch_size is for masks; leave it out of --task depth"),
        (["--task", "depth", "--label_studio", "x/"], "--label_studio is for masks"),
        (
            ["--task", "depth", "--max_clicks", "3", "--mask_head", "a"],
            "--mask_head, --max_clicks is about the masks of",
        ),
        (["--task", "depth", "--max_pixels", "0"], "max_pixels is 0; a map has at least one pixel"),
        (["--task", "depth", "--max_pixels", "9", "--points", "1,1"], "give --grid with it"),
        (["--query", "a", "--max_pixels", "9"], "--max_pixels needs --task depth"),
    ],
)
def test_errors_are_one_sentence(run, arguments, message):
    status, _, error, _ = run(*arguments)
    assert status == 2 and message in error and "\n" not in error


@pytest.fixture
def no_model(monkeypatch):
    """Fails where a model is loaded."""

    def load(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(module.Perceiver, "from_pretrained", load)

    def call(image, output, *arguments):
        return main(
            [
                "predict",
                "--checkpoint",
                "run",
                "--image",
                str(image),
                "--output",
                str(output),
                "--task",
                "depth",
                *arguments,
            ]
        )

    return call


def test_files_of_the_user_are_never_overwritten(no_model, tmp_path, capsys):
    folder, other = tmp_path / "images", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    for name in ("a.png", "a_depth.png"):
        noise().save(folder / name)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "link").symlink_to(folder)
    for image, output in ((folder, folder), (folder / "a.png", folder), (folder, tmp_path / "link")):
        assert no_model(image, output) == 2
        assert "is the folder of the images, where files could be overwritten" in capsys.readouterr().err
    (other / "a_depth.png").symlink_to(folder / "a_depth.png")
    assert no_model(folder, other) == 2 and "a_depth.png would be overwritten" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_camera_files_are_never_overwritten(no_model, tmp_path, capsys):
    noise().save(tmp_path / "a.png")
    camera = tmp_path / "out" / "a_depth.json"
    camera.parent.mkdir()
    camera.write_text("[1, 2, 3, 4]")
    assert no_model(tmp_path / "a.png", camera.parent, "--camera", str(camera)) == 2
    assert "is one of the inputs" in capsys.readouterr().err and camera.read_text() == "[1, 2, 3, 4]"


def test_all_names_that_are_written_are_guarded(run):
    world = PlaneWorld(masks={"the cube": box_mask(20, 60, 70, 120)})
    *_, out = run("--task", "depth", "--points", "1,1", "--query", "the cube", "--grid", "4x4", world=world)
    assert names(out) == {f"a{ending}" for ending in ENDINGS}


@pytest.mark.parametrize(
    ("image", "output", "arguments", "message"),
    [
        ("a.png", "b.png", [], "b.png cannot be made (File exists); name another"),
        ("a.png", "b.png/out", [], "cannot be made (Not a directory); name another"),
        ("none.png", "out", [], "none.png does not exist"),
        ("broken.png", "out", [], "broken.png cannot be decoded"),
        ("a.png", "out", ["--grid", "0x4"], "0x4 has no cells"),
        ("a.png", "out", ["--camera", "names.json"], "no camera of a.png, only of b.png"),
        ("a.png", "out", ["--camera", "short.json"], "short.json holds a camera that cannot be: distortion is (0.1,)"),
        ("a.png", "out", ["--camera", "origin.json"], "origin.json holds a camera that cannot be: origin is 'foo'"),
    ],
)
def test_what_is_wrong_is_said_before_the_model_is_loaded(
    no_model, tmp_path, monkeypatch, capsys, image, output, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for folder in (tmp_path, tmp_path / "images"):
        for name in ("a.png", "b.png"):
            noise().save(folder / name)
        (folder / "broken.png").write_bytes(b"no image")
    camera = {"fx": 9, "fy": 9, "cx": 1, "cy": 1}
    for name, content in (
        ("names", {"b.png": camera}),
        ("short", camera | {"distortion": [0.1]}),
        ("origin", camera | {"origin": "foo"}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert no_model(f"images/{image}", output, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_broken_images_do_not_stop_a_folder(run, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("b.png", "d.png"):
        noise().save(folder / name)
    (folder / "a.png").write_bytes(b"no image")
    (folder / "c.png").write_bytes((folder / "b.png").read_bytes()[:20000])  # its header is whole
    status, lines, error, out = run("--task", "depth", "--points", "1,1", image=folder)
    assert status == 2 and error == "error: 2 of 4 images were left out (a.png, c.png); mend or remove them"
    assert lines[0].startswith("a.png: left out: ") and [line[:16] for line in lines].count("c.png: left out:") == 1
    assert names(out) == {"b_depth.json", "b_points.jpg", "d_depth.json", "d_points.jpg"}
    for path in folder.iterdir():
        path.write_bytes(b"no image")
    status, lines, error, _ = run("--task", "depth", image=folder)
    assert (status, lines) == (2, []) and error.startswith(
        "error: 4 of 4 images were left out (a.png, b.png, c.png, ...)"
    )


def test_masks_of_a_folder_go_on_too(run, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    noise().save(folder / "b.png")
    (folder / "a.png").write_bytes(b"no image")
    (folder / "c.png").write_bytes((folder / "b.png").read_bytes()[:20000])  # its header is whole
    status, lines, error, out = run("--query", "the cube", image=folder, world=_with_images(PlaneWorld()))
    assert status == 2 and "2 of 3 images were left out (a.png, c.png)" in error
    assert lines[2:] == ["b.png: the cube: no target, score 0.900", f"written: {out}"]


def test_intrinsics_as_the_library_writes_them(run, tmp_path):
    """The file beside a synthetic depth folder."""
    path = tmp_path / "intrinsics.json"
    path.write_text(
        json.dumps(
            {
                "distance": "planar",
                "metres_per_unit": 0.001,
                "images": {"a.png": {"fx": 90, "fy": 91, "cx": 60, "cy": 40}},
            }
        )
    )
    status, _, _, out = run("--task", "depth", "--points", "1,1", "--camera", str(path))
    assert status == 0 and content(out)["camera"] == Camera(90, 91, 60, 40, "planar").to_json()


def test_photographs_that_exif_turns_are_told(run, tmp_path):
    image = noise()
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    status, lines, _, out = run("--task", "depth", "--points", "1,1", image=tmp_path / "a.jpg")
    assert status == 0 and content(out)["orientation"] == 6 and content(out)["size"] == list(SIZE)
    assert "EXIF orientation is 6" in lines[1] and "turn it first" in lines[1]
    status, lines, _, out = run("--task", "depth", "--points", "1,1")
    assert content(out)["orientation"] == 1 and not any("EXIF orientation" in line for line in lines)


def test_what_is_interpolated_is_told(run):
    *_, out = run("--task", "depth", "--grid", "6x8", "--camera", "100,110,61,40")
    said = "interpolated from 48 answers (6x8)"
    assert content(out)["map"]["source"] == said and content(out)["map"]["pixels"] == list(SIZE)
    assert (
        said in (out / "a_cloud.html").read_text()
        and f"comment {said}\n".encode() in (out / "a_cloud.ply").read_bytes()
    )
    with Image.open(out / "a_depth.png") as image:
        text = image.text
    assert (text["distance"], text["source"]) == ("ray", said)
    assert Camera.from_json(json.loads(text["camera"])) == Camera(100, 110, 61, 40)


def test_large_photographs_have_smaller_maps_and_it_is_said(run):
    status, lines, _, out = run("--task", "depth", "--grid", "6x8", "--max_pixels", "3072", "--camera", "100,110,61,40")
    assert (
        status == 0 and "a.png: map and cloud have 64x48 of the 128x96 pixels; give --max_pixels 12288 for all" in lines
    )
    with Image.open(out / "a_depth.png") as image:
        assert image.size == (64, 48)
        camera = Camera.from_json(json.loads(image.text["camera"]))
    assert (camera.fx, camera.fy, camera.cx) == (50, 55, pytest.approx(61.5 / 2 - 0.5))
    assert b"element vertex 3072\n" in (out / "a_cloud.ply").read_bytes()
    _, lines, _, _ = run("--task", "depth", "--grid", "6x8")
    assert not any("--max_pixels" in line for line in lines)


def test_points_can_be_given_more_than_once(run):
    *_, out = run("--task", "depth", "--points+", "1,2;3,4", "--points+", "5,6")
    assert [(item["x"], item["y"]) for item in content(out)["points"]["answers"]] == [(1, 2), (3, 4), (5, 6)]
