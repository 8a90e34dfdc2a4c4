"""Pixtral: rows of tokens, canvases, pixels and logits against the stock classes; images of several sizes; what trains."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.pixtral.image_processing_pixtral import get_resize_output_image_size

from backbones.pixtral_pieces import close, noise, prompt_of, stock_processor
from backbones.tiny import make_batch, resized, scenes, stock_states
from mmseg_llm.backbones.adapters import LORA_TARGETS, PROJECTIONS, Lora, Trainable
from mmseg_llm.backbones.chat import TEMPLATES, ChatTemplate
from mmseg_llm.backbones.image_geometry import ImageGeometry
from mmseg_llm.backbones.pixtral import PATCHES_PER_WIDTH, PixtralBackbone, packs
from mmseg_llm.geometry import stretch
from mmseg_llm.heads.mask_decoder.head import MaskDecoderHead
from mmseg_llm.model import PerceptionModel

SHAPES = ((96, 96), (60, 96), (36, 24))
FROZEN = Trainable(vision=False, projector=False, language=False, embeddings=False)


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return PixtralBackbone().eval()


def picture(shape, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8))


def padded(images, fill: float = float("nan")) -> torch.Tensor:
    """Images in the upper left corners; what is beside them must not matter."""
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    out = torch.full((len(images), 3, height, width), fill)
    for row, image in enumerate(images):
        out[row, :, : image.shape[1], : image.shape[2]] = image
    return out


# ---- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(96, 96), (50, 90), (131, 75), (12, 12), (1, 40), (40, 1), (13, 300)])
def test_tokens_are_those_of_the_stock_processor(backbone, shape):
    """A break behind every row, the end token in the place of the last one, question and answer in Mistral's turns."""
    codec, text = backbone.codec, "how far is it?"
    found = stock_processor(backbone)(text=f"<s>[INST][IMG]{text}[/INST]1.50</s>", images=picture(shape))
    canvas = codec.geometry.canvas_size(shape)
    answer, labels = codec.answer("1.50")
    assert answer == labels == (*codec.encode("1.50"), codec.token_id("</s>"))
    assert tuple(np.asarray(found["input_ids"][0])) == prompt_of(backbone, canvas, text) + answer
    rows, columns = codec.geometry.token_grid(canvas)
    places = [codec.token_id(name) for name in ("[IMG]", "[IMG_BREAK]", "[IMG_END]")]
    assert [codec.image_prefix(canvas).count(index) for index in places] == [rows * columns, rows - 1, 1]


def test_later_turns(backbone):
    """A new question follows the end of an answer at once."""
    codec = backbone.codec
    ids = codec.image_prefix((12, 12)) + codec.question("a") + codec.answer("b")[0]
    ids += codec.question("c", is_first=False) + codec.answer("d")[0]
    assert codec.tokenizer.decode(ids) == "<s>[INST][IMG][IMG_END]a[/INST]b</s>[INST]c[/INST]d</s>"
    assert codec.end_id == codec.token_id("</s>") and codec.decode(codec.answer("d")[0]) == "d"
    assert codec.token_id("[INST]") not in codec.encode("[INST]")  # words of a user are never control tokens


def test_positions_count_on(backbone):
    ids = prompt_of(backbone, (36, 24))
    positions, following = backbone.codec.positions(ids, (36, 24))
    assert positions.tolist() == [list(range(len(ids)))] and following == len(ids)


def test_the_style_has_no_system_turn():
    with pytest.raises(ValueError, match=r"has no system turn and needs user_end, but system is 'Hi' .* leave system"):
        ChatTemplate(system="Hi", user_end="[/INST]", style="mistral")
    with pytest.raises(ValueError, match="user_end None; leave system empty and name the token"):
        ChatTemplate(system="", style="mistral")


def test_images_without_breaks_stay_one_run():
    """Other families write what they wrote before."""
    for name, template in TEMPLATES.items():
        if name != "pixtral":
            parts = template.image(2, 3)
            assert parts == template.image(3, 2) == template.image(1, 6)
            assert parts.count(template.image_context) == 6
    plain = ChatTemplate(image_start=None, image_end=None, image_context="x", image_break="|")
    assert "".join(plain.image(3, 2)) == "xx|xx|xx"


# ---- canvases and pixels ----------------------------------------------------------------------------------------------

SIDES = st.one_of(st.integers(1, 60), st.integers(1, 4000))


@settings(max_examples=400, deadline=None)
@given(SIDES, SIDES, st.integers(1, 40), st.integers(0, 4000))
@example(643, 857, 16, 1008)  # iBims-1 at f = 750
@example(750, 1033, 16, 1008)  # SUN RGB-D: silently smaller with 1024
@example(1, 4000, 16, 1008)
def test_canvas_is_that_of_the_stock_processor(height, width, patch, more):
    longest = patch + more
    geometry = ImageGeometry((patch, patch), patch, 1, max_side=longest)
    stock = get_resize_output_image_size(np.zeros((3, height, width), np.uint8), longest, patch)
    if min(stock) == 0:
        with pytest.raises(ValueError, match=f"is more than {longest} times as long as it is wide, so that nothing"):
            geometry.canvas_size((height, width))
        return
    canvas = geometry.canvas_size((height, width))
    assert canvas == stock and max(canvas) < longest + patch
    if max(height, width) <= longest:  # nothing is scaled, sides are rounded up
        assert all(0 <= new - old < patch for new, old in zip(canvas, (height, width)))
    ratio = max(height, width, longest) / longest
    assert all(
        abs(math.ceil(side / ratio / patch) * patch - new) <= patch for side, new in zip((height, width), canvas)
    )


def test_canvases_of_the_specification():
    """B.4: 857 x 643 becomes 864 x 656; B.9: tokens per image with one break or end per row."""
    geometry = ImageGeometry((16, 16), 16, 1, max_side=2048)
    for (width, height), tokens in {(857, 643): 2255, (810, 617): 2028, (1008, 756): 3072, (665, 418): 1161}.items():
        canvas = geometry.canvas_size((height, width))
        rows, columns = geometry.token_grid(canvas)
        assert rows * (columns + 1) == tokens
    assert geometry.canvas_size((643, 857)) == (656, 864)
    assert geometry.canvas_size((750, 1033)) == (752, 1040)
    assert ImageGeometry((16, 16), 16, 1, max_side=1024).canvas_size((750, 1033)) == (752, 1024)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"max_side": 11}, r"max_side 11 must be at least one token \(12 pixels\)"),
        ({"max_side": 96, "min_pixels": 144, "max_pixels": 9216}, "max_side and pixel bounds are two rules"),
    ],
)
def test_bounds_are_checked(bounds, message):
    with pytest.raises(ValueError, match=message):
        ImageGeometry((12, 12), 12, 1, **bounds)
    with pytest.raises(ValueError, match="max_side 11 must be at least one token"):
        PixtralBackbone(max_side=11)


@pytest.mark.parametrize("shape", [(75, 131), (240, 60), (96, 96), (33, 57), (9, 150)])
def test_pixels_are_those_of_the_stock_processor(backbone, shape):
    """The PIL backend of the stock processor, bit for bit."""
    codec, image = backbone.codec, picture(shape)
    processor = PixtralImageProcessorPil(patch_size={"height": 12, "width": 12}, size={"longest_edge": 96})
    expected = processor(image, return_tensors="np")
    canvas = stretch(image, codec.geometry.canvas_size(shape))
    assert [tuple(size) for size in expected["image_sizes"]] == [canvas.size]
    assert np.array_equal(codec.pixels(canvas), expected["pixel_values"][0])
    with pytest.raises(ValueError, match=r"canvas of size \(60, 90\) given to a backbone whose tokens are 12 pixels"):
        codec.pixels(stretch(image, (60, 90)))


# ---- logits and features against the stock model ----------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_are_those_of_the_stock_model(backbone, attention):
    """One by one, and a batch of three sizes that the stock model sees padded on the right."""
    ours = PixtralBackbone(attention=attention).eval()
    ours.load_state_dict(backbone.state_dict())
    images, prompts = noise(*SHAPES), [prompt_of(ours, shape) for shape in SHAPES]
    prefix = ours.prefill(ours.encode_images(padded(images), SHAPES), prompts)
    longest = max(map(len, prompts))
    ids = torch.full((3, longest), ours.codec.pad_id)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    mask = torch.arange(longest) < torch.tensor([[len(prompt)] for prompt in prompts])
    batch = backbone.model(
        input_ids=ids,
        attention_mask=mask.long(),
        pixel_values=padded(images, 0.0),
        image_sizes=torch.tensor(SHAPES),
    ).logits
    for row, (image, prompt) in enumerate(zip(images, prompts)):
        found = ours.logits(prefix.states[row, : len(prompt)])
        alone = backbone.model(input_ids=torch.tensor([prompt]), pixel_values=image[None]).logits[0]
        assert alone.abs().max() > 1
        close(found, alone)
        close(found, batch[row, : len(prompt)])


@torch.no_grad()
def test_features_are_those_of_the_stock_model(backbone):
    """Last hidden state of the tower and what the stock model puts in the place of the image tokens."""
    images = noise(*SHAPES)
    features = backbone.encode_images(padded(images), SHAPES)
    assert features.grids == ((8, 8), (5, 8), (3, 2)) and features.deep == ()
    stock = backbone.model.model.get_image_features(
        padded(images, 0.0), image_sizes=torch.tensor(SHAPES), return_dict=True
    )
    start = 0
    for row, (rows, columns) in enumerate(features.grids):
        count = rows * columns
        close(features.patches[row, :count], stock.last_hidden_state[0, start : start + count])
        close(features.tokens[row, :count], stock.pooler_output[row])
        assert not features.patches[row, count:].any() and not features.tokens[row, count:].any()
        start += count
    tower = backbone.vision_tower(images[1][None], return_dict=True).last_hidden_state[0]
    close(features.patches[1, :40], tower)


@torch.no_grad()
def test_batch_equals_single_images(backbone):
    """Images of four sizes in three passes of the tower, one of which is too large to share; results do not tell."""
    shapes = [SHAPES[i] for i in (0, 1, 2, 0, 0, 1, 2, 2, 1, 0)] + [(276, 300)] + [SHAPES[0]] * 2
    counts = [height * width // 144 for height, width in shapes]
    passes = list(packs(counts, PATCHES_PER_WIDTH * 128))
    assert passes == [(0, 10), (10, 11), (11, 13)]
    seen = []
    hook = backbone.vision_tower.register_forward_pre_hook(lambda *_: seen.append(1))
    images = noise(*shapes)
    together = backbone.encode_images(padded(images), shapes)
    hook.remove()
    assert len(seen) == 3
    for row, (image, count) in enumerate(zip(images, counts)):
        alone = backbone.encode_images(image[None])
        close(together.patches[row, :count], alone.patches[0])
        close(together.tokens[row, :count], alone.tokens[0])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(1, 120))
def test_packs(counts, limit):
    """Every image once and in order, passes within the limit unless a single image is above it, and none too many."""
    found = list(packs(counts, limit))
    assert [i for first, stop in found for i in range(first, stop)] == list(range(len(counts)))
    totals = [sum(counts[first:stop]) for first, stop in found]
    assert all(total <= limit or stop - first == 1 for total, (first, stop) in zip(totals, found))
    assert all(total + counts[stop] > limit for total, (_, stop) in zip(totals[:-1], found))


@torch.no_grad()
def test_answers_are_those_of_the_stock_generation(backbone):
    """Cached, packed behind one prefix, against `generate` of the stock model with and without a cache."""
    images, texts = noise(*SHAPES[:2]), (("how far?", "what is it?"), ("and here?",))
    prefix = backbone.prefill(
        backbone.encode_images(padded(images), SHAPES[:2]), [backbone.codec.image_prefix(shape) for shape in SHAPES[:2]]
    )
    branches = [[backbone.codec.question(text) for text in row] for row in texts]
    answers = backbone.generate(prefix, branches, max_new_tokens=6)
    for row, (image, shape) in enumerate(zip(images, SHAPES)):
        for branch, text in enumerate(texts[row]):
            ids = torch.tensor([prompt_of(backbone, shape, text)])
            for use_cache in (True, False):
                out = backbone.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    pixel_values=image[None],
                    image_sizes=torch.tensor([shape]),
                    max_new_tokens=6,
                    do_sample=False,
                    use_cache=use_cache,
                    eos_token_id=backbone.codec.end_id,
                    pad_token_id=backbone.codec.pad_id,
                )
                assert out[0, ids.shape[1] :].tolist() == answers.ids[row][branch]


@torch.no_grad()
def test_open_takes_canvases(backbone):
    """From pictures to states of the prefix, against the stock processor and the stock model."""
    shapes = ((70, 131), (40, 31))
    pictures = [picture(shape, seed) for seed, shape in enumerate(shapes)]
    canvases = [stretch(image, backbone.codec.geometry.canvas_size(shape)) for image, shape in zip(pictures, shapes)]
    prefix = backbone.open(canvases)
    processor = PixtralImageProcessorPil(patch_size={"height": 12, "width": 12}, size={"longest_edge": 96})
    for row, (image, canvas) in enumerate(zip(pictures, canvases)):
        ids = backbone.codec.image_prefix(canvas.size)
        pixels = torch.from_numpy(processor(image, return_tensors="np")["pixel_values"][0])
        close(prefix.states[row, : len(ids)], stock_states(backbone, ids, pixels))


# ---- what trains ------------------------------------------------------------------------------------------------------


def test_trains_on_a_batch_of_shapes():
    """Gradients reach every parameter, and recomputing activations does not change them."""
    first, second = scenes(0, 7)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = PerceptionModel(
            PixtralBackbone(gradient_checkpointing=checkpointing), {"masks": MaskDecoderHead(width=64, heads=4)}
        )
        model.train()
        calls = []
        for part in (
            model.backbone.language_model.layers[0].mlp,
            model.backbone.vision_tower.transformer.layers[0].feed_forward,
        ):
            part.register_forward_pre_hook(lambda *_: calls.append(1))
        losses = model.loss(make_batch(model, [first, resized(second, (60, 96))]))
        sum(value for name, value in losses.items() if not name.startswith("_")).backward()
        assert len(calls) == (4 if checkpointing else 2)
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.isfinite().all(), name
        close(gradients[1][name], gradient)
    for part in ("vision_tower.transformer.layers.0.", "patch_conv", "ln_pre", "multi_modal_projector.linear_1"):
        assert any(float(g.abs().max()) > 0 for name, g in gradients[0].items() if part in name), part


def test_frozen_vision_keeps_no_graph():
    pixels = torch.zeros(2, 3, 96, 96)
    frozen = PixtralBackbone(trainable=Trainable(vision=False, projector=False))
    assert not frozen.encode_images(pixels, [(96, 96), (60, 96)]).tokens.requires_grad
    assert PixtralBackbone().encode_images(pixels, [(96, 96), (60, 96)]).patches.requires_grad


def test_lora_targets():
    """Every linear layer of a Mistral block unless others are named."""
    block = PixtralBackbone().language_model.layers[0]
    linear = {name.rsplit(".", 1)[-1] for name, part in block.named_modules() if isinstance(part, torch.nn.Linear)}
    assert set(PROJECTIONS) == linear == set(LORA_TARGETS.get("mistral", PROJECTIONS))
    for targets, count in ((None, 7), (("q_proj",), 1)):
        model = PerceptionModel(
            PixtralBackbone(lora=Lora(rank=2, targets=targets), trainable=FROZEN), {"masks": MaskDecoderHead(width=32)}
        )
        names = [name for name, _ in model.backbone.model.named_parameters() if "lora_A" in name]
        assert len(names) == 4 * count and all(name.startswith("model.language_model.layers.") for name in names)
