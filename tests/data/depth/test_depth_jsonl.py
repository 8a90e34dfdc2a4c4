"""Lines of labelled pixels as samples: what they say, what is left out and why, and what is drawn."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from mmseg_llm.cameras import Camera
from mmseg_llm.data import DepthJsonlDataset
from mmseg_llm.data.depth import DepthRecord, write_depth_jsonl

NAN = float("nan")
LINE = {
    "image": "rgb/a.png",
    "intrinsics": [50, 51, 7.5, 5.5, 16, 12],
    "pixel_coords": [[1, 2], [15, 11], [0, 0]],
    "depth": [1.5, 2, 30.25],
}


@pytest.fixture
def folder(tmp_path):
    """Images of 16x12 pixels in several modes."""
    (tmp_path / "rgb").mkdir()
    for name, mode in (("a", "RGB"), ("b", "L"), ("c", "P"), ("d", "RGBA")):
        Image.new(mode, (16, 12)).save(tmp_path / "rgb" / f"{name}.png")
    return tmp_path


@pytest.fixture
def read(folder):
    """Write lines, as they are or as JSON, and open them."""

    def run(*lines, **arguments):
        path = folder / "labels.jsonl"
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
        return DepthJsonlDataset(path, folder, **arguments)

    return run


def labels(sample):
    return [(query.id, *(point.x, point.y, point.metres)) for query in sample.queries for point in query.points]


def test_a_line_is_a_sample(read, folder):
    dataset = read(LINE, "", LINE | {"image": "/rgb/b.png", "distance_type": "z", "distortion": [0.1, 0, 0, 0]})
    assert len(dataset) == 2 and dataset.name == "labels" and dataset.skipped == {}
    first, second = dataset
    assert (first.image, first.size, first.id, first.source) == (folder / "rgb/a.png", (12, 16), "rgb/a.png", "labels")
    assert first.camera == Camera(50, 51, 7.5, 5.5, "unspecified")
    assert second.camera == Camera(50, 51, 7.5, 5.5, "planar", (0.1, 0, 0, 0)) and second.id == "rgb/b.png"
    assert labels(first) == labels(second) == [("0", 1, 2, 1.5), ("1", 15, 11, 2.0), ("2", 0, 0, 30.25)]
    assert {query.task for query in first.queries} == {"depth"} and first.queries[0].masks is None
    assert dataset[-1].id == "rgb/b.png"
    with pytest.raises(IndexError):
        dataset[2]


def test_sizes_come_from_the_image_where_the_line_says_nothing(read):
    dataset = read(LINE | {"intrinsics": [50, 51, 7.5, 5.5]})
    assert dataset[0].size == (12, 16) and dataset[0].load_image().size == (16, 12)


@pytest.mark.parametrize("name", "abcd")
def test_images_of_any_mode_are_rgb(read, name):
    assert read(LINE | {"image": f"rgb/{name}.png"})[0].load_image().mode == "RGB"


@pytest.mark.parametrize(
    ("word", "argument", "distance"),
    [
        (None, None, "unspecified"),
        (None, "planar", "planar"),
        ("planar", None, "planar"),
        ("euclidean", None, "ray"),
        ("ray", "ray", "ray"),
    ],
)
def test_distance_is_what_the_line_says_else_the_argument(read, word, argument, distance):
    line = LINE | ({} if word is None else {"distance_type": word})
    assert read(line, distance=argument)[0].camera.distance == distance


FAULTS = {
    "broken JSON": ('{"image": ', "no valid JSON"),
    "malformed line": ({"image": "rgb/a.png"}, "lacks 'intrinsics'"),
    "lists of different length": (LINE | {"depth": [1]}, "3 pixel_coords do not fit 1 depths"),
    "path out of the folder": (LINE | {"image": "../a.png"}, "leads out of the image folder"),
    "missing image": (LINE | {"image": "rgb/z.png"}, "does not exist"),
    "corrupt image": (LINE | {"image": "labels.jsonl"}, "cannot be opened"),
    "image of another size": (LINE | {"intrinsics": [50, 51, 7.5, 5.5, 32, 24]}, "16x12 but its intrinsics say 32x24"),
    "bad focal length": (LINE | {"intrinsics": [0, NAN, 7.5, 5.5, 16, 12]}, "0.0 and nan"),
    "malformed intrinsics": (LINE | {"intrinsics": [50, 51]}, "give \\[fx, fy, cx, cy, width, height\\]"),
    "pixel with two depths": (LINE | {"pixel_coords": [[1, 2], [15, 11], [15.0, 11]]}, "point 1 .* has another depth"),
    "point outside of the image": (LINE | {"pixel_coords": [[1, 2], [16, 11], [0, 0]]}, "point 1 at \\(16, 11\\)"),
    "non-finite depth": (LINE | {"depth": [1, 2, NAN]}, "point 2 .* no finite number"),
    "non-positive depth": (LINE | {"depth": [-1, 2, 3]}, "point 0 .* no positive depth"),
}


@pytest.mark.parametrize("reason", FAULTS)
def test_faults_raise_one_sentence_or_are_counted(read, reason):
    line, sentence = FAULTS[reason]
    with pytest.raises(ValueError, match=f"line 2: .*{sentence}.*on_error='skip'"):
        read(LINE, line)
    dataset = read(LINE, line, LINE | {"image": "rgb/b.png"}, on_error="skip")
    points = {
        "point outside of the image": 1,
        "non-finite depth": 1,
        "non-positive depth": 1,
        "pixel with two depths": 2,
    }
    assert dataset.skipped == {reason: points.get(reason, 1)}
    assert [len(sample.queries) for sample in dataset] == ([3, 3 - points[reason], 3] if reason in points else [3, 3])


NESTED = "[" * 100_000 + "]" * 100_000


def test_nesting_that_json_cannot_follow_is_broken(read):
    nested = json.dumps(LINE)[:-1] + f', "more": {NESTED}}}'
    with pytest.raises(ValueError, match=r"line 2: no valid JSON \(.*recursion"):
        read(LINE, nested)
    assert read(LINE, nested, on_error="skip").skipped == {"broken JSON": 1}


def test_a_pixel_may_come_twice_with_the_same_depth(read):
    line = LINE | {"pixel_coords": [[1, 2], [1, 2], [1.5, 2]], "depth": [3, 3, 4]}
    assert len(read(line)[0].queries) == 3


def test_normalised_intrinsics_are_bad_focal_lengths(read):
    wide = LINE | {"image": "rgb/b.png", "intrinsics": [0.6, 0.69, 0.5, 0.5]}
    with pytest.raises(
        ValueError, match=r"line 2: the focal lengths are 0\.6 and 0\.69, with which an image of 16x12 sees"
    ):
        read(LINE, wide)
    assert read(LINE, wide, on_error="skip").skipped == {"bad focal length": 1}
    dataset = read(LINE | {"intrinsics": [0.6, 51, 7.5, 5.5]})
    assert dataset.skipped == {"focal length repaired": 1} and dataset[0].camera == Camera(
        51, 51, 7.5, 5.5, "unspecified"
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"image": 3}, "image is 3 and must be the path"),
        ({"depth": ["1", "2", "3"]}, "depth holds something that is no number"),
        ({"depth": [1.5, 2, True]}, "depth holds something that is no number"),
        ({"depth": None}, "depth is null and must be a list"),
        (
            {"pixel_coords": [[1, 2], [3, 4], [5]]},
            r"pixel_coords are \[\[1, 2\], \[3, 4\], \[5\]\] and must be a list of \[x, y\]",
        ),
        ({"pixel_coords": [[1, 2], [3, 4], [5, False]]}, "pixel_coords holds something that is no number"),
        ({"pixel_coords": [1, 2, 3]}, "must be a list of"),
        ({"pixel_coords": 7}, "pixel_coords are 7 and"),
        ({"distance_type": "depth"}, "distance_type is 'depth'"),
        ({"distance_type": ["z"]}, "use one of z, planar"),
        ({"valid_range": [1]}, r"valid_range is \[1\] and must be nearest and farthest"),
        ({"valid_range": [NAN, 5]}, r"valid_range is \[NaN, 5\] and"),
        ({"valid_range": [5, 1]}, r"valid_range is \[5, 1\] and"),
        ({"valid_range": 5}, "valid_range is 5 and must be a list"),
        ({"intrinsics": ["50", "51", "7", "5"]}, "intrinsics holds something that is no number"),
        ({"intrinsics": None}, "intrinsics is null and must be a list of numbers"),
        ({"intrinsics": [50, 51, 7, 10**400]}, "too large"),
        ({"distortion": 0.1}, r"distortion is 0\.1 and must be a list of numbers"),
    ],
)
def test_what_has_another_form_is_malformed(read, changes, sentence):
    with pytest.raises(ValueError, match=rf"line 2: malformed \(.*{sentence}.*\); DepthRecord\.to_json shows the form"):
        read(LINE, LINE | changes)
    assert read(LINE, LINE | changes, on_error="skip").skipped == {"malformed line": 1}
    assert read(LINE, json.dumps([LINE]), on_error="skip").skipped == {"malformed line": 1}


def test_a_distance_that_contradicts_the_argument_is_a_fault(read):
    other = LINE | {"distance_type": "euclidean"}
    with pytest.raises(ValueError, match="opened with distance 'planar'"):
        read(LINE, other, distance="planar")
    assert read(LINE, other, distance="planar", on_error="skip").skipped == {"another distance": 1}


def test_points_that_are_left_over_keep_their_ids(read):
    line = LINE | {"pixel_coords": [[1, 2], [1.25, NAN], [0, 0]], "depth": [None, 2, 3]}
    dataset = read(line, on_error="skip")
    assert labels(dataset[0]) == [("2", 0.0, 0.0, 3.0)]
    assert dataset.skipped == {"point outside of the image": 1, "non-finite depth": 1}


@pytest.mark.parametrize("focals", [(50, 0), (0, 50), (50, NAN), (None, 50), (-1, 50)])
def test_one_focal_length_stands_for_both(read, focals):
    dataset = read(LINE | {"intrinsics": [*focals, 7.5, 5.5, 16, 12]})
    assert (dataset[0].camera.fx, dataset[0].camera.fy) == (50, 50)
    assert dataset.skipped == {"focal length repaired": 1} and len(dataset) == 1


def test_ranges_leave_points_out_without_raising(read):
    lines = [LINE | {"depth": [0.004, 2, 30.25]}, LINE | {"image": "rgb/b.png", "valid_range": [0, 2]}]
    dataset = read(*lines, max_metres=10)
    assert [[label[0] for label in labels(sample)] for sample in dataset] == [["1"], ["0", "1"]]
    assert dataset.skipped == {"depth out of range": 3}
    assert read(*lines, min_metres=0.001, max_metres=10).skipped == {"depth out of range": 2}
    dataset = read(*lines, min_metres=2.5)
    assert len(dataset) == 1 and dataset.skipped == {"depth out of range": 5, "no usable point": 1}


def test_points_are_drawn_by_seed_and_index_alone(read):
    points = [[x, y] for y in range(12) for x in range(16)]
    line = LINE | {"pixel_coords": points, "depth": [1 + place for place in range(len(points))]}
    lines = [line | {"image": f"rgb/{name}.png"} for name in "abc"]
    whole, few = read(*lines), read(*lines, points_per_image=20, seed=1)
    drawn = [labels(sample) for sample in few]
    for index in (2, 0, 1, -1):
        assert labels(pickle.loads(pickle.dumps(few))[index]) == drawn[index]
    for sample, kept in zip(whole, drawn):
        assert len(set(kept)) == 20 and set(kept) < set(labels(sample))
    ids = [[label[0] for label in kept] for kept in drawn]
    assert ids[0] != ids[1] and ids[0] != [label[0] for label in labels(read(*lines, points_per_image=20, seed=2)[0])]
    assert labels(read(*lines, points_per_image=500)[0]) == labels(whole[0])
    assert list(few.query_counts()) == [(sample.id, None) for sample in few for _ in sample.queries]


def test_counts_open_no_file(read, folder):
    dataset = read(LINE, LINE | {"image": "rgb/b.png"})
    for path in (*(folder / "rgb").iterdir(), folder / "labels.jsonl"):
        path.unlink()
    assert list(dataset.query_counts()) == [("rgb/a.png", None)] * 3 + [("rgb/b.png", None)] * 3
    assert dataset.describe()["queries"] == 6


def test_images_need_not_be_there_until_they_are_loaded(read):
    dataset = read(LINE | {"image": "z.png"}, check_images=False)
    assert dataset[0].size == (12, 16)
    with pytest.raises(ValueError, match=r"z\.png does not exist"):
        dataset[0].load_image()


def test_images_that_are_cut_off_are_found_by_decoding(read, folder):
    path = folder / "rgb" / "b.png"
    Image.effect_noise((16, 12), 50).save(path)
    path.write_bytes(path.read_bytes()[:120])
    lines = (LINE, LINE | {"image": "rgb/b.png"})
    assert len(read(*lines)) == len(read(*lines, check_images="header")) == 2
    with pytest.raises(ValueError, match=r"line 2: image .*b\.png cannot be opened"):
        read(*lines, check_images="decode")
    dataset = read(*lines, check_images="decode", on_error="skip")
    assert dataset.skipped == {"corrupt image": 1} and [sample.id for sample in dataset] == ["rgb/a.png"]


def test_several_lines_and_files_of_one_image_are_told_apart(read, folder):
    one = read(LINE, LINE)
    assert [sample.id for sample in one] == ["rgb/a.png", "rgb/a.png.2"]
    write_depth_jsonl(folder / "more.jsonl", [DepthRecord("rgb/a.png", (9, 9, 7, 5), ((3, 4),), (2.5,), "ray")])
    both = DepthJsonlDataset([folder / "labels.jsonl", folder / "more.jsonl"], folder)
    assert both.name == "labels+more" and [sample.id for sample in both][2] == "rgb/a.png.3"
    assert labels(both[2]) == [("0", 3, 4, 2.5)] and both[2].camera == Camera(9, 9, 7, 5, "ray")
    assert {image for image, _ in both.query_counts()} == {sample.id for sample in both}


def test_a_file_that_changes_is_noticed(read, folder):
    dataset = read(LINE, LINE)
    text = (folder / "labels.jsonl").read_text()
    (folder / "labels.jsonl").write_text(text.replace("1.5", "-15"))
    with pytest.raises(ValueError, match="was changed"):
        dataset[0]
    (folder / "labels.jsonl").write_text(text[:-20])
    with pytest.raises(ValueError, match="open the dataset again"):
        dataset[1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"distance": "z"}, "distance is 'z'"),
        ({"points_per_image": 0}, "points_per_image is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"min_metres": 2, "max_metres": 1}, "hold no labels"),
        ({"on_error": "ignore"}, "on_error is 'ignore'"),
        ({"check_images": "pixels"}, "check_images is 'pixels'; use header or decode"),
        ({"max_metres": 1}, "no line can be used, left out are .*depth out of range"),
    ],
)
def test_arguments_that_make_no_sense_are_named(read, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        read(LINE, **arguments)


def test_missing_files_and_folders_are_named(folder):
    with pytest.raises(ValueError, match=r"no depth annotations '.*none.jsonl'"):
        DepthJsonlDataset(folder / "none.jsonl", folder)
    with pytest.raises(ValueError, match=r"image folder .* does not exist"):
        DepthJsonlDataset(folder / "none.jsonl", folder / "none")
    with pytest.raises(ValueError, match="annotations is empty"):
        DepthJsonlDataset([], folder)


def test_ibims_scores_a_constant_as_the_specification_says(shared_data):
    root = shared_data / "ibims1_mini"
    dataset = DepthJsonlDataset(root / "ibims1_mini.jsonl", root, distance="planar")
    metres = np.array([query.points[0].metres for sample in dataset for query in sample.queries])
    assert len(dataset) == 24 and len(metres) == 2400 and dataset.skipped == {}
    assert np.mean(np.maximum(2 / metres, metres / 2) < 1.25) == pytest.approx(0.2304, abs=5e-5)
    units = metres / (50 / 65535)
    assert np.abs(units - np.rint(units)).max() < 1e-6
    assert {sample.camera.distance for sample in dataset} == {"planar"}
    assert dataset[0].load_image().size == (640, 480)
    assert labels(dataset[0])[0] == ("0", 519, 129, 2.417792019531548)


def test_config_of_ibims_says_all_this(shared_data):
    root = shared_data / "ibims1_mini"
    part = yaml.safe_load((Path(__file__).parents[3] / "configs" / "data" / "depth_ibims1_mini.yaml").read_text())[
        "test"
    ]
    assert part["class_path"] == "mmseg_llm.data.DepthJsonlDataset"
    arguments = part["init_args"] | {
        name: str(part["init_args"][name]).replace("../shared/data", str(shared_data))
        for name in ("annotations", "images")
    }
    assert list(DepthJsonlDataset(**arguments)) == list(
        DepthJsonlDataset(root / "ibims1_mini.jsonl", root, distance="planar")
    )
