"""Parity with the reference refinement of STAMP (goldens README, "stamp_labels_sam" and "stamp_sam_refine")."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from golden_files import generated, golden_files, read_golden, unpack_bits

from mmseg_llm.segmenters.prompts import content_size, mask_prompt, sample_points, upsample_logits
from mmseg_llm.segmenters.sam import cascade, to_original
from segmenters.tiny_sam import error_of, golden_engine

pytestmark = pytest.mark.golden


def parametrize(pattern: str):
    """One case per golden file, named after it."""
    return pytest.mark.parametrize("path", golden_files(pattern), ids=lambda path: path.stem)


@parametrize("stamp_labels_sam*")
def test_stamp_labels_sam_prompts(path: Path):
    tensors, meta = read_golden(path)
    tolerance = float(meta["tolerance"]["logits"])
    worst = 0.0
    for j in range(len(meta["sam_cases"])):
        case = {key.removeprefix(f"sam{j}."): value for key, value in tensors.items() if key.startswith(f"sam{j}.")}
        size = tuple(case["size"].tolist())
        mask = (upsample_logits(case["coarse"].float()[None] * 2 - 1, size)[0] > 0).numpy()
        assert np.array_equal(mask, unpack_bits(case["upsampled_bits"], size)), (j, "nearest upsampling")

        prompt = mask_prompt(mask, padding="official")
        assert abs(float(prompt.double().sum()) - float(case["logits_sum"])) < 1e-6 * prompt.numel()
        for name, values in {
            "logits": prompt.flatten()[case["logits_index"]],
            "logits_row128": prompt[128],
            "logits_col128": prompt[:, 128],
            "logits_last_row": prompt[-1],
            "logits_last_col": prompt[:, -1],
        }.items():
            error = error_of(values, case[name])
            worst = max(worst, error)
            assert error <= tolerance, (j, name, error)

        points, labels = sample_points(mask, 10, int(case["point_seed"]))
        assert torch.equal(points, case["points"]), (j, "points")
        assert torch.equal(labels, case["point_labels"]), (j, "labels")
    print(path.stem, f"largest error of the prompt logits {worst:.1e}")


@pytest.mark.parametrize("library", ["segment_anything", "transformers"])
@parametrize("stamp_sam_refine*")
@torch.inference_mode()
def test_stamp_sam_refine(path: Path, library: str):
    tensors, meta = read_golden(path)
    engine = golden_engine(library, meta)
    size = tuple(meta["config"]["original_size"])
    square = content_size(size, engine.image_side, engine.is_stretched)
    assert square == tuple(meta["config"]["resized"])

    embedding = generated(meta, "input.image_embedding")
    embedding = [embedding] if library == "transformers" else embedding
    scale = torch.tensor((square[1] / size[1], square[0] / size[0]), dtype=torch.float64)
    points, labels = (tensors["points"] * scale).float()[None], tensors["labels"][None]
    steps = sum(key.endswith(".low_res") for key in tensors)
    passes = cascade(engine, embedding, points, labels, tensors["mask_input"], steps)

    errors = {"low_res": 0.0, "iou": 0.0}
    for i, (logits, scores) in enumerate(passes):
        errors["low_res"] = max(
            errors["low_res"],
            error_of(logits.flatten()[tensors["low_res_index"]], tensors[f"cascade{i}.low_res"]),
            error_of(logits.double().mean(), tensors[f"cascade{i}.mean"]),
        )
        errors["iou"] = max(errors["iou"], error_of(scores, tensors[f"cascade{i}.iou"]))
    final = (to_original(passes[-1][0], engine, size)[0] > 0).numpy()
    different = float((final != unpack_bits(tensors["cascade_final_mask_bits"], size)).mean())
    print(path.stem, library, {kind: f"{error:.1e}" for kind, error in errors.items()}, f"mask {different:.5f}")
    assert all(error <= meta["tolerance"][kind] for kind, error in errors.items()), errors
    assert different <= 5e-4
