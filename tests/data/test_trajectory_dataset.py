"""Recorded clicks as training samples: every step, its mask so far and its label, from both kinds of files."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mmseg_llm.clicks import Click, ClickStep, NextClick, Trajectory, write_trajectories
from mmseg_llm.configuration import read_part
from mmseg_llm.data import Concat, SampleDataset, TrajectoryDataset
from mmseg_llm.data.segagent import write_official
from mmseg_llm.data.synthetic import make_scene
from mmseg_llm.masks import Mask
from mmseg_llm.segmenters.fakes import DisksEnvironment
from mmseg_llm.structures import Query, Sample
from mmseg_llm.trajectories import Rules, record_sample

SIZE = (12, 16)


def square(side: int, at: int = 1) -> Mask:
    array = np.zeros(SIZE, bool)
    array[at : at + side, at : at + side] = True
    return Mask.from_array(array)


def trajectory(num_steps: int, **fields) -> Trajectory:
    """Squares that grow to the target of 6 x 6 pixels."""
    steps = tuple(ClickStep(Click(k, k + 1, k % 2 == 0), square(k + 2), (k + 2) ** 2 / 36) for k in range(num_steps))
    fields = {"image": "a", "object_id": "7", "caption": ("red", "big"), "stop": "max_clicks"} | fields
    return Trajectory(square(6), steps, **fields)


class Pictures(SampleDataset):
    """Images `a`, `b`, ... with an unlabelled query each."""

    name = "pictures"

    def __init__(self, names: str = "ab", size=SIZE) -> None:
        self.names, self.size, self.skipped = names, size, {}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        return Sample(Image.new("RGB", self.size[::-1]), self.size, (Query("x"),), id=self.names[index])


@pytest.fixture
def write(tmp_path):
    """Write trajectories as JSONL and return the file."""

    def run(*trajectories, name="t.jsonl"):
        write_trajectories(tmp_path / name, trajectories)
        return tmp_path / name

    return run


def test_every_step_is_a_sample(write):
    dataset = TrajectoryDataset(write(trajectory(3, rejected=trajectory(2).steps)), Pictures())
    assert len(dataset) == 4 and dataset.name == "t" and dataset.skipped == {}
    for step, sample in enumerate(dataset):
        assert (sample.id, sample.size, sample.source) == ("a", SIZE, "t") and sample.load_image().size == SIZE[::-1]
        assert [query.text for query in sample.queries] == ["red", "big"]
        assert [query.id for query in sample.queries] == [f"7/0/{step}", f"7/1/{step}"]
        for query in sample.queries:
            assert query.masks == (square(6),) and query.ignore is None
            assert query.start == (square(step + 1) if step else None)
            iou = (step + 1) ** 2 / 36 if step else 0.0
            click = Click(step, step + 1, step % 2 == 0) if step < 3 else None
            assert query.next_click == NextClick(click, iou)
    assert list(dataset.query_counts()) == [(s.id, 1) for s in dataset for _ in s.queries]
    assert dataset.describe()["queries"] == 8 and dataset.describe()["images"] == 1
    with pytest.raises(IndexError):
        dataset[4]
    assert dataset[-1] == replace(dataset[3], image=dataset[-1].image)


@pytest.mark.parametrize(
    ("stop", "final", "label"),
    [
        ("iou", "finish", NextClick(None, 4 / 36, True)),
        ("nothing_wrong", "finish", NextClick(None, 4 / 36, True)),
        ("low_gain", "finish", NextClick(None, 4 / 36)),
        ("unknown", "finish", NextClick(None, 4 / 36)),
        ("iou", "estimate", NextClick(None, 4 / 36)),
        ("iou", "none", None),
    ],
)
def test_the_mask_at_the_end(write, stop, final, label):
    dataset = TrajectoryDataset(write(trajectory(1, stop=stop)), Pictures(), final=final)
    labels = [sample.queries[0].next_click for sample in dataset]
    assert labels[0] == NextClick(Click(0, 1, True), 0.0) and labels[1:] == ([] if label is None else [label])


def test_repeats_of_the_first_step(write):
    start = trajectory(0, start=square(5), start_iou=25 / 36, caption="one", ignore=square(1, 0))
    path = write(trajectory(2), trajectory(0), start, trajectory(1, image="b"))
    dataset = TrajectoryDataset(path, Pictures(), repeat_first=3)
    ids = [(sample.id, sample.queries[0].id) for sample in dataset]
    expected = [("a", f"7/0/{step}") for step in (0, 0, 0, 1, 2)]
    expected += [("a", "7.2/0/0"), *(("b", f"7/0/{step}") for step in (0, 0, 0, 1))]
    assert ids == expected and dataset.skipped == {"without steps": 1}
    (query,) = dataset[5].queries
    assert (query.text, query.start, query.ignore) == ("one", square(5), square(1, 0))
    assert query.next_click == NextClick(None, 25 / 36)
    assert len(TrajectoryDataset(path, Pictures(), final="none")) == 3
    assert len(TrajectoryDataset(path, Pictures(), max_samples=2)) == 2


def test_official_files(tmp_path, write):
    """The released layout, with text beyond ASCII and `data` not first; the same samples as from JSON lines."""
    items = [trajectory(2, caption=("die grüne Tür", '門 "data": [')), trajectory(1, image="b", caption="x")]
    items = [replace(item, stop="unknown") for item in items]
    path = tmp_path / "refcoco_train.json"
    write_official(path, items, {"data": [1, {"clicks_list": 3}]})
    official, lines = TrajectoryDataset(path, Pictures()), TrajectoryDataset(write(*items), Pictures())
    assert [sample.queries for sample in official] == [sample.queries for sample in lines]
    assert official[0].queries[1].text == '門 "data": ['
    both = TrajectoryDataset([path, write(items[0])], Pictures())
    assert len(both) == 7 and both.name == "refcoco_train+t" and both[5].queries[0].id == "7.2/0/1"
    for content in ("[]", "", '{"data": 3}', '{"info": {}}', '{"data": [', path.read_text()[:-3]):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"refcoco_train\.json is no SegAgent trajectory file"):
            TrajectoryDataset(path, Pictures())


def test_image_folder(tmp_path, write):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for name in ("sub/a.png", "b.JPG.bmp", "COCO_train2014_000000000042.jpg", "000000000139.jpg"):
        Image.new("RGB", SIZE[::-1]).save(folder / name)
    (tmp_path / "secret.png").write_bytes((folder / "sub/a.png").read_bytes())
    names = ["sub/a.png", "sub/a", "b.JPG", 42, "42", 139]
    dataset = TrajectoryDataset(
        write(*(trajectory(1, image=name) for name in names)), images=folder, final="none", group_first=False
    )
    found = [sample.image.relative_to(folder).as_posix() for sample in dataset]
    coco = "COCO_train2014_000000000042.jpg"
    assert found == ["sub/a.png", "sub/a.png", "b.JPG.bmp", coco, coco, "000000000139.jpg"]
    assert all(sample.load_image().size == SIZE[::-1] for sample in dataset)
    outside = ["../secret.png", "sub/../../secret", str(tmp_path / "secret.png"), "C:\\secret", "..\\secret", "a\0", ""]
    for name in outside:
        with pytest.raises(ValueError, match=r"t\.jsonl, line 1: image .* leads out of the folder"):
            TrajectoryDataset(write(trajectory(1, image=name)), images=folder)
    path = write(*(trajectory(1, image=name) for name in [*outside, "c", 42]))
    assert TrajectoryDataset(path, images=folder, on_error="skip").skipped == {"unknown image": len(outside) + 1}


def test_broken_lines(write):
    good = json.dumps(trajectory(1).to_json())
    path = write()
    record = json.loads(good)
    start_iou = json.dumps(record | {"start_iou": -0.1})
    broken = [good[:-20], "3", "{}", json.dumps(record | {"steps": 3}), json.dumps(record | {"stop": "bored"})]
    record["steps"][0]["iou"] = 1.5
    broken += [start_iou, json.dumps(record)]
    for line in broken:
        path.write_text(f"{good}\n\n{line}\n")
        with pytest.raises(ValueError, match=r"t\.jsonl, line 3: .*; mend the file or pass on_error='skip'"):
            TrajectoryDataset(path, Pictures())
    path.write_text("\n".join([*broken, good]))
    unknown = json.dumps(trajectory(1, image="c").to_json())
    path.write_text("\n".join([*broken, good, unknown, json.dumps(trajectory(1, caption=()).to_json())]))
    dataset = TrajectoryDataset(path, Pictures(), on_error="skip")
    assert len(dataset) == 2 and dataset[0].queries[0].masks == (square(6),)
    assert dataset.skipped == {"malformed trajectory": 7, "unknown image": 1, "without caption": 1}
    with pytest.raises(ValueError, match="image 'c' is no sample id of pictures"):
        TrajectoryDataset(write(trajectory(1, image="c")), Pictures())
    record = trajectory(2).to_json()
    record["steps"][1]["mask"]["counts"] = "oops"
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"t\.jsonl, trajectory of image 'a' at byte 0: .*; record it again"):
        TrajectoryDataset(path, Pictures())[1]
    with pytest.raises(ValueError, match=r"does not fit the trajectory on image 'a'"):
        TrajectoryDataset(write(trajectory(1)), Pictures(size=(12, 17)))[0]


def test_wrong_arguments(write, tmp_path):
    path = write(trajectory(1))
    for arguments, message in [
        ({"final": "maybe"}, "final is 'maybe'"),
        ({"repeat_first": 0}, "repeat_first is 0"),
        ({"on_error": "cry"}, "on_error is 'cry'"),
        ({"images": tmp_path}, "either the source"),
        ({"source": None}, "either the source"),
        ({"source": None, "images": tmp_path / "no"}, "image folder .* does not exist"),
        ({"trajectories": []}, "trajectories is empty"),
        ({"trajectories": tmp_path / "no.jsonl"}, "no trajectory file"),
        ({"trajectories": write(trajectory(0), name="none.jsonl")}, "no trajectory can be used.*without steps"),
    ]:
        with pytest.raises(ValueError, match=message):
            TrajectoryDataset(**({"trajectories": path, "source": Pictures()} | arguments))


class Scenes(SampleDataset):
    """Synthetic scenes."""

    name, skipped = "scenes", {}

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Sample:
        return make_scene("flat-96", 0, range(3)[index]).to_sample()


def test_recorded_scenes_in_other_processes(tmp_path):
    """From the oracle to a label, through a pickle, and through a concatenation."""
    scenes, environment = Scenes(), DisksEnvironment(9, 5)
    recorded = [t for sample in scenes for t in record_sample(sample, environment, Rules(max_clicks=4))]
    path = tmp_path / "scenes.jsonl"
    write_trajectories(path, recorded)
    dataset = pickle.loads(pickle.dumps(TrajectoryDataset(path, scenes, group_first=False)))
    assert len(dataset) == sum(len(t.steps) + 1 for t in recorded if t.steps)
    grouped = TrajectoryDataset(path, scenes)
    asked = [query.id for sample in dataset for query in sample.queries]
    assert sorted(asked) == sorted(
        query.id for sample in grouped for query in sample.queries
    )  # nothing lost, nothing twice
    firsts = [sample for sample in grouped if sample.queries[0].start is None and sample.queries[0].next_click.click]
    assert [sample.id for sample in firsts] == [sample.id for sample in scenes]  # each plain image is one sample
    assert list(grouped.query_counts()) == [(sample.id, 1) for sample in grouped for _ in sample.queries]
    for sample in dataset:
        for query in sample.queries:
            so_far = query.start or Mask.empty(sample.size)
            assert so_far.iou(query.target(sample.size)) == pytest.approx(query.next_click.iou)
            if click := query.next_click.click:
                assert query.masks[0].array[click.row, click.col] == click.is_positive
    whole = Concat([scenes])
    write_trajectories(path, [replace(t, image=f"scenes/{t.image}") for t in recorded])
    assert TrajectoryDataset(path, whole)[0].load_image() == scenes[0].load_image()


def test_a_config_can_name_it(write, tmp_path):
    Image.new("RGB", SIZE[::-1]).save(tmp_path / "a.png")
    config = {"trajectories": str(write(trajectory(1))), "images": str(tmp_path), "repeat_first": 2}
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps({"class_path": "mmseg_llm.data.TrajectoryDataset", "init_args": config}))
    assert len(read_part(path, "dataset", "", SampleDataset, is_subclass=True)) == 3
