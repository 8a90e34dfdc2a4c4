"""Qwen-VL: rotary positions, canvases, patches and vision features against the stock classes; folders; released sizes."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.vision_utils import get_vision_window_index

from backbones.tiny import make_batch, resized, scenes, stock_states
from mmseg_llm.backbones.adapters import LORA_TARGETS, Lora, Trainable, lora_targets
from mmseg_llm.backbones.codec import Codec
from mmseg_llm.backbones.collate import collate
from mmseg_llm.backbones.image_geometry import CLIP_STATISTICS, HALF_STATISTICS
from mmseg_llm.backbones.loading import statistics
from mmseg_llm.backbones.qwen_vl import FAMILIES, QwenVLBackbone, patchify, raster_order
from mmseg_llm.backbones.sizes import HUB_SOURCES, QWEN_VL
from mmseg_llm.geometry import stretch
from mmseg_llm.heads.all_mask.head import AllMaskHead
from mmseg_llm.heads.all_mask.passes import Trigger
from mmseg_llm.model import PerceptionModel
from mmseg_llm.structures import DenseBlock, Example, Sample, Suffix

SIZES = tuple(name for name in QWEN_VL if "tiny" in name)
TRAIN_BOUNDS, EVAL_BOUNDS = {"min_pixels": 802816, "max_pixels": 1003520}, {"min_pixels": 802816, "max_pixels": 802816}


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def build(size, **options) -> PerceptionModel:
    torch.manual_seed(0)
    return PerceptionModel(QwenVLBackbone(size, **options), {"all_mask": AllMaskHead()}).eval()


@pytest.fixture(scope="module", params=SIZES)
def model(request):
    return build(request.param)


@pytest.fixture(scope="module")
def models():
    return {size: build(size) for size in SIZES}


def stock_positions(backbone, ids, grid):
    """Rotary positions `(3, N)` and the next one, by the stock model from ids, kinds of tokens and patch grid."""
    tensor = torch.tensor([list(ids)])
    kinds = (tensor == backbone.model.config.image_token_id).int()
    patches = torch.tensor([[1, 2 * grid[0], 2 * grid[1]]])
    positions, delta = backbone.model.model.get_rope_index(tensor, mm_token_type_ids=kinds, image_grid_thw=patches)
    return positions[:, 0], len(ids) + int(delta)


# ---- rotary positions -------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SIZES), st.integers(1, 9), st.integers(1, 9), st.text("ab \n", max_size=12), st.booleans())
def test_positions_are_those_of_the_stock_model(models, size, rows, columns, text, is_bare):
    backbone = models[size].backbone
    codec, canvas = backbone.codec, (rows * 12, columns * 12)
    prefix = (
        [codec.token_id("<|image_pad|>")] * (rows * columns) if is_bare else codec.image_prefix(canvas)
    )  # an image may open a sequence
    for ids in (
        tuple(prefix),
        (*prefix, *codec.question(text)),
        (*prefix, *codec.question(text), *codec.answer("x")[0]),
    ):
        ours, following = codec.positions(ids, canvas)
        stock, expected = stock_positions(backbone, ids, (rows, columns))
        assert np.array_equal(ours, stock.numpy()) and following == expected
        assert following == ours.max() + 1


def test_text_positions_are_equal_on_all_axes(model):
    ours, following = model.backbone.codec.positions((5, 6, 7))
    assert ours.tolist() == [[0, 1, 2]] * 3 and following == 3


def test_packed_positions_are_those_of_the_stock_model(model):
    """Each branch with its mask tokens, as one plain sequence; canvases of two shapes."""
    first, second = scenes(0, 7)
    batch = make_batch(model, [first, resized(second, (60, 96))])
    for row, slot, start in zip(batch.slot_rows.tolist(), batch.slot_positions.tolist(), batch.dense_starts.tolist()):
        block, grid = batch.visibility.block[row], (batch.canvas_sizes[row][0] // 12, batch.canvas_sizes[row][1] // 12)
        keep = [i for i in range(slot + 1) if block[i] in (0, block[slot])]
        keep += batch.dense_positions[row, start : start + grid[0] * grid[1]].tolist()
        stock, _ = stock_positions(model.backbone, batch.ids[row, keep].tolist(), grid)
        assert torch.equal(batch.positions[:, row, keep], stock)


@torch.no_grad()
def test_mask_positions_of_the_specification(models, monkeypatch):
    """STAMP 2.2: a 2 x 3 grid and a prefix of 16 tokens give mask positions 13 to 18 on every axis; packed and cached."""
    model = models["qwen2_vl-tiny"]
    backbone, head = model.backbone, model.head()
    codec = backbone.codec
    pad, start, end = (codec.token_id(f"<|{name}|>") for name in ("image_pad", "vision_start", "vision_end"))
    prefix, branch = (start, *[pad] * 6, end), (*range(5, 12), head.seg_id)
    assert len(prefix) + len(branch) == 16
    canvas = stretch(Image.new("RGB", (36, 24)), (24, 36))
    block = DenseBlock(head.mask_id, head.grid.offsets((2, 3), 3))
    suffix = Suffix(branch, (-100,) * 8, (0,), (7,), block, (0,))
    example = Example("all_mask", Sample("", (24, 36)), canvas, codec.pixels(canvas), prefix, (suffix,))
    batch = collate([example], codec)
    assert batch.positions[:, 0, batch.dense_positions[0]].tolist() == [list(range(13, 19))] * 3

    seen = []
    run = backbone._run
    monkeypatch.setattr(
        backbone, "_run", lambda embeds, visibility, at, *rest: seen.append(at) or run(embeds, visibility, at, *rest)
    )
    cached = backbone.prefill(backbone.encode_images(batch.pixels), [prefix])
    cached.open_branches(1)
    head.cell_logits(backbone, cached, [Trigger(0, 1, lead=branch)])
    assert seen[-1].reshape(-1, 14)[:, 8:].tolist() == [list(range(13, 19))]


@pytest.mark.parametrize("wrong", ["positions", "delta"])
@pytest.mark.parametrize("size", SIZES)
def test_other_positions_of_the_stock_model_are_refused(size, wrong, monkeypatch):
    core = type(QwenVLBackbone(size).model.model)
    stock = core.get_rope_index

    def shifted(self, *args, **kwargs):
        positions, delta = stock(self, *args, **kwargs)
        if wrong == "delta":
            return positions, delta + 1
        positions[2, 0, -1] += 1
        return positions, delta

    monkeypatch.setattr(core, "get_rope_index", shifted)
    with pytest.raises(
        ValueError, match="numbers image tokens differently from this library's M-RoPE; install a version"
    ):
        QwenVLBackbone(size)


# ---- canvases, pixels, patches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "trained", "evaluated"),
    [
        ((480, 640), (784, 1036), (784, 1036)),
        ((427, 640), (756, 1120), (756, 1120)),
        ((640, 640), (896, 896), (896, 896)),
        ((1367, 2048), 1247, 1014),
        ((1080, 1920), 1222, 1008),
    ],
)
def test_canvases_of_the_specification(size, trained, evaluated):
    """STAMP 1.2, of the released model: canvas, or number of tokens."""
    for bounds, expected in (({}, trained), (TRAIN_BOUNDS, trained), (EVAL_BOUNDS, evaluated)):
        with torch.device("meta"):
            geometry = QwenVLBackbone("Qwen/Qwen2-VL-2B-Instruct", weights="random", **bounds).codec.geometry
        canvas = geometry.canvas_size(size)
        assert (
            geometry.step == 28 and (geometry.num_tokens(canvas) if isinstance(expected, int) else canvas) == expected
        )
        if size == (480, 640):
            assert geometry.token_grid(canvas) == (28, 37) and geometry.num_tokens(canvas) == 1036


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", [(75, 131), (240, 60), (96, 96), (33, 57), (9, 150)])
def test_pixels_and_patches_are_those_of_the_stock_processor(models, size, shape):
    """The PIL backend of the stock processor, bit for bit."""
    codec = models[size].backbone.codec
    geometry = codec.geometry
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8))
    processor = Qwen2VLImageProcessorPil(
        patch_size=geometry.patch,
        merge_size=geometry.merge,
        image_mean=list(geometry.mean),
        image_std=list(geometry.std),
        min_pixels=geometry.min_pixels,
        max_pixels=geometry.max_pixels,
    )
    expected = processor(image, return_tensors="np")
    canvas = stretch(image, geometry.canvas_size(shape))
    assert expected["image_grid_thw"].tolist() == [[1, *geometry.patch_grid(canvas.size)]]
    pixels = codec.pixels(canvas)
    assert pixels.dtype == np.float32 and pixels.shape == (3, *canvas.size)
    ours = patchify(torch.from_numpy(pixels)[None], [canvas.size], geometry.patch, geometry.merge)
    assert np.array_equal(ours.numpy(), expected["pixel_values"])


@torch.no_grad()
def test_patches_of_canvases_of_several_sizes():
    """Canvases lie in the upper left corners; what is beside them does not matter."""
    sizes = [(24, 36), (48, 24), (24, 36)]
    torch.manual_seed(0)
    images = [torch.randn(1, 3, *size) for size in sizes]
    pixels = torch.full((3, 3, 60, 48), torch.nan)
    for row, (image, (height, width)) in enumerate(zip(images, sizes)):
        pixels[row, :, :height, :width] = image[0]
    ours = patchify(pixels, sizes, 6, 2)
    assert torch.equal(ours, torch.cat([patchify(image, [size], 6, 2) for image, size in zip(images, sizes)]))
    same = patchify(pixels[[0, 2]], [sizes[0]] * 2, 6, 2)
    assert torch.equal(same, torch.cat([patchify(images[row], [sizes[0]], 6, 2) for row in (0, 2)]))


def test_foreign_canvases_are_refused(model):
    with pytest.raises(
        ValueError, match=r"canvas of size \(60, 90\) given to a backbone whose tokens are 12 pixels wide"
    ):
        model.backbone.codec.pixels(stretch(Image.new("RGB", (90, 60)), (60, 90)))


@pytest.mark.parametrize("size", [name for name in QWEN_VL if "tiny" not in name] + list(SIZES))
def test_family_settings(size):
    with torch.device("meta"):
        codec = QwenVLBackbone(size).codec
    family = QWEN_VL[size]["family"]
    statistics = HALF_STATISTICS if family == "qwen3_vl" else CLIP_STATISTICS
    assert (codec.geometry.mean, codec.geometry.std) == (statistics["mean"], statistics["std"])
    assert codec.rope_axes == 3 and codec.geometry.merge == 2
    assert codec.coordinates.bins == (0 if family == "qwen2_5_vl" else 1000) and codec.coordinates.style == "integer"
    assert bool(codec.template.system) == (family != "qwen3_vl")
    if "tiny" not in size:
        assert codec.geometry.patch == (16 if family == "qwen3_vl" else 14)
        tokens = [pixels // codec.geometry.step**2 for pixels in (codec.geometry.min_pixels, codec.geometry.max_pixels)]
        assert tokens == [1024, 1280]


# ---- vision features --------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 3), st.integers(1, 5))
def test_raster_order_undoes_the_windows_of_the_stock_tower(rows, columns, merge, window):
    """Both with windows (Qwen2.5-VL) and without, where towers keep the patches of a token together."""
    index, _ = get_vision_window_index(torch.tensor([[1, rows * merge, columns * merge]]), merge, window * merge * 7, 7)
    token, inner = torch.arange(rows * columns), torch.arange(merge**2)
    for order, width in ((index, window), (token, None)):
        place = order.argsort().reshape(rows, columns) * merge**2  # of the first patch of each token
        expected = place[:, None, :, None] + inner.reshape(1, merge, 1, merge)
        assert torch.equal(raster_order((rows * merge, columns * merge), merge, width), expected.flatten())


@torch.no_grad()
def test_features_are_those_of_the_stock_model(model):
    """Images of three shapes in one pass, against one stock pass each; padding is zero."""
    backbone = model.backbone
    sizes = [(96, 96), (60, 96), (132, 36)]
    torch.manual_seed(0)
    pixels = torch.randn(3, 3, 132, 96)
    passes = []
    hook = backbone.vision_tower.register_forward_hook(lambda *_: passes.append(1))
    features = backbone.encode_images(pixels, sizes)
    hook.remove()
    assert len(passes) == 1 and features.grids == ((8, 8), (5, 8), (11, 3))
    for row, (height, width) in enumerate(sizes):
        image = pixels[row : row + 1, :, :height, :width]
        patches = patchify(image, [(height, width)], 6, 2)
        grid = torch.tensor([[1, height // 6, width // 6]])
        stock = backbone.model.model.get_image_features(patches, grid, return_dict=True)
        count = height * width // 144
        close(features.tokens[row, :count], torch.cat(list(stock.pooler_output)))
        assert not features.tokens[row, count:].any() and not features.patches[row, 4 * count :].any()
        alone = backbone.encode_images(image)
        close(features.patches[row, : 4 * count], alone.patches[0])
        merged = backbone.projector(_grouped(alone.patches[0], (height // 6, width // 6)))
        if not getattr(backbone.model.config.vision_config, "deepstack_visual_indexes", None):
            close(merged, alone.tokens[0])
        for layer, expected in zip(features.deep, alone.deep, strict=True):
            close(layer[row, :count], expected[0])


def _grouped(patches, grid):
    """Raster patches as the merger takes them: those of a token next to each other, tokens in raster order."""
    cut = patches.reshape(grid[0] // 2, 2, grid[1] // 2, 2, -1)
    return cut.transpose(1, 2).flatten(0, 3)


@torch.no_grad()
def test_deep_features_reach_the_language_model(models):
    """DeepStack: without the deep features, or with those of another image, Qwen3-VL gives other states."""
    assert [len(models[size].backbone.encode_images(torch.zeros(1, 3, 96, 96)).deep) for size in SIZES] == [0, 0, 2]
    model = models["qwen3_vl-tiny"]
    backbone = model.backbone
    first, second = scenes(0, 7)
    batch = make_batch(model, [first, resized(second, (60, 96))])
    features = backbone.encode_images(batch.pixels, batch.canvas_sizes)
    expected = backbone(batch, features).states
    prompts = [backbone.codec.image_prefix(size) for size in batch.canvas_sizes]
    real = batch.visibility.block >= 0
    zeros = tuple(torch.zeros_like(layer) for layer in features.deep)
    start = batch.ids[0].tolist().index(backbone.codec.token_id("<|vision_start|>"))
    for deep in ((), zeros, (features.deep[0], zeros[1]), features.deep[::-1]):
        other = replace(features, deep=deep)
        changed = (backbone(batch, other).states - expected).abs()
        assert float(changed[:, : start + 1].max()) < 1e-5 < 0.1 < float(changed[real].max())
        changed = (backbone.prefill(other, prompts).states - backbone.prefill(features, prompts).states).abs()
        assert float(changed[1, start + 1 : len(prompts[1])].max()) > 0.1
    close(backbone(batch, replace(features, deep=())).states, backbone(batch, replace(features, deep=zeros)).states)


def test_frozen_vision_keeps_no_graph():
    pixels = torch.zeros(2, 3, 96, 96)
    for size in SIZES:
        frozen = QwenVLBackbone(size, trainable=Trainable(vision=False, projector=False))
        assert not frozen.encode_images(pixels, [(96, 96), (60, 96)]).tokens.requires_grad
        assert QwenVLBackbone(size).encode_images(pixels, [(96, 96), (60, 96)]).patches.requires_grad


# ---- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=SIZES)
def folder(request, tmp_path_factory):
    """A folder in the stock layout, as hub ids have it, with what it was written from."""
    path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    backbone = QwenVLBackbone(request.param).eval()
    backbone.model.save_pretrained(path)
    backbone.codec.tokenizer.save_pretrained(path)
    return path, backbone


BOUNDS = {"min_pixels": 64 * 64, "max_pixels": 96 * 96}


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
def test_pretrained_folder(folder, attention):
    """Weights, geometry and attention of a folder without our codec."""
    path, backbone = folder
    loaded = QwenVLBackbone(str(path), attention=attention, **BOUNDS).eval()
    assert loaded.attention == attention
    expected = "sdpa" if attention == "flex_attention" else attention
    tower = [module for module in loaded.vision_tower.modules() if hasattr(module, "config")]
    assert tower and all(module.config._attn_implementation == expected for module in tower)
    assert (loaded.codec.geometry, loaded.codec.template) == (backbone.codec.geometry, backbone.codec.template)
    assert loaded.codec.coordinates == backbone.codec.coordinates
    state = loaded.state_dict()
    assert state.keys() == backbone.state_dict().keys()
    for name, value in backbone.state_dict().items():
        assert torch.equal(state[name], value), name
    if attention != "flex_attention":  # whose compilation takes long
        torch.manual_seed(1)
        pixels = torch.randn(3, 60, 96)
        ids = [*backbone.codec.image_prefix((60, 96)), *backbone.codec.question("the red cube")]
        ours = loaded.prefill(loaded.encode_images(pixels[None]), [ids]).states[0]
        close(ours, stock_states(backbone, ids, pixels))


def test_folders_load_strictly(folder, tmp_path):
    path, _ = folder
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(path / "model.safetensors")
    for part in ("visual.merger", "layers.2.self_attn.k_proj.weight"):
        key = next(name for name in weights if part in name)
        save_file({k: v for k, v in weights.items() if k != key}, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=r"1 missing keys \(\S*" + part.replace(".", r"\.")):
            QwenVLBackbone(str(tmp_path))
    key = next(name for name in weights if "layers.2.self_attn.k_proj.weight" in name)
    save_file(weights | {key: weights[key][:-1].clone()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing keys \(\S*layers\.2\.self_attn\.k_proj"):
        QwenVLBackbone(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="download the weights too"):
        QwenVLBackbone(str(tmp_path))
    assert QwenVLBackbone(str(tmp_path), weights="random").text_width == 128
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="no tokenizer can be loaded"):
        QwenVLBackbone(str(tmp_path), weights="random")


def test_pixel_bounds_of_a_folder(tmp_path):
    """Those of the stored processor, in all the ways they are written; what the constructor says wins."""
    backbone = QwenVLBackbone()
    backbone.model.config.save_pretrained(tmp_path)
    backbone.codec.tokenizer.save_pretrained(tmp_path)

    def bounds(**given):
        geometry = QwenVLBackbone(str(tmp_path), weights="random", **given).codec.geometry
        assert geometry.image_size == (int(geometry.max_pixels**0.5) // 12 * 12,) * 2
        return geometry.min_pixels, geometry.max_pixels

    assert bounds() == (1024 * 144, 1280 * 144)
    means = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}
    for stored in (
        {"min_pixels": 1440, "max_pixels": 14400},
        {"size": {"shortest_edge": 1440, "longest_edge": 14400}},
        {"size": {"min_pixels": 1440, "max_pixels": 14400}},
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(stored | means))
        assert bounds() == (1440, 14400)
        assert bounds(max_pixels=28800) == (1440, 28800)
        assert bounds(min_pixels=7200, max_pixels=7200) == (7200, 7200)
        with pytest.raises(ValueError, match="min_pixels 1440 and max_pixels 1000 must be"):
            bounds(max_pixels=1000)
        with pytest.raises(ValueError, match="min_pixels 0 and"):
            bounds(min_pixels=0)
    assert QwenVLBackbone(str(tmp_path), weights="random").codec.geometry.mean == (0.1, 0.2, 0.3)
    processor = Qwen2VLImageProcessorPil(patch_size=6, min_pixels=2880, max_pixels=5760)
    processor.save_pretrained(tmp_path)
    assert bounds() == (2880, 5760)
    (tmp_path / "preprocessor_config.json").unlink()
    tokenizer, video = backbone.codec.tokenizer, transformers.Qwen2VLVideoProcessor()
    transformers.Qwen2VLProcessor(processor, tokenizer, video).save_pretrained(tmp_path)  # one file for all its parts
    assert bounds() == (2880, 5760)


def test_pixel_bounds_of_a_saved_run(tmp_path):
    """A run that trained with some bounds can be evaluated with others, as STAMP does."""
    trained = QwenVLBackbone(min_pixels=1440, max_pixels=14400)
    trained.save_config(tmp_path)
    assert QwenVLBackbone(str(tmp_path), weights="random").codec.geometry == trained.codec.geometry
    evaluated = QwenVLBackbone(str(tmp_path), weights="random", max_pixels=7200).codec.geometry
    assert (evaluated.min_pixels, evaluated.max_pixels, evaluated.image_size) == (1440, 7200, (84, 84))
    assert Codec.load(tmp_path).geometry.max_pixels == 14400
    with pytest.raises(ValueError, match="must be at least one token"):
        QwenVLBackbone(str(tmp_path), weights="random", max_pixels=1000)


def test_unfit_folders_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "internvl"}))
    remedy = (
        r"holds a model of type 'internvl'; this backbone reads qwen2_vl, qwen2_5_vl, qwen3_vl, so choose the backbone"
    )
    with pytest.raises(ValueError, match=remedy):
        QwenVLBackbone(str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config\.json"):
        QwenVLBackbone(str(tmp_path))
    with pytest.raises(ValueError, match=r"no folder 'nowhere'.*qwen2_vl-tiny"):
        QwenVLBackbone("nowhere")
    with pytest.raises(ValueError, match="unknown chat template 'vicuna'"):
        QwenVLBackbone(template="vicuna")


def test_windows_of_the_language_model_are_refused(tmp_path):
    """A sliding window would cut what a visibility allows."""
    backbone = QwenVLBackbone()
    backbone.save_config(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"] |= {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    config["text_config"].pop("layer_types", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"layers of type \['sliding_attention'\].*set use_sliding_window to false"):
        QwenVLBackbone(str(tmp_path), weights="random")


# ---- what trains ------------------------------------------------------------------------------------------------------


def test_lora_targets(model):
    """Every linear layer of a decoder block, and nothing of the tower, whose layers have some of the same names."""
    kind = model.backbone.language_model.config.model_type
    assert kind in LORA_TARGETS and kind == f"{QWEN_VL[model.backbone.source]['family']}_text"
    block = model.backbone.language_model.layers[0]
    linear = {name.rsplit(".", 1)[-1] for name, part in block.named_modules() if isinstance(part, torch.nn.Linear)}
    assert set(lora_targets(kind)) == linear
    frozen = Trainable(vision=False, projector=False, language=False, embeddings=False)
    adapted = build(model.backbone.source, lora=Lora(rank=2), trainable=frozen).backbone
    names = [name for name, _ in adapted.model.named_parameters() if "lora_" in name]
    assert len(names) == 2 * 7 * 4 and all(name.startswith("model.language_model.layers.") for name in names)


def test_trains_on_a_batch_of_shapes(model):
    """Gradients reach every parameter, and recomputing activations does not change them."""
    first, second = scenes(0, 7)
    gradients = []
    for checkpointing in (False, True):
        built = build(model.backbone.source, gradient_checkpointing=checkpointing)
        built.train()
        calls = []
        for part in (built.backbone.language_model.layers[0].mlp, built.backbone.vision_tower.blocks[0].mlp):
            part.register_forward_pre_hook(lambda *_: calls.append(1))
        losses = built.loss(make_batch(built, [first, resized(second, (60, 96))]))
        sum(value for name, value in losses.items() if not name.startswith("_")).backward()
        assert len(calls) == (4 if checkpointing else 2)
        gradients.append({name: parameter.grad for name, parameter in built.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.isfinite().all(), name
        close(gradients[1][name], gradient)
    for part in ("visual.blocks.0.", "visual.patch_embed", "visual.merger.", "language_model.layers.3.", "classifier"):
        assert any(float(g.abs().max()) > 0 for name, g in gradients[0].items() if part in name), part


# ---- released sizes ---------------------------------------------------------------------------------------------------

BILLIONS = {
    "qwen2_vl-2b": 2.21,
    "qwen2_vl-7b": 8.29,
    "qwen2_5_vl-3b": 3.75,
    "qwen2_5_vl-7b": 8.29,
    "qwen3_vl-2b": 2.13,
    "qwen3_vl-4b": 4.44,
    "qwen3_vl-8b": 8.77,
}


@pytest.mark.parametrize("source", [source for source, size in HUB_SOURCES.items() if size in QWEN_VL])
def test_parameter_counts_of_the_released_sizes(source):
    """Nothing allocated."""
    with torch.device("meta"):
        backbone = QwenVLBackbone(source, weights="random")
    assert all(parameter.is_meta for parameter in backbone.parameters())
    count = sum(parameter.numel() for parameter in backbone.parameters()) / 1e9
    assert count == pytest.approx(BILLIONS[HUB_SOURCES[source]], rel=0.01)
    spec = QWEN_VL[HUB_SOURCES[source]]
    assert spec["family"] == backbone.model.config.model_type
    config = backbone.model.config.text_config
    assert backbone.text_width == config.hidden_size == spec["text"]["hidden_size"]
    assert sum(config.rope_parameters["mrope_section"]) * 2 == 128
    is_tied = backbone.lm_head.weight is backbone.model.get_input_embeddings().weight
    assert is_tied == (HUB_SOURCES[source].rsplit("-", 1)[1] in ("2b", "3b", "4b"))


def test_every_released_size_is_counted():
    assert set(BILLIONS) == {size for size in QWEN_VL if "tiny" not in size} <= set(HUB_SOURCES.values())
    assert {QWEN_VL[size]["family"] for size in BILLIONS} == set(FAMILIES)


def test_square_canvas_is_bounded():
    """Hub processors allow canvases of millions of pixels; heads that need a square one do not get those."""
    backbone = QwenVLBackbone(min_pixels=64 * 64, max_pixels=4000 * 4000)
    side = backbone.codec.geometry.image_size[0]
    assert side * side <= 1280 * 12 * 12 < (side + 12) ** 2
    assert QwenVLBackbone(min_pixels=64 * 64, max_pixels=96 * 96).codec.geometry.image_size == (96, 96)


def test_tokenizer_and_config_must_agree(tmp_path):
    backbone = QwenVLBackbone()
    backbone.model.config.image_token_id += 1
    backbone.save_config(tmp_path)
    with pytest.raises(ValueError, match=r"gives <\|image_pad\|> the id \d+ but the config of .* says \d+"):
        QwenVLBackbone(str(tmp_path), weights="random")


def test_statistics_of_processors_saved_as_a_whole(tmp_path):
    """transformers 5 writes one file for a whole processor."""
    settings = {"image_processor": {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}}
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    assert statistics(tmp_path) == {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
