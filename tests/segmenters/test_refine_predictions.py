"""`refine_predictions`: answers of several heads on several images, each image opened and refined once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmseg_llm.masks import Mask
from mmseg_llm.segmenters import RefineError, Refiner, SamRefiner, SegmentAnythingEngine, refine_predictions
from mmseg_llm.structures import Measurement, Prediction
from segmenters.tiny_sam import make_sam


class Recording(Refiner):
    """Answers with the coarse mask turned upside down and notes what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple[int, ...]]] = []

    def _refine(self, image: Image.Image, coarse_logits: torch.Tensor) -> list[Mask]:
        self.calls.append((image.getpixel((0, 0))[0], tuple(coarse_logits.shape)))
        size = (image.height, image.width)
        large = torch.nn.functional.interpolate(coarse_logits[:, None], size)[:, 0] > 0
        return [Mask.from_array(row.flip(0).numpy()) for row in large]


def block(top: int, size: tuple[int, int] = (20, 30)) -> Mask:
    array = np.zeros(size, bool)
    array[top : top + 4, 5:9] = True
    return Mask.from_array(array)


@pytest.fixture
def images(tmp_path):
    paths = []
    for number, size in enumerate(((30, 20), (30, 20), (10, 40))):
        paths.append(tmp_path / f"{number}.png")
        Image.new("RGB", size, (number * 10, 0, 0)).save(paths[-1])
    return paths


def test_images_are_gathered_and_order_score_and_fields_kept(images):
    logits = np.full((4, 6), -2.0, np.float32)
    logits[0, 1] = 1.0
    predictions = [
        Prediction("a", (20, 30), "0", "x", mask=block(0), box=block(0).box, score=0.9, image=images[0]),
        Prediction("b", (20, 30), "1", "y", mask=block(3), score=0.8, image=str(images[1]), text="said"),
        Prediction("c", (20, 30), "2", "x", mask=block(9), score=0.7, image=str(images[0]), mask_logits=logits),
        Prediction("d", (20, 30), "3", "x", mask=block(5), score=0.6, image=images[0], exists=False),
        Prediction("e", (20, 30), "4", "x", score=0.5, image=images[0], measurement=Measurement(2.0)),
        Prediction("f", (20, 30), "5", "x", mask=block(12), score=0.4, image=images[0]),
        Prediction("g", (40, 10), "6", "z", mask=Mask.empty((40, 10)), score=0.3, image=images[2]),
    ]
    refiner = Recording()
    refined = refine_predictions(refiner, predictions)
    assert [prediction.query for prediction in refined] == list("abcdefg")
    assert [prediction.score for prediction in refined] == [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
    assert refined[3] is predictions[3]
    assert refined[4] is predictions[4]
    assert refined[0].mask == block(16)
    assert refined[0].box == (5.0, 16.0, 9.0, 20.0)
    assert refined[1].mask == block(13)
    assert refined[1].text == "said"
    assert refined[2].box == (5.0, 15.0, 10.0, 20.0), "from its logits, not from its mask"
    assert refined[5].mask == block(4)
    assert refined[6].mask.area == 0
    assert refined[6].box is None
    assert sorted(refiner.calls) == [(0, (1, 4, 6)), (0, (2, 20, 30)), (10, (1, 20, 30))]
    assert refine_predictions(refiner, []) == []


def test_order_does_not_matter_and_one_embedding_serves_all_heads(images):
    engine = SegmentAnythingEngine.of(make_sam())
    embed, seen = engine.embed, []
    engine.embed = lambda image: seen.append(image.size) or embed(image)
    coarse = np.where(np.arange(12).reshape(3, 4) % 5 < 2, 1.0, -1.0).astype(np.float32)
    predictions = [
        Prediction(str(i), (20, 30), str(i), f"s{i % 2}", mask=block(2 * i), image=images[i % 2],
                   mask_logits=coarse if i in {2, 3} else None)
        for i in range(6)
    ]  # fmt: skip
    refined = refine_predictions(SamRefiner(engine), predictions)
    assert len(seen) == 2, "two images, whatever the resolutions of their maps"
    backwards = refine_predictions(SamRefiner(engine), predictions[::-1])[::-1]
    assert [prediction.mask for prediction in refined] == [prediction.mask for prediction in backwards]


def test_images_in_memory_are_told_apart():
    first, second = (Image.new("RGB", (30, 20), (value, 0, 0)) for value in (10, 20))
    predictions = [
        Prediction("q", (20, 30), sample_id="image_0", mask=block(0), image=image) for image in (first, second, first)
    ]
    refiner = Recording()
    refine_predictions(refiner, predictions)
    assert sorted(refiner.calls) == [(10, (2, 20, 30)), (20, (1, 20, 30))], "ids repeat between calls"


def test_what_is_missing_is_named(images):
    with pytest.raises(RefineError, match=r"prediction 'q' of sample 's' carries no image.*dataclasses\.replace"):
        refine_predictions(Recording(), [Prediction("q", (20, 30), sample_id="s", mask=block(0))])
    with pytest.raises(RefineError, match=r"is \(40, 10\) .* but the prediction was made at \(20, 30\)"):
        refine_predictions(Recording(), [Prediction("q", (20, 30), mask=block(0), image=images[2])])
    with pytest.raises(ValueError, match=r"gone\.png does not exist"):
        refine_predictions(Recording(), [Prediction("q", (20, 30), mask=block(0), image="gone.png")])
