"""Refiners behind any head: in Perceiver, in the evaluator and on the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from mmseg_llm import bench_flows as bench
from mmseg_llm.cli import main
from mmseg_llm.data.base import SampleDataset
from mmseg_llm.evaluation import evaluate
from mmseg_llm.inference.perceiver import Perceiver
from mmseg_llm.masks import Mask
from mmseg_llm.segmenters import RefineError
from mmseg_llm.segmenters.base import Refiner
from mmseg_llm.training.checkpoint import CONFIG, save_weights


class Shift(Refiner):
    """Moves every mask down by a row; remembers what it was given."""

    def __init__(self) -> None:
        self.images: list = []

    def _refine(self, image, coarse_logits):
        self.images.append((image.size, len(coarse_logits)))
        height, width = image.height, image.width
        out = []
        for row in coarse_logits.numpy():
            fine = np.kron(row > 0, np.ones((height // row.shape[0], width // row.shape[1]))).astype(bool)
            out.append(Mask.from_array(np.roll(fine, 1, 0)))
        return out


class Broken(Refiner):
    """Fails."""

    def _refine(self, image, coarse_logits):
        raise RefineError("the segmenter ran out of memory; lower batch_size")


class Scenes(SampleDataset):
    """Two scenes."""

    def __init__(self) -> None:
        self.name, self.skipped, self.samples = "scenes", {}, bench.scenes("flat-96", 2, 3)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        return self.samples[index]


@pytest.fixture(scope="module", params=["mask_decoder", "all_mask"])
def model(request):
    return bench.untrained_model("internvl-tiny", request.param)


def test_perceiver_refines_what_it_predicts(model):
    sample = bench.scenes("flat-96", 1, 3)[0]
    texts = [query.text for query in sample.queries]
    plain = Perceiver(model).predict(sample.load_image(), texts)
    refiner = Shift()
    refined = Perceiver(model, refiner).predict(sample.load_image(), texts)
    drawn = [p for p in plain if p.exists]
    assert refiner.images == [((96, 96), len(drawn))] and drawn  # one call for all masks of the image
    for p, q in zip(plain, refined):
        assert (p.query, p.text, p.score, p.exists) == (q.query, q.text, q.score, q.exists)
        if p.exists and model.head().name == "all_mask":
            cells = np.kron(p.mask_logits > 0, np.ones((16, 16))).astype(bool)
            assert np.array_equal(q.mask.array, np.roll(cells, 1, 0))
        if p.exists:
            assert q.box == q.mask.box


def test_evaluation_names_its_refiner(model, tmp_path):
    reports = [evaluate(model, Scenes(), tmp_path / f"{i}.json", refiner=r) for i, r in enumerate((None, Shift()))]
    assert [report["protocol"]["refiner"] for report in reports] == ["", "Shift()"]
    masks = [[r["mask"] for r in json.loads((tmp_path / f"{i}.json").read_text())["predictions"]] for i in (0, 1)]
    assert masks[0] != masks[1]


def test_failures_are_reported(model, tmp_path):
    """Never an empty mask in place of a failure, and no half-written file."""
    with pytest.raises(RefineError, match="ran out of memory; lower batch_size"):
        evaluate(model, Scenes(), tmp_path / "out.json", refiner=Broken())
    assert list(tmp_path.iterdir()) == []


def test_protocol_of_perceiver(model):
    sample = bench.scenes("flat-96", 1, 2)[0]
    forced = model.head().protocols[1]
    perceiver = Perceiver(model)
    expected = model.predict([sample], protocol=forced)
    found = perceiver.predict(sample.load_image(), [q.text for q in sample.queries], protocol=forced)
    assert [p.mask for p in found] == [p.mask for p in expected]
    with pytest.raises(ValueError, match="has no protocol 'magic'"):
        perceiver.predict(sample.load_image(), "x", protocol="magic")


def test_command_line(tmp_path, capsys):
    import yaml

    folder = tmp_path / "run"
    save_weights(bench.untrained_model("internvl-tiny", "all_mask"), folder)
    backbone = {"class_path": "mmseg_llm.backbones.InternVLBackbone", "init_args": {"source": "internvl-tiny"}}
    heads = {"all_mask": {"class_path": "mmseg_llm.heads.AllMaskHead"}}
    (folder / CONFIG).write_text(yaml.safe_dump({"model": {"backbone": backbone, "heads": heads}}))
    image = tmp_path / "a.png"
    bench.scenes("flat-96", 1, 1)[0].load_image().save(image)
    masks = []
    for name, extra in (("plain", []), ("refined", ["--refiner", "configs/segmenters/grabcut.yaml"])):
        out = tmp_path / name
        arguments = ["--checkpoint", str(folder), "--image", str(image), "--query", "the circle", "--output", str(out)]
        assert main(["predict", *arguments, "--protocol", "force_segment", *extra]) == 0
        (mask,) = out.rglob("*.png")
        masks.append(np.asarray(Image.open(mask)))
    assert masks[0].shape == masks[1].shape == (96, 96) and (masks[0] != masks[1]).any()
    assert main(["predict", *arguments, "--refiner", "nowhere.yaml"]) == 2
    assert "no refiner config 'nowhere.yaml'" in capsys.readouterr().err
