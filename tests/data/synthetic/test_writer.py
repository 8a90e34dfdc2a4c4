"""Written datasets: real formats, whole or absent, the same for any number of workers."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmseg_llm.data.refer import ReferDataset
from mmseg_llm.data.synthetic import make_scene, write_dataset
from mmseg_llm.data.synthetic import writer as writer_module

SPLITS = {"train": 40, "val": 8}


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("flat") / "data"
    write_dataset(root, "flat-96", SPLITS, seed=3)
    return root


@pytest.fixture(scope="module")
def solid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("solid") / "data"
    write_dataset(root, "solid-128", {"train": 6}, seed=3)
    return root


def _digests(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_content_does_not_depend_on_workers(flat: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    report = write_dataset(
        tmp_path / "new", "flat-96", SPLITS, seed=3, workers=2, progress=lambda *done: calls.append(done)
    )
    assert not report["is_reused"] and calls == [(i + 1, 48) for i in range(48)]
    assert _digests(tmp_path / "new") == _digests(flat)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_coco_reads_the_instances(flat: Path) -> None:
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(flat / "instances.json"))
    assert len(coco.imgs) == 48
    scene = make_scene("flat-96", 3, 0, stream="train")
    annotations = coco.imgToAnns[1]
    assert len(annotations) == len(scene.masks)
    for annotation, mask, box, name in zip(annotations, scene.masks, scene.boxes, scene.categories, strict=True):
        assert np.array_equal(coco.annToMask(annotation).astype(bool), mask) and annotation["area"] == mask.sum()
        x, y, width, height = annotation["bbox"]
        assert (x, y, x + width, y + height) == box and annotation["iscrowd"] == 0
        assert coco.cats[annotation["category_id"]]["name"] == name
    assert np.array_equal(np.asarray(Image.open(flat / "images" / coco.imgs[1]["file_name"])), scene.image)


def test_references_follow_the_layouts(flat: Path) -> None:
    raw = (flat / "refs(synthetic).p").read_bytes()
    assert raw[:2] == b"\x80\x02"
    refs = pickle.loads(raw)
    assert refs == json.loads((flat / "refs(synthetic).json").read_text())
    grefs = json.loads((flat / "grefs(synthetic).json").read_text())
    keys = {"ref_id", "ann_id", "image_id", "category_id", "file_name", "split", "sent_ids", "sentences"}
    assert all(set(ref) == keys and isinstance(ref["ann_id"], int) for ref in refs)
    assert all(set(ref) == keys | {"no_target"} for ref in grefs)
    assert all((ref["ann_id"] == [-1]) == ref["no_target"] == (ref["category_id"] == [-1]) for ref in grefs)
    for ref in (*refs, *grefs):
        assert ref["sent_ids"] == [sentence["sent_id"] for sentence in ref["sentences"]]
        assert all(sentence["tokens"] == sentence["sent"].split() for sentence in ref["sentences"])
    ids = [sent_id for ref in grefs for sent_id in ref["sent_ids"]]
    assert sorted(ids) == list(range(1, len(ids) + 1))
    assert {i for ref in refs for i in ref["sent_ids"]} < set(ids)
    manifest = json.loads((flat / "dataset.json").read_text())
    assert manifest["counts"]["expressions"] == len(ids)
    assert manifest["instances_sha256"] == hashlib.sha256((flat / "instances.json").read_bytes()).hexdigest()


@pytest.mark.parametrize("grefs", [True, False])
def test_reader_gives_back_the_scenes(flat: Path, grefs: bool) -> None:
    dataset = ReferDataset(root=flat, split_by="synthetic", split="val", grefs=grefs)
    by_image = {Path(dataset[i].image).name: dataset[i] for i in range(len(dataset))}
    assert not grefs or len(by_image) == SPLITS["val"]
    for index in range(SPLITS["val"]):
        scene = make_scene("flat-96", 3, index, stream="val")
        expected = {e.text: e.targets for e in scene.expressions if grefs or len(e.targets) == 1}
        sample = by_image.get(f"val_{index:06d}.png")
        found = {query.text: query for query in sample.queries} if sample else {}
        assert set(found) == set(expected)
        for text, targets in expected.items():
            assert np.array_equal(found[text].target(sample.size).array, scene.masks[list(targets)].any(0))


def test_splits_show_different_scenes(flat: Path) -> None:
    images = [path.read_bytes() for path in (flat / "images").iterdir()]
    assert len(set(images)) == len(images) == 48


def test_depth_and_intrinsics(solid: Path) -> None:
    intrinsics = json.loads((solid / "intrinsics.json").read_text())
    assert intrinsics["distance"] == "planar"
    for index in range(6):
        scene = make_scene("solid-128", 3, index, stream="train")
        name = f"train_{index:06d}.png"
        stored = np.asarray(Image.open(solid / "depth" / name))
        assert stored.dtype == np.uint16
        assert np.abs(stored * intrinsics["metres_per_unit"] - scene.depth).max() <= 0.00051
        assert intrinsics["images"][name]["fx"] == scene.camera.fx


def test_flat_levels_have_no_depth_and_questions_have_masks(flat: Path) -> None:
    assert not (flat / "depth").exists() and not (flat / "intrinsics.json").exists()
    lines = [json.loads(line) for line in (flat / "questions.jsonl").read_text().splitlines()]
    assert [line["split"] for line in lines] == ["train"] * 40 + ["val"] * 8
    assert all((flat / "images" / line["file_name"]).is_file() for line in lines)
    assert all(mask["size"] == [96, 96] for line in lines for q in line["questions"] for mask in q["masks"])


def test_same_request_returns_at_once_and_others_are_refused(flat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "_write", None)  # would fail if called
    assert write_dataset(flat, "flat-96", SPLITS, seed=3)["is_reused"]
    for changes, culprit in (
        ({"seed": 4}, "seed"),
        ({"splits": {"train": 1}}, "splits"),
        ({"level": "flat-128"}, "level"),
    ):
        arguments = {"level": "flat-96", "splits": SPLITS, "seed": 3, **changes}
        with pytest.raises(ValueError, match=f"another {culprit}"):
            write_dataset(flat, **arguments)


def test_foreign_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("three years of work")
    with pytest.raises(ValueError, match="not empty"):
        write_dataset(tmp_path, "flat-96", {"train": 1})
    (tmp_path / "dataset.json").write_text("[]")
    with pytest.raises(ValueError, match="manifest"):
        write_dataset(tmp_path, "flat-96", {"train": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset.json", "thesis.txt"]


def test_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "data", "flat-96", {"train": 2}, progress=interrupt)
    assert not list(tmp_path.iterdir())
    assert not write_dataset(tmp_path / "data", "flat-96", {"train": 2})["is_reused"]


@pytest.mark.parametrize("splits", [{}, {"train": 0}, {"../up": 1}])
def test_wrong_splits_are_refused(tmp_path: Path, splits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="split"):
        write_dataset(tmp_path / "data", "flat-96", splits)
