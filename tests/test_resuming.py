"""Files that a later call goes on with: only what was left in the middle is taken away, and nothing is mixed."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmseg_llm.clicks import Click, ClickStep, Trajectory, read_trajectories
from mmseg_llm.masks import Mask
from mmseg_llm.resuming import TrajectoryFile, to_lines

TARGET = np.zeros((6, 8), bool)
TARGET[2:4, 2:5] = True
ONE = Trajectory(Mask.from_array(TARGET), (ClickStep(Click(2, 3, True), Mask.from_array(TARGET), 1.0),), stop="iou")
RULES = {"rules": {"max_clicks": 3}, "dataset": "scenes"}


def of(image, count, caption="a cup"):
    return [replace(ONE, image=image, object_id=i, caption=caption) for i in range(count)]


def begun(path, *images, caption="a cup"):
    file = TrajectoryFile(path, RULES)
    for image, count in images:
        file.append(to_lines(of(image, count, caption)))
    return file


def test_finished_images_stay_and_parts_go(tmp_path):
    path = tmp_path / "new" / "t.jsonl"
    begun(path, ("a", 2), ("b", 1), ("c", 3))
    whole = path.read_bytes()
    file = TrajectoryFile(path, RULES)
    assert (file.images, file.num_lines) == ({"a", "b", "c"}, 6) and path.read_bytes() == whole
    lines = whole.splitlines(keepends=True)
    for count, rest, images in (
        (5, b"", {"a", "b"}),
        (5, lines[5][:-1], {"a", "b"}),
        (2, b"{", {"a"}),
        (0, b"{", set()),
    ):
        path.write_bytes(b"".join(lines[:count]) + rest)
        file = TrajectoryFile(path, RULES)
        assert file.images == images and path.read_bytes() == b"".join(lines[: file.num_lines])
        for image, number in (("a", 2), ("b", 1), ("c", 3)):
            if image not in images:
                file.append(to_lines(of(image, number)))
        assert path.read_bytes() == whole


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r", "\n"])
def test_captions_may_hold_what_else_ends_lines(tmp_path, mark):
    path = tmp_path / "t.jsonl"
    begun(path, ("a", 2), ("b", 2), caption=f"a{mark}cup")
    file = TrajectoryFile(path, RULES)
    assert file.images == {"a", "b"} and file.num_lines == 4
    assert [trajectory.caption for trajectory in read_trajectories(path)] == [f"a{mark}cup"] * 4


def test_resuming_shortens_the_file_and_rewrites_nothing(tmp_path, monkeypatch):
    path = tmp_path / "t.jsonl"
    begun(path, ("a", 2))
    kept = path.stat().st_size
    with path.open("a") as file:
        file.write(to_lines(of("b", 2)).splitlines()[0] + "\n{")
    calls, truncate = [], os.truncate
    monkeypatch.setattr(os, "truncate", lambda *words: (calls.append(words), truncate(*words)))
    for name in ("write_text", "write_bytes"):
        monkeypatch.setattr(Path, name, None)
    TrajectoryFile(path, RULES)
    assert calls == [(path, kept)] and path.stat().st_size == kept


def test_masks_are_not_decoded_to_count_images(tmp_path, monkeypatch):
    path = tmp_path / "t.jsonl"
    begun(path, ("a", 1), ("b", 2))
    monkeypatch.setattr(Mask, "from_coco", None)
    assert TrajectoryFile(path, RULES).num_lines == 3


def test_other_rules_are_refused(tmp_path):
    path = tmp_path / "t.jsonl"
    begun(path, ("a", 1))
    with path.open("a") as file:
        file.write("{")
    before = path.read_bytes()
    for rules, words in (
        (
            {"rules": {"max_clicks": 4}, "dataset": "scenes"},
            r"rules\.max_clicks was 3 and is 4 now; give another output",
        ),
        (RULES | {"dataset": "other"}, "dataset was 'scenes' and is 'other' now"),
        (RULES | {"environment": "x" * 300}, r"environment was None and is 'xxx.*\.\.\. now"),
    ):
        with pytest.raises(ValueError, match=words):
            TrajectoryFile(path, rules)
    for content, words in (("{", r"rules\.json is damaged"), (None, r"t\.jsonl\.rules\.json is not, so nothing says")):
        side = tmp_path / "t.jsonl.rules.json"
        side.unlink() if content is None else side.write_text(content)
        with pytest.raises(ValueError, match=words):
            TrajectoryFile(path, RULES)
    assert path.read_bytes() == before


def test_damaged_lines_are_told_by_number(tmp_path):
    path = tmp_path / "t.jsonl"
    lines = to_lines(of("a", 2)) + to_lines(of("b", 1))
    first, second, third = (line + "\n" for line in lines.splitlines())
    bare = json.dumps(ONE.to_json()) + "\n"
    for content, words in (
        (first + second + "[]\n", "line 3: .*this is list"),
        ("null\n", "line 1: .*this is NoneType"),
        ("\n" + first, "line 1: "),
        (first + "{]\n" + third, "line 2: "),
        ('{"text": "hello"}\n', "line 1: .*lacks the field 'image'"),
        (bare, "line 1: .*lacks the field 'lines_of_image'"),
        (first.replace('"lines_of_image": 2', '"lines_of_image": "2"'), "line 1: lines_of_image is '2'"),
        (first + third, "line 2: line 2 of 2 of image 'a' is missing"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=rf"t\.jsonl, {words}"):
            TrajectoryFile(path, RULES)
        assert path.read_text() == content
