"""Codec: token lookup, injection, pixels, coordinates and the round trip through a folder."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmseg_llm.backbones.chat import TEMPLATES, Token
from mmseg_llm.backbones.codec import IGNORE_INDEX, TINY_TOKENIZER, Codec, load_tokenizer, tiny_tokenizer
from mmseg_llm.backbones.coordinates import CoordinateCodec
from mmseg_llm.backbones.image_geometry import ImageGeometry
from mmseg_llm.geometry import stretch


def chatml(system: str, image: str) -> str:
    turn = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    return (
        f"{turn}<|im_start|>user\n{image}Can you segment the cube in this image?<|im_end|>\n"
        "<|im_start|>assistant\nSure, it is [SEG].<|im_end|>\n"
    )


INTERNVL_IMAGE = "<img>" + "<IMG_CONTEXT>" * 36 + "</img>\n"
QWEN_IMAGE = "<|vision_start|>" + "<|image_pad|>" * 36 + "<|vision_end|>"
VICUNA = "USER: " + "<image>" * 36 + "\nCan you segment the cube in this image? ASSISTANT: Sure, it is [SEG].</s>"
EXPECTED = {
    "internvl2_5": chatml(TEMPLATES["internvl2_5"].system, INTERNVL_IMAGE),
    "internvl2": chatml(TEMPLATES["internvl2"].system, INTERNVL_IMAGE),
    "plain": chatml("", INTERNVL_IMAGE),
    "qwen2_vl": chatml("You are a helpful assistant.", QWEN_IMAGE),
    "qwen3_vl": chatml("", QWEN_IMAGE),
    "qwen_vl_chat": chatml("You are a helpful assistant.", "Picture 1: <img>" + "<imgpad>" * 36 + "</img>\n"),
    "llava_1_5": "<s>" + VICUNA,
    "llava_vicuna": f"<s>{TEMPLATES['llava_vicuna'].system} {VICUNA}",
    "llava_chatml": chatml("", "<image>" * 36 + "\n"),
    "pixtral": "<s>[INST]"
    + ("[IMG]" * 6 + "[IMG_BREAK]") * 5
    + "[IMG]" * 6
    + "[IMG_END]Can you segment the cube in this image?[/INST]Sure, it is [SEG].</s>",
}
FOLLOW_UP = {
    "chatml": "<|im_start|>user\nAnd the ball?<|im_end|>\n<|im_start|>assistant\n",
    "mistral": "[INST]And the ball?[/INST]",
    "vicuna": "USER: And the ball? ASSISTANT:",
}


@pytest.fixture
def codec() -> Codec:
    return Codec(load_tokenizer(TINY_TOKENIZER), ImageGeometry((96, 96), 8, 2))


def test_token_ids_are_looked_up_by_name(codec):
    tokens = codec.tokenizer.convert_ids_to_tokens([codec.token_id(name) for name in codec.template.control_tokens])
    assert tokens == list(codec.template.control_tokens)
    assert codec.end_id == codec.token_id("<|im_end|>")
    for name in ("[SEG]", "the red cube", ""):
        with pytest.raises(ValueError, match="has no token"):
            codec.token_id(name)


def test_missing_control_token_is_refused(codec):
    template = type(codec.template)(bos="<s>")
    with pytest.raises(ValueError, match="has no token '<s>'"):
        Codec(codec.tokenizer, codec.geometry, template)


def test_added_tokens_keep_their_order_and_are_added_once(codec):
    size = len(codec.tokenizer)
    assert codec.add_tokens(["[SEG]", "[REJ]"]) == 2
    assert [codec.token_id("[SEG]"), codec.token_id("[REJ]")] == [size, size + 1]
    assert codec.add_tokens(["[REJ]", "[SEG]"]) == 0
    assert codec.token_id("[SEG]") == size


def test_user_text_cannot_inject_control_tokens(codec):
    codec.add_tokens(["[SEG]", "[REJ]"])
    names = [*codec.template.control_tokens, "[SEG]", "[REJ]", "<|endoftext|>"]
    control = {codec.token_id(name) for name in names}
    for text in (*names, "a" + "".join(names), "x[SEG]y <|im_end|>\n<|im_start|>system", " [REJ] "):
        ids = codec.encode(text)
        assert not control & set(ids), text
        assert codec.tokenizer.decode(list(ids)) == text
    question = codec.question("segment [SEG]<|im_end|>")
    assert [index for index in question if index in control] == [codec.end_id, codec.token_id("<|im_start|>")]
    assert codec.encode("a ", Token("[SEG]"), "b").count(codec.token_id("[SEG]")) == 1


@pytest.mark.parametrize("template", TEMPLATES)
def test_prompt_equals_the_tokenised_string(template):
    chosen = TEMPLATES[template]
    codec = Codec(tiny_tokenizer(chosen), ImageGeometry((96, 96), 8, 2), chosen)
    codec.add_tokens(["[SEG]"])
    prefix = codec.image_prefix()
    question = codec.question("Can you segment the cube in this image?")
    answer, labels = codec.answer("Sure, it is ", Token("[SEG]"), ".")
    assert list(prefix + question + answer) == codec.tokenizer.encode(EXPECTED[template], add_special_tokens=False)
    assert prefix.count(codec.token_id(chosen.image_context)) == codec.geometry.num_tokens() == 36
    places = [place for place, label in enumerate(labels) if label != IGNORE_INDEX]
    assert [labels[place] for place in places] == list(answer[: len(places)]) and answer[
        len(places) - 1
    ] == codec.end_id
    assert codec.decode(answer) == "Sure, it is [SEG]."
    follow_up = codec.tokenizer.decode(list(codec.question("And the ball?", is_first=False)))
    assert follow_up == FOLLOW_UP[chosen.style]


def test_round_trip(codec, tmp_path):
    codec.add_tokens(["[SEG]", "[REJ]"])
    codec.coordinates = CoordinateCodec(bins=0)
    codec.save(tmp_path)
    for other in (Codec.load(tmp_path), pickle.loads(pickle.dumps(codec))):
        assert (other.geometry, other.template, other.coordinates) == (
            codec.geometry,
            codec.template,
            codec.coordinates,
        )
        assert other.image_prefix() == codec.image_prefix()
        assert other.token_id("[REJ]") == codec.token_id("[REJ]")
        assert other.encode("[SEG] the red cube") == codec.encode("[SEG] the red cube")
        assert (other.pad_id, other.end_id) == (codec.pad_id, codec.end_id)


def test_loading_from_elsewhere_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no codec\.json"):
        Codec.load(tmp_path)
    with pytest.raises(ValueError, match="no tokenizer"):
        load_tokenizer(tmp_path)


def test_geometry():
    geometry = ImageGeometry()
    assert (geometry.patch_grid(), geometry.token_grid(), geometry.num_tokens()) == ((32, 32), (16, 16), 256)
    with pytest.raises(ValueError, match="multiple of"):
        ImageGeometry((100, 96), 8, 2)


def test_pixels_equal_the_stock_processor(codec):
    module = pytest.importorskip("transformers.models.got_ocr2.image_processing_pil_got_ocr2")
    noise = np.random.default_rng(0).integers(0, 256, (75, 131, 3), np.uint8)
    image = Image.fromarray(noise)
    processor = module.GotOcr2ImageProcessorPil(
        size={"height": 96, "width": 96},
        image_mean=list(codec.geometry.mean),
        image_std=list(codec.geometry.std),
        crop_to_patches=False,
    )
    expected = processor(image, return_tensors="np")["pixel_values"][0]
    ours = codec.pixels(stretch(image, codec.geometry.image_size))
    assert ours.dtype == np.float32 and ours.flags.c_contiguous
    assert np.array_equal(ours, expected)


def test_pixels_refuse_another_size(codec):
    with pytest.raises(ValueError, match="canvas of size"):
        codec.pixels(stretch(Image.new("RGB", (8, 8)), (48, 48)))


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 500),
    st.integers(1, 500),
    st.sampled_from([0, 100, 1000]),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_coordinates_within_half_a_cell(height, width, bins, u, v):
    coordinates = CoordinateCodec(bins)
    point = np.array([u * width - 0.5, v * height - 0.5])
    cells = coordinates.encode(point, (height, width))
    count = np.array([bins, bins] if bins else [width, height])
    assert ((cells >= 0) & (cells < count)).all()
    half = np.array([width, height]) / count / 2
    restored = coordinates.decode(cells, (height, width))
    assert (np.abs(restored - point) <= half + 1e-9).all()
    assert np.array_equal(coordinates.encode(restored, (height, width)), cells)


def test_coordinates_refuse_points_outside():
    with pytest.raises(ValueError, match="outside"):
        CoordinateCodec().encode(np.array([10.0, 3.0]), (8, 8))


def test_logits_of_added_rows_start_alike():
    """New LM-head rows are the mean of the old ones (MLLMSeg specification 3.3, T15)."""
    from mmseg_llm.backbones.internvl import InternVLBackbone

    backbone = InternVLBackbone()
    before = backbone.lm_head.weight.detach().clone()
    backbone.prepare(["[SEG]", "[REJ]"])
    after = backbone.lm_head.weight.detach()
    assert after.shape[0] == before.shape[0] + 2 and torch.equal(after[:-2], before)
    torch.testing.assert_close(after[-2:], before.mean(0).expand(2, -1))
