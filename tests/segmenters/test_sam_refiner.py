"""SamRefiner over its three engines: the package's own predictor as judge, batches, seeds, failures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor

from mmseg_llm.masks import Mask
from mmseg_llm.segmenters import RefineError, SamRefiner, SegmentAnythingEngine
from mmseg_llm.segmenters.prompts import mask_prompt, sample_points, upsample_logits
from segmenters.tiny_sam import SAM, make_engine, make_image, make_logits

KINDS = pytest.mark.parametrize("kind", ["segment_anything", "transformers", "sam2"])


class Counting:
    """Wraps `engine.embed` and `engine.decode` and counts them."""

    def __init__(self, engine) -> None:
        self.embeds = self.decodes = 0
        embed, decode = engine.embed, engine.decode

        def counted_embed(image):
            self.embeds += 1
            return embed(image)

        def counted_decode(*args):
            self.decodes += 1
            return decode(*args)

        engine.embed, engine.decode = counted_embed, counted_decode


@pytest.mark.parametrize("size", [(90, 120), (150, 101), (128, 128)])
@pytest.mark.parametrize("padding", ["official", "fixed"])
def test_cascade_equals_the_predictor_of_the_package(size, padding):
    image, logits = make_image(*size), make_logits()
    refined = SamRefiner(SegmentAnythingEngine.of(SAM), padding=padding, seed=5).refine(image, logits)
    predictor = SamPredictor(SAM)
    predictor.set_image(np.array(image))
    foregrounds = []
    for mask, coarse in zip(refined, upsample_logits(logits, size) > 0, strict=True):
        points, labels = sample_points(coarse.numpy(), 10, 5)
        low_res = mask_prompt(coarse.numpy(), predictor.model.prompt_encoder.mask_input_size[0], padding)[None].numpy()
        for _ in range(3):
            expected, _, low_res = predictor.predict(
                points.numpy(), labels.numpy(), mask_input=low_res, multimask_output=False
            )
        assert (mask.array != expected[0]).mean() <= 1e-3
        foregrounds.append(expected.mean())
    assert any(0.02 < share < 0.98 for share in foregrounds), f"masks that say nothing: {foregrounds}"


@KINDS
def test_batched_equals_one_by_one_and_embeds_once(kind):
    image, logits = make_image(), make_logits(7)
    engine = make_engine(kind)
    count = Counting(engine)
    batched = SamRefiner(engine, batch_size=4).refine(image, logits)
    assert count.embeds == 1
    assert count.decodes == 3 * 3, "two batches of masks with 20 points, one mask without background points"
    single = SamRefiner(engine, batch_size=1)
    alone = [single.refine(image, row[None])[0] for row in logits]
    assert count.embeds == 2, "the embedding of the last image is kept"
    reverse = SamRefiner(engine).refine(image, logits.flip(0))[::-1]
    for mask, other, turned in zip(batched, alone, reverse, strict=True):
        assert mask.size == (90, 120)
        assert (mask.array != other.array).mean() <= 1e-3
        assert (mask.array != turned.array).mean() <= 1e-3


@KINDS
@torch.inference_mode()
def test_decoding_is_independent_of_the_batch(kind):
    engine = make_engine(kind)
    embedding = engine.embed(make_image())
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(3, 4, 2, generator=generator) * engine.image_side
    labels = torch.tensor([[1, 1, 0, 0]]).expand(3, -1)
    prompts = torch.randn(3, engine.mask_side, engine.mask_side, generator=generator) * 5
    logits, scores = engine.decode(embedding, points, labels, prompts)
    for row in range(3):
        chosen = slice(row, row + 1)
        one, score = engine.decode(embedding, points[chosen], labels[chosen], prompts[chosen])
        torch.testing.assert_close(logits[chosen], one, rtol=0, atol=1e-5)
        torch.testing.assert_close(scores[chosen], score, rtol=0, atol=1e-5)
    assert (logits[0] - logits[1]).abs().max() > 1e-3, "prompts make a difference"


@torch.inference_mode()
def test_both_libraries_agree_on_the_same_weights():
    first, second = make_engine("segment_anything"), make_engine("transformers")
    embedding = first.embed(make_image())
    points, labels = torch.tensor([[[10.0, 20.0], [70.0, 90.0]]]), torch.tensor([[1, 0]])
    prompts = torch.randn(1, first.mask_side, first.mask_side, generator=torch.Generator().manual_seed(1))
    assert first.mask_side == second.mask_side
    expected, actual = (
        engine.decode(given, points, labels, prompts) for engine, given in ((first, embedding), (second, [embedding]))
    )
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=2e-5)


@KINDS
def test_seeds_are_reproducible_and_the_global_generator_is_untouched(kind):
    image, logits = make_image(), make_logits()
    engine = make_engine(kind)
    before = torch.get_rng_state()
    first = SamRefiner(engine, seed=1).refine(image, logits)
    assert torch.equal(torch.get_rng_state(), before)
    assert SamRefiner(engine, seed=1).refine(image, logits) == first
    assert SamRefiner(engine, seed=2, num_points=3).refine(image, logits) != first


def test_a_coarse_map_without_foreground_is_not_asked():
    engine = make_engine("segment_anything")
    count = Counting(engine)
    logits = make_logits()
    logits[2] = -1.0
    masks = SamRefiner(engine).refine(make_image(), logits[2:])
    assert masks == [Mask.empty((90, 120))]
    assert (count.embeds, count.decodes) == (0, 0)
    masks = SamRefiner(engine).refine(make_image(), logits)
    assert masks[2].area == 0
    assert masks[0] == SamRefiner(engine).refine(make_image(), logits[:1])[0]
    assert SamRefiner(engine).refine(make_image(), logits[:0]) == []


def test_foreground_finer_than_a_pixel_is_not_asked():
    engine = make_engine("segment_anything")
    count = Counting(engine)
    logits = torch.full((1, 200, 240), -1.0)
    logits[0, 1, 1] = 1.0  # every second cell falls between the pixels of a 90 x 120 image
    assert SamRefiner(engine).refine(make_image(), logits) == [Mask.empty((90, 120))]
    assert count.embeds == 0


def test_an_image_is_known_by_its_content():
    engine = make_engine("segment_anything")
    count = Counting(engine)
    refiner = SamRefiner(engine)
    image = make_image()
    refiner.refine(image, make_logits())
    refiner.refine(image.copy(), make_logits())
    assert count.embeds == 1
    image.putpixel((3, 3), (1, 2, 3))
    refiner.refine(image, make_logits())
    assert count.embeds == 2


@pytest.mark.parametrize("broken", ["embed", "decode"])
def test_failures_inside_sam_are_raised(broken):
    engine = make_engine("segment_anything")

    def fail(*args):
        raise RuntimeError("CUDA out of memory")

    setattr(engine, broken, fail)
    with pytest.raises(RefineError, match=r"3 masks.*CUDA out of memory; lower `batch_size`"):
        SamRefiner(engine).refine(make_image(), make_logits())


def test_values_that_are_not_finite_are_raised():
    engine = make_engine("segment_anything")
    decode = engine.decode
    engine.decode = lambda *args: (decode(*args)[0] * float("nan"), None)
    with pytest.raises(RefineError, match="not finite in pass 1"):
        SamRefiner(engine).refine(make_image(), make_logits())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"padding": "zero"}, "padding is 'zero'; choose from official, fixed"),
        ({"upsample": "bicubic"}, "upsample is 'bicubic'"),
        ({"num_points": 0}, "num_points is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"model": "facebook/sam-vit-base", "checkpoint": "x.pth"}, "belongs to model vit_b"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        SamRefiner(**arguments)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (torch.zeros(5, 7), r"must be float \(Q, h, w\)"),
        (torch.zeros(2, 5, 7, dtype=torch.int64), "int64"),
        (torch.zeros(1, 0, 7), r"shape \(1, 0, 7\)"),
        (torch.tensor([[[1.0]], [[float("nan")]]]), "row 1 are not finite"),
    ],
)
def test_malformed_logits_are_named(logits, message):
    with pytest.raises(RefineError, match=message):
        SamRefiner(make_engine("segment_anything")).refine(make_image(), logits)
