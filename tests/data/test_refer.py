"""The RefCOCO family: layouts, splits, joins, real references."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from mmseg_llm.data import Concat, ReferDataset
from mmseg_llm.data.unpickle import ForbiddenGlobalError

SQUARE = [[1, 1, 5, 1, 5, 4, 1, 4]]
OTHER = [[6, 4, 9, 4, 9, 8, 6, 8]]


def ref(ref_id, annotation, image_id, split, *texts):
    sentences = [{"sent_id": 10 * ref_id + i, "sent": text, "raw": text} for i, text in enumerate(texts)]
    return {"ref_id": ref_id, "ann_id": annotation, "image_id": image_id, "split": split, "sentences": sentences}


REFS = [
    ref(1, 10, 1, "train", "left cat", "cat"),
    ref(2, 12, 2, "testA", "dog"),
    ref(3, 11, 1, "train", "right cat"),
    ref(4, 12, 2, "testB", "brown dog"),
]
GREFS = [ref(1, [10, 11], 1, "val", "both cats"), ref(2, [-1], 1, "val", "bird"), ref(3, [], 2, "val", "cow")]


@pytest.fixture
def root(tmp_path):
    """A RefCOCO and a gRefCOCO folder in one."""
    folder = tmp_path / "refcoco"
    folder.mkdir()
    boxes = [(10, 1, SQUARE), (11, 1, OTHER), (12, 2, SQUARE), (13, 2, [])]
    instances = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": 8, "width": 10} for i in (1, 2)],
        "annotations": [{"id": i, "image_id": image, "segmentation": shape} for i, image, shape in boxes],
    }
    (folder / "instances.json").write_text(json.dumps(instances), encoding="utf-8")
    write(folder, REFS)
    (folder / "grefs(unc).json").write_text(json.dumps(GREFS), encoding="utf-8")
    return folder


def write(folder, refs, name="refs(unc).p"):
    (folder / name).write_bytes(pickle.dumps(refs, protocol=2))


def texts(dataset):
    return [[query.text for query in sample.queries] for sample in dataset]


def test_grouping(root):
    by_image = ReferDataset(root=root, split_by="unc", split="train")
    assert texts(by_image) == [["left cat", "cat", "right cat"]]
    sample = by_image[0]
    assert (sample.id, sample.size, sample.source) == ("1", (8, 10), "refcoco_unc_train")
    assert [query.id for query in sample.queries] == ["1-10", "1-11", "3-30"]
    assert sample.queries[0].masks[0] is sample.queries[1].masks[0], "an instance is decoded once"
    assert sample.queries[2].boxes == ((6.0, 4.0, 9.0, 8.0),)
    assert sample.image == root.parent / "images/mscoco/images/train2014/1.jpg"
    single = ReferDataset(root=root, split_by="unc", split="train", group="expression", max_samples=2)
    assert texts(single) == [["left cat"], ["cat"]]
    assert set(single.index.annotations) == {10}


@pytest.mark.parametrize(
    ("split", "expected"), [("testA", [["dog"]]), ("testB", [["brown dog"]]), ("test", [["dog", "brown dog"]])]
)
def test_splits(root, split, expected):
    assert texts(ReferDataset(root=root, split_by="unc", split=split)) == expected
    assert ReferDataset(root=root, split_by="unc", split=None).describe()["queries"] == 5
    with pytest.raises(ValueError, match="no references of the split 'val'; it has testA, testB, train"):
        ReferDataset(root=root, split_by="unc", split="val")


def test_several_targets_and_none(root):
    dataset = ReferDataset(root=root, split_by="unc", split="val", grefs=True)
    both, bird, cow = (query for sample in dataset for query in sample.queries)
    assert both.target((8, 10)).area == 24 and len(both.boxes) == 2 and not both.is_no_target
    assert bird.masks == cow.masks == () and bird.is_no_target and cow.is_no_target
    facts = dataset.describe()
    assert (facts["queries"], facts["no_target"], facts["multi_target"], facts["images"]) == (3, 2, 1, 2)
    (root / "refs(unc).p").unlink()
    assert len(ReferDataset(root=root, split_by="unc", split="val")) == 2, "found without being told"


@pytest.mark.parametrize(
    ("bad", "reason", "message"),
    [
        (ref(9, 99, 1, "train", "x"), "missing annotation", "reference 9: annotation 99 is not in"),
        (ref(9, 10, 7, "train", "x"), "missing image", "reference 9: image 7 is not in"),
        (ref(9, 13, 2, "train", "x"), "no mask", "reference 9: annotation 13 has no mask in"),
        (ref(9, 10, 2, "train", "x"), "other image", "reference 9: annotation 10 is not on image 2 in"),
    ],
)
def test_broken_join(root, bad, reason, message):
    write(root, [*REFS, bad])
    with pytest.raises(ValueError, match=message) as error:
        ReferDataset(root=root, split_by="unc", split="train")
    assert "refs(unc).p" in str(error.value) and "on_error='skip'" in str(error.value)
    dataset = ReferDataset(root=root, split_by="unc", split="train", on_error="skip")
    assert dataset.skipped == {reason: 1} == dataset.describe()["skipped"]
    assert dataset.describe()["queries"] == 3


def test_repeated_sentence_ids_stay_distinct(root):
    write(root, [REFS[0], REFS[0]])
    dataset = ReferDataset(root=root, split_by="unc", split="train")
    assert [query.id for query in dataset[0].queries] == ["1-10", "1-11", "1-10.2", "1-11.2"]


def test_wrong_arguments(root):
    cases = [
        ({"split_by": "umd"}, r"has no refs\(umd\)\.p or .* \(it has grefs\(unc\)\.json, refs\(unc\)\.p\)"),
        ({"images": "nowhere"}, "image folder 'nowhere' does not exist"),
        ({"group": "batch"}, "group is 'batch'; use 'image' or 'expression'"),
        ({"on_error": "ignore"}, "use 'raise' or 'skip'"),
        ({"root": root / "none"}, "it has no reference file"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            ReferDataset(**{"root": root, "split_by": "unc", "split": "train"} | change)
    write(root, [{"ref_id": 5, "ann_id": 10}])
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p: reference 5 lacks 'image_id'"):
        ReferDataset(root=root, split_by="unc", split="train")
    write(root, [{**REFS[0], "sentences": [{"raw": "cat"}]}])
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p: a sentence of reference 1 lacks 'sent_id' or 'sent'"):
        ReferDataset(root=root, split_by="unc", split="train")
    write(root, {"refs": []})
    with pytest.raises(ValueError, match="is not a list of reference records"):
        ReferDataset(root=root, split_by="unc", split="train")


def test_numpy_pickle_needs_its_json_twin(root):
    write(root, [{**REFS[0], "ref_id": np.int64(1)}])
    with pytest.raises(ForbiddenGlobalError):
        ReferDataset(root=root, split_by="unc", split="train")
    (root / "refs(unc).json").write_text(json.dumps(REFS), encoding="utf-8")
    with pytest.warns(UserWarning, match="reading its twin"):
        dataset = ReferDataset(root=root, split_by="unc", split="train")
    assert dataset.path.name == "refs(unc).json" and len(dataset[0].queries) == 3


def check_real(dataset):
    for sample in dataset:
        assert np.asarray(sample.load_image()).shape == (*sample.size, 3)
        for query in sample.queries:
            assert query.text and query.target(sample.size).size == sample.size
            assert len(query.boxes) == len(query.masks)
            assert query.is_no_target == (query.masks == ())
    ids = [(sample.id, query.id) for sample in dataset for query in sample.queries]
    assert len(set(ids)) == len(ids)


def test_real_refcocog(shared_data):
    folder = shared_data / "refer_mini" / "refcocog"
    dataset = ReferDataset(root=folder, split_by="google", split="val")
    check_real(dataset)
    records = json.loads((folder / "refs(google).json").read_text(encoding="utf-8"))
    sentences = [sentence["sent"] for record in records for sentence in record["sentences"]]
    assert sorted(text for group in texts(dataset) for text in group) == sorted(sentences)
    assert len(dataset) == 8 and dataset.skipped == {}


@pytest.mark.filterwarnings("ignore:.*reading its twin")  # these pickles hold NumPy scalars
def test_real_refcoco_s(shared_data):
    arguments = {"root": shared_data / "refer_mini" / "refcoco_s", "split_by": "s", "split": None}
    arguments["images"] = "images/mscoco/images/val2017"
    plain = ReferDataset(**arguments)
    general = ReferDataset(**arguments, grefs=True, name="general")
    for dataset in (plain, general):
        check_real(dataset)
    assert (plain.describe()["queries"], plain.describe()["no_target"], len(plain)) == (29, 0, 26)
    assert (general.describe()["queries"], general.describe()["no_target"], len(general)) == (39, 10, 36)
    assert len(Concat([plain, general])) == len(plain) + len(general)
