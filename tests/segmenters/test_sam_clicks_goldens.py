"""Parity with SAM as SegAgent clicks on it (goldens README, "segagent_sam")."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden_files import generated, golden_files, read_golden, unpack_bits
from PIL import Image

from mmseg_llm.segmenters import SamEngine
from mmseg_llm.segmenters.sam_clicks import SamEnvironment
from mmseg_llm.structures import Click
from segmenters.tiny_sam import error_of, golden_engine

pytestmark = pytest.mark.golden

DIFFERENT_PIXELS = 5e-4


def record(monkeypatch: pytest.MonkeyPatch, engine: SamEngine) -> list[torch.Tensor]:
    """The scores of all candidates of every decoder call from here on."""
    scores = []
    decode = engine.decode_candidates

    def recording(*args, **asked):
        result = decode(*args, **asked)
        scores.append(result[1])
        return result

    monkeypatch.setattr(engine, "decode_candidates", recording)
    return scores


def make_environment(engine: SamEngine, library: str, meta: dict) -> tuple[SamEnvironment, Image.Image]:
    """The golden's network on its generated image embedding."""
    embedding = generated(meta, "input.image_embedding")
    engine.embed = lambda image: [embedding] if library == "transformers" else embedding
    height, width = meta["config"]["original_size"]
    return SamEnvironment(engine), Image.new("RGB", (width, height))


@pytest.mark.parametrize("library", ["segment_anything", "transformers"])
@pytest.mark.parametrize("path", golden_files("segagent_sam*"), ids=lambda path: path.stem)
def test_segagent_sam(path: Path, library: str, monkeypatch: pytest.MonkeyPatch):
    tensors, meta = read_golden(path)
    environment, image = make_environment(golden_engine(library, meta), library, meta)
    scores = record(monkeypatch, environment.engine)
    errors, different = {"low_res": 0.0, "iou": 0.0}, 0.0

    def check(name: str):
        logits = environment.snapshot().logits.flatten()[tensors["low_res_index"]]
        errors["low_res"] = max(errors["low_res"], error_of(logits, tensors[f"{name}.low_res"]))
        errors["iou"] = max(errors["iou"], error_of(scores[-1][0], tensors[f"{name}.scores"]))
        assert int(scores[-1][0].argmax()) == int(tensors[f"{name}.best"]), name

    environment.reset(image)
    for i in range(sum(key.endswith(".points") for key in tensors)):
        (x, y), label = tensors[f"click{i}.points"][-1].tolist(), int(tensors[f"click{i}.labels"][-1])
        observation = environment.step(Click(y, x, bool(label)))  # the vectors have halves of pixels
        check(f"click{i}")
        expected = unpack_bits(tensors[f"click{i}.mask_bits"], meta["config"]["original_size"])
        different = max(different, float((observation.mask != expected).mean()))
    environment.reset(image, box=tuple(tensors["box"].tolist()))
    check("box")
    print(path.stem, library, {kind: f"{error:.1e}" for kind, error in errors.items()}, f"mask {different:.5f}")
    assert all(error <= meta["tolerance"][kind] for kind, error in errors.items()), errors
    assert different <= DIFFERENT_PIXELS
