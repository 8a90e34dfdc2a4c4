"""Depth records: to JSON and back, what they refuse, and files that are never half written."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmseg_llm.data.depth import DepthRecord, write_depth_jsonl

METRES = st.floats(0.001, 1e3)
NAMES = st.text(max_size=5)


def record(**fields) -> DepthRecord:
    content = {"image": "a.png", "intrinsics": [500, 510.5, 320, 240], "pixel_coords": [[1, 2]], "depth": [1.5]}
    return DepthRecord(**content | fields)


@given(
    labels=st.lists(st.tuples(st.integers(0, 639), st.integers(0, 479), METRES), max_size=5),
    intrinsics=st.tuples(METRES, METRES, METRES, METRES),
    size=st.sampled_from([(), (640, 480)]),
    distance=st.sampled_from(["planar", "ray", "unspecified"]),
    names=st.tuples(NAMES, NAMES, NAMES, NAMES),
    valid_range=st.sampled_from([None, (0.1, 80.0)]),
    distortion=st.sampled_from([(), (0.1, -0.2, 0.0, 1e-3)]),
    extra=st.dictionaries(st.sampled_from(["pose", "split"]), st.integers()),
)
def test_json_gives_the_record_back(labels, intrinsics, size, distance, names, valid_range, distortion, extra):
    before = DepthRecord(
        "rgb/ä.png",
        intrinsics + size,
        tuple((x, y) for x, y, _ in labels),
        tuple(metres for *_, metres in labels),
        distance,
        *names,
        valid_range=valid_range,
        distortion=distortion,
        extra=extra,
    )
    assert DepthRecord.from_json(json.loads(json.dumps(before.to_json()))) == before


def test_lines_of_the_reference_are_written_as_they_were_read(shared_data):
    for line in (shared_data / "ibims1_mini" / "ibims1_mini.jsonl").read_text().splitlines():
        assert DepthRecord.from_json(json.loads(line)).to_json() == json.loads(line)


def test_arrays_become_builtin_numbers():
    made = record(
        pixel_coords=np.array([[3, 4], [5, 6]], np.int16), depth=np.array([1.5, 2], np.float32), distance="ray"
    )
    assert made.pixel_coords == ((3, 4), (5, 6)) and made.depth == (1.5, 2.0)
    assert json.dumps(made.to_json()) == (
        '{"image": "a.png", "intrinsics": [500, 510.5, 320, 240], "pixel_coords": [[3, 4], [5, 6]], "depth": [1.5, 2.0], '
        '"distance_type": "euclidean"}'
    )


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"image": ""}, "no image"),
        ({"intrinsics": [0, 1, 2, 3]}, "positive focal"),
        ({"intrinsics": [1, 1, 2]}, "fx, fy, cx, cy"),
        ({"intrinsics": [1, float("nan"), 2, 3]}, "finite"),
        ({"pixel_coords": [[1, 2, 3]]}, "not all pairs"),
        ({"pixel_coords": [[1, 2], [3, 4]]}, "2 pixels do not fit 1 depths"),
        ({"depth": [0]}, "positive metres"),
        ({"depth": [None]}, "finite"),
        ({"depth": [True]}, "finite"),
        ({"valid_range": [5, 1]}, r"valid_range is \[5, 1\]; give nearest < farthest"),
        ({"valid_range": [1]}, r"valid_range is \[1\]"),
        ({"valid_range": [float("nan"), 5]}, "finite"),
        ({"distance": "z"}, "planar, ray or unspecified"),
    ],
)
def test_what_is_no_label_is_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        record(**fields)


def test_a_missing_field_and_a_wrong_word_are_named():
    content = record().to_json()
    for word in ("depth", ["z"]):
        with pytest.raises(ValueError, match=r"distance_type is .*; use one of z, planar"):
            DepthRecord.from_json(content | {"distance_type": word})
    del content["depth"]
    with pytest.raises(ValueError, match="lacks the field 'depth'"):
        DepthRecord.from_json(content)


def test_files_are_whole_or_as_before(tmp_path):
    path = tmp_path / "new" / "labels.jsonl"
    assert write_depth_jsonl(path, (record(depth=[metres]) for metres in (1, 2))) == 2
    lines = path.read_text().splitlines()
    assert [DepthRecord.from_json(json.loads(line)).depth for line in lines] == [(1,), (2,)]

    def broken():
        yield record()
        raise RuntimeError("the disk of the lidar is full")

    with pytest.raises(RuntimeError, match="lidar"):
        write_depth_jsonl(path, broken())
    assert path.read_text().splitlines() == lines and [file.name for file in path.parent.iterdir()] == ["labels.jsonl"]
