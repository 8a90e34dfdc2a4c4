import json
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from slanted import as_json, expected, labels, picture, read, sun_rooms
from toy_curator import LENS, Toy

from mmseg_llm.cameras import Camera
from mmseg_llm.data.depth.curation import CURATORS, curate, find_curator, run
from mmseg_llm.data.depth.curation.base import Frame, each_frame
from mmseg_llm.data.depth.curation.reading import read_numbers
from mmseg_llm.data.depth.curation.writing import Depths
from mmseg_llm.data.depth.points import Unusable
from mmseg_llm.verbs.depth_data import constant
from mmseg_llm.verbs.depth_data import curate as verb


def test_records_say_all_there_is_to_say(tmp_path):
    stats = run.curate(Toy(), tmp_path, tmp_path / "out.jsonl", "all", points_per_image=30)
    record = read(tmp_path / "out.jsonl")[3]
    np.testing.assert_allclose(labels(record)[1], expected(record))
    del record["pixel_coords"], record["depth"]
    assert record == {
        "image": "3.png",
        "intrinsics": [*LENS, 64, 48],
        "distance_type": "euclidean",
        "dataset": "toy",
        "scene_id": "scene 1",
        "camera": "left",
        "valid_range": [0.005, 100.0],
        "label_source": "made up",
    }
    assert (stats["frames"], stats["scenes"], stats["points"], stats["seed"]) == (10, 5, 300, 0)


def test_a_run_that_was_stopped_is_gone_on_with(tmp_path):
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    run.curate(Toy([4]), tmp_path, whole, "all")
    run.curate(Toy([4], 6), tmp_path, part, "all")
    content = part.read_bytes()
    part.write_bytes(content[:-300])  # stopped within a line
    stats = run.curate(Toy([4]), tmp_path, part, "all")
    assert part.read_bytes() == whole.read_bytes() and stats["frames_before"] == 4
    beside = [Path(f"{path}.stats.json").read_bytes() for path in (whole, part)]
    assert beside[0] == beside[1] and json.loads(beside[0])["skipped"] == {"made to fail": 1}
    again = run.curate(Toy([4]), tmp_path, part, "all")
    assert again["frames_before"] == again["frames"] == 9 and part.read_bytes() == whole.read_bytes()


def test_a_file_of_other_rules_is_left_alone(tmp_path):
    output = tmp_path / "out.jsonl"
    run.curate(Toy(), tmp_path, output, "all")
    content = output.read_bytes()
    with pytest.raises(
        ValueError, match=r"begun with other rules: seed was 0 and is 1 now; give another output, or delete"
    ):
        run.curate(Toy(), tmp_path, output, "all", seed=1)
    (tmp_path / "out.jsonl.rules.json").unlink()
    with pytest.raises(ValueError, match="nothing says how it was made"):
        run.curate(Toy(), tmp_path, output, "all")
    assert output.read_bytes() == content


def test_a_damaged_output_is_named_with_its_line(tmp_path):
    output = tmp_path / "out.jsonl"
    run.curate(Toy(), tmp_path, output, "all")
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(lines[0] + b"{}\n" + lines[2])
    with pytest.raises(ValueError, match=r"out\.jsonl, line 2: depth record lacks the field 'image'; .*delete"):
        run.curate(Toy(), tmp_path, output, "all")


def test_a_failing_frame_is_counted_or_raised(tmp_path):
    stats = run.curate(Toy([0, 7]), tmp_path, tmp_path / "a.jsonl", "all")
    assert stats["skipped"] == {"made to fail": 2} and stats["frames"] == 8
    with pytest.raises(
        ValueError, match=r"^toy, frame 0\.png: it is made to fail; mend the file or pass on_error='skip'"
    ):
        run.curate(Toy([0]), tmp_path, tmp_path / "b.jsonl", "all", on_error="raise")


def test_a_scene_that_cannot_be_listed_is_one_failing_frame():
    def frames():
        yield Frame("a", "s", Toy().view)
        raise KeyError("samples")

    (frame,) = each_frame("s", frames)
    with pytest.raises(Unusable, match="the scene cannot be read") as caught:
        frame.view()
    assert caught.value.reason == "unreadable scene"


def test_frames_with_too_few_labels_are_counted(tmp_path):
    toy = Toy(count=2)
    toy.min_points = 2000
    with pytest.raises(
        ValueError, match=r"2 too few labels, first toy, frame 0\.png: it has 1232 labels and toy needs 2000"
    ):
        run.curate(toy, tmp_path, tmp_path / "out.jsonl", "all", points_per_image=5, on_error="raise")
    toy.min_points = 1232
    toy.view = lambda number: replace(Toy().view(0), pixels=Toy().view(0).pixels + 30 * number)
    stats = run.curate(toy, tmp_path, tmp_path / "out.jsonl", "all", points_per_image=5)
    assert stats["frames"] == 1 and stats["skipped"] == {"too few labels": 1}


def test_nothing_that_can_be_used_is_an_error_with_its_first_reason(tmp_path):
    with pytest.raises(
        ValueError, match=r"no frame of .* can be used: 10 made to fail, first toy, frame 0\.png: it is made"
    ):
        run.curate(Toy(range(10)), tmp_path, tmp_path / "out.jsonl", "all")
    assert not list(tmp_path.iterdir())


def test_the_first_sentence_of_every_reason_is_kept(tmp_path):
    stats = run.curate(Toy([3, 7]), tmp_path, tmp_path / "out.jsonl", "all")
    assert stats["first_skipped"] == {"made to fail": "toy, frame 3.png: it is made to fail"}
    assert json.loads((tmp_path / "out.jsonl.stats.json").read_text())["first_skipped"] == stats["first_skipped"]


def test_two_runs_do_not_write_one_file(tmp_path):
    output = tmp_path / "out.jsonl"
    run.curate(Toy(), tmp_path, tmp_path / "alone.jsonl", "all")

    class Meanwhile(Toy):
        def view(self, number):
            if number == 5:
                with pytest.raises(ValueError, match=r"out\.jsonl is being written by another process; wait for it"):
                    run.curate(Toy(), tmp_path, output, "all")
            return super().view(number)

    run.curate(Meanwhile(), tmp_path, output, "all")
    assert output.read_bytes() == (tmp_path / "alone.jsonl").read_bytes()
    run.curate(Toy(), tmp_path, output, "all")  # the lock is gone


def test_an_image_that_is_written_twice_is_refused(tmp_path):
    output = tmp_path / "out.jsonl"
    run.curate(Toy(), tmp_path, output, "all")
    output.write_bytes(output.read_bytes() * 2)
    with pytest.raises(ValueError, match=r"out\.jsonl, line 11: image '0\.png' is there twice; .*delete"):
        run.curate(Toy(), tmp_path, output, "all")


def test_another_root_is_another_dataset(tmp_path):
    output = tmp_path / "out.jsonl"
    for name in "ab":
        (tmp_path / name).mkdir()
    run.curate(Toy(), tmp_path / "a", output, "all")
    assert run.curate(Toy(), tmp_path / "b" / ".." / "a", output, "all")["frames_before"] == 10
    with pytest.raises(ValueError, match=r"begun with other rules: root was '.*a' and is '.*b' now"):
        run.curate(Toy(), tmp_path / "b", output, "all")


@pytest.mark.parametrize(
    "error",
    [
        zlib.error("bad"),
        AttributeError("bad"),
        SyntaxError("bad"),
        Image.DecompressionBombError("bad"),
        RecursionError("bad"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("part", ["view", "picture"])
def test_whatever_broken_files_raise_is_counted(tmp_path, error, part):
    def fail():
        raise error

    class Broken(Toy):
        exports_images = True

        def frames(self, root, split):
            whole = list(super().frames(root, split))
            yield replace(whole[0], **{"picture": lambda: b"picture"} | {part: fail})
            yield replace(whole[1], picture=lambda: b"picture")

    stats = run.curate(Broken(), tmp_path, tmp_path / "out.jsonl", "all")
    assert stats["skipped"] == {"unreadable frame": 1} and stats["frames"] == 1
    assert stats["first_skipped"]["unreadable frame"] == "toy, frame 0.png: it cannot be read (bad)"
    assert (tmp_path / "1.png").read_bytes() == b"picture" and not (tmp_path / "0.png").exists()


@pytest.mark.parametrize(
    ("changes", "reason", "sentence"),
    [
        ({"image": "../0.png"}, "path out of the folder", "leads out of the folder"),
        ({"image": "1.png"}, "frame listed twice", "names it again"),
        ({"view": lambda: replace(Toy().view(0), camera=Camera(0.9, 1.2, 0.5, 0.5))}, "bad focal length",
         "focal length is 0.9 for an image of 64x48"),
    ],
)  # fmt: skip
def test_frames_that_make_no_sense_are_counted(tmp_path, changes, reason, sentence):
    class Odd(Toy):
        def frames(self, root, split):
            whole = list(super().frames(root, split))
            yield from (*whole[1:], replace(whole[0], **changes))

    stats = run.curate(Odd(), tmp_path, tmp_path / "out.jsonl", "all")
    assert stats["skipped"] == {reason: 1} and stats["frames"] == 9 and sentence in stats["first_skipped"][reason]


def test_bad_arguments_are_one_sentence(tmp_path):
    output = tmp_path / "out.jsonl"
    with pytest.raises(ValueError, match="there is no curator 'kitti'; use one of argoverse2, ddad"):
        curate("kitti", tmp_path, output)
    with pytest.raises(ValueError, match="ibims1 has no split 'train'; use test"):
        curate("ibims1", tmp_path, output)
    with pytest.raises(ValueError, match="is no folder; give the folder of sunrgbd"):
        curate("sunrgbd", tmp_path / "none", output)
    with pytest.raises(ValueError, match="holds no frame of the split 'train' of sunrgbd"):
        curate("sunrgbd", tmp_path, output)
    with pytest.raises(ValueError, match="points_per_image is 0"):
        curate("sunrgbd", tmp_path, output, points_per_image=0)
    with pytest.raises(ValueError, match="on_error is 'stop'"):
        curate("sunrgbd", tmp_path, output, on_error="stop")
    assert not output.exists()


def test_every_curator_can_be_made_and_says_what_it_writes():
    for name in CURATORS:
        curator = find_curator(name)
        assert curator.name == name and curator.splits and json.dumps(curator.rules())
        assert (curator.distance == "planar") == (name in {"nuscenes", "ddad", "ibims1"})  # specification H


def test_quantiles_need_no_list_of_all_metres():
    depths, values = Depths(), np.random.default_rng(0).lognormal(1, 1, 20_000)
    for part in np.split(values, 100):
        depths.add(tuple(part))
    summary = depths.summary()
    for share in (0.01, 0.25, 0.5, 0.99):
        assert summary[f"{share:g}"] == pytest.approx(np.quantile(values, share), rel=0.01)
    assert (summary["min"], summary["max"], depths.count) == (values.min(), values.max(), 20_000)


def test_a_calibration_of_other_numbers_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("1, 2; 3\n4")
    assert read_numbers(path, 4) == [1, 2, 3, 4]
    with pytest.raises(Unusable, match="holds 4 numbers, not 9; download it again"):
        read_numbers(path, 9)
    path.write_text("fx 4")
    with pytest.raises(Unusable, match="holds more than numbers"):
        read_numbers(path, 4)


def test_the_verb_prints_a_short_report(tmp_path, capsys):
    sun_rooms(tmp_path / "s", 1)
    picture(tmp_path / "s" / "kv2" / "b" / "image" / "0.jpg")
    (tmp_path / "s" / "kv2" / "b" / "intrinsics.txt").write_text("60 0 30 0 62 22 0 0 1")
    output = tmp_path / "out.jsonl"
    verb(dataset="sunrgbd", root=tmp_path / "s", output=output, split="all", points=9)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{output}: 1 frames (0 of them before) of 1 scenes, 9 points, ray metres from 2.0")
    assert lines[1] == "skipped: 1 missing depth"
    assert lines[2].startswith("first missing depth: sunrgbd, frame kv2/b/image/0.jpg: ")
    assert lines[3:] == [f"images are relative to {tmp_path / 's'}"]


def test_a_constant_is_scored_with_what_was_left_out(tmp_path, capsys):
    sun_rooms(tmp_path / "s", 3)
    curate("sunrgbd", tmp_path / "s", tmp_path / "out.jsonl", "all", points_per_image=4)
    (tmp_path / "s" / read(tmp_path / "out.jsonl")[0]["image"]).unlink()
    part = {"annotations": str(tmp_path / "out.jsonl"), "images": str(tmp_path / "s"), "on_error": "skip"}
    as_json(tmp_path / "data.yaml", {"test": {"class_path": "mmseg_llm.data.DepthJsonlDataset", "init_args": part}})
    constant(data=tmp_path / "data.yaml", metres=2.0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["answer_metres", "2.0000"] and lines[-1] == "skipped: 1 missing image"
