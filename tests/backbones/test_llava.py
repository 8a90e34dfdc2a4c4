"""The LLaVA composite: one vision pass, packing and caching against the stock model, folders, compositions, tied embeddings."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from backbones.tiny import make_batch, scenes, stock_states
from mmseg_llm.backbones.adapters import Lora, Trainable
from mmseg_llm.backbones.codec import TINY_TOKENIZER, load_tokenizer
from mmseg_llm.backbones.llava import LlavaBackbone
from mmseg_llm.backbones.sizes import LLAVA
from mmseg_llm.heads.mask_decoder.head import MaskDecoderHead
from mmseg_llm.model import PerceptionModel

SIZES = tuple(name for name in LLAVA if "tiny" in name)
FROZEN = Trainable(vision=False, projector=False, language=False, embeddings=False)
SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 96}
TOWERS = {
    "clip": ("CLIPVision", {}, 0),
    "siglip": ("SiglipVision", {}, 0),
    "dinov2": ("Dinov2", {"mlp_ratio": 2}, 0),
    "registers": ("Dinov2WithRegisters", {"mlp_ratio": 2, "num_register_tokens": 4}, 4),
    "dinov3": ("DINOv3ViT", {"num_register_tokens": 4}, 4),
}


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def with_head(backbone):
    return PerceptionModel(backbone, {"mask_decoder": MaskDecoderHead(width=64, heads=4, max_new_tokens=8)})


@pytest.fixture(scope="module", params=SIZES)
def model(request):
    torch.manual_seed(0)
    return with_head(LlavaBackbone(request.param)).eval()


def write_tower(folder, kind="siglip", image_size=96, patch_size=12):
    """A bare vision encoder in its stock layout."""
    name, extra, _ = TOWERS[kind]
    settings = {key: value for key, value in SMALL.items() if "mlp_ratio" not in extra or key != "intermediate_size"}
    config = getattr(transformers, f"{name}Config")(**settings, **extra, image_size=image_size, patch_size=patch_size)
    tower = getattr(transformers, f"{name}Model")(config).eval()
    tower.save_pretrained(folder)
    return tower


def write_lm(folder, kind="Qwen2", is_tied=True, drop=()):
    """A bare causal LM whose tokenizer lacks `<image>`, and the tokens in `drop`."""
    tokenizer = load_tokenizer(TINY_TOKENIZER)
    size = {"vocab_size": len(tokenizer), "num_key_value_heads": 1, "tie_word_embeddings": is_tied}
    ids = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    config = getattr(transformers, f"{kind}Config")(**SMALL, **size, **ids)
    lm = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    for name in drop:
        text = text.replace(name, name.replace("|", "-"))
    path.write_text(text, encoding="utf-8")
    return lm


def compose(folder, tower="siglip", lm="Qwen2", image=(96, 12), is_tied=True, drop=(), **settings):
    torch.manual_seed(0)
    parts = write_tower(folder / "vision", tower, *image), write_lm(folder / "lm", lm, is_tied, drop)
    backbone = LlavaBackbone(vision=str(folder / "vision"), language=str(folder / "lm"), **settings)
    return backbone.eval(), *parts


def drop_key(folder, part):
    """Take one weight out of a folder, and give its name."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    key = next(name for name in weights if part in name)
    weights.pop(key)
    save_file(weights, path, metadata={"format": "pt"})
    return key


# ---- one vision pass --------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("layer", [None, -2, 0, 4])
def test_features_are_those_of_the_stock_model(layer):
    for size in SIZES:
        backbone = LlavaBackbone(size, vision_feature_layer=layer).eval()
        passes = []
        backbone.vision_tower.register_forward_hook(lambda *_: passes.append(1))
        pixels = torch.randn(2, 3, 96, 96)
        features = backbone.encode_images(pixels)
        assert len(passes) == 1
        stock = backbone.model.get_image_features(pixels, output_hidden_states=True, return_dict=True)
        close(features.tokens, torch.stack(list(stock.pooler_output)))
        start = 0 if "siglip" in backbone.model.config.vision_config.model_type else 1
        close(features.patches, stock.hidden_states[-1 if layer is None else layer][:, start:])
        assert features.grids == ((8, 8), (8, 8))
        assert features.patches.shape[1] == features.tokens.shape[1] == backbone.codec.geometry.num_tokens() == 64


@torch.no_grad()
@pytest.mark.parametrize("tower", TOWERS)
def test_towers_whose_size_is_no_multiple_of_the_patch(tower, tmp_path):
    backbone, bare, registers = *compose(tmp_path, tower, image=(100, 14))[:2], TOWERS[tower][2]
    geometry = backbone.codec.geometry
    assert (geometry.patch_grid(), geometry.covered(), geometry.image_size) == ((7, 7), (98, 98), (100, 100))
    pixels = torch.randn(1, 3, 100, 100)
    features = backbone.encode_images(pixels)
    assert features.patches.shape == (1, 49, 64) and features.tokens.shape == (1, 49, 64)
    start = registers + (tower != "siglip")
    close(features.patches, bare(pixels, output_hidden_states=True).hidden_states[-2][:, start:])
    pixels[..., 98:] = 0  # what no token covers
    pixels[..., 98:, :] = 0
    assert torch.equal(backbone.encode_images(pixels).tokens, features.tokens)


def test_frozen_vision_keeps_no_graph():
    pixels = torch.zeros(1, 3, 96, 96)
    frozen = LlavaBackbone(trainable=Trainable(vision=False, projector=False))
    assert not frozen.encode_images(pixels).tokens.requires_grad
    features = with_head(LlavaBackbone(trainable=Trainable(vision=False))).backbone.encode_images(pixels)
    assert features.tokens.requires_grad and not features.patches.requires_grad


# ---- packing and caching ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_packed_equals_cached_and_separate(model):
    backbone = model.backbone
    batch = make_batch(model, scenes(0, 7))
    packed = backbone(batch).states
    prompt = backbone.codec.image_prefix()
    start = len(prompt)
    features = backbone.encode_images(batch.pixels)
    prefix = backbone.prefill(features, [prompt] * 2)
    close(prefix.states, packed[:, :start])
    assert torch.equal(prefix.image_positions, batch.image_positions)
    assert prefix.open_branches(4) == 1
    block = batch.visibility.block[:, start:]
    cached = backbone.extend(prefix, block, ids=batch.ids[:, start:])
    close(cached[block >= 0], packed[:, start:][block >= 0])
    for row in range(2):
        for branch in range(1, 5):
            keep = (batch.visibility.block[row] == 0) | (batch.visibility.block[row] == branch)
            close(packed[row, keep], stock_states(backbone, batch.ids[row, keep].tolist(), batch.pixels[row]))


@torch.no_grad()
def test_eager_equals_sdpa(model):
    eager = with_head(LlavaBackbone(model.backbone.source, attention="eager")).eval()
    eager.load_state_dict(model.state_dict())
    batch = make_batch(model, scenes(0))
    real = batch.visibility.block >= 0
    close(eager.backbone(batch).states[real], model.backbone(batch).states[real])


def test_trains(model):
    batch = make_batch(model, scenes(0, 7))
    losses = model.loss(batch)
    sum(value for name, value in losses.items() if not name.startswith("_")).backward()
    for part in (model.backbone.vision_tower, model.backbone.projector, model.backbone.language_model):
        gradients = [parameter.grad for parameter in part.parameters() if parameter.grad is not None]
        assert gradients and all(gradient.isfinite().all() for gradient in gradients)
        assert sum(float(gradient.abs().sum()) for gradient in gradients) > 0
    model.zero_grad()


# ---- templates, coordinates, statistics -------------------------------------------------------------------------------


def test_templates():
    codec = LlavaBackbone().codec
    assert codec.decode(codec.image_prefix() + codec.question("a?")) == (
        "<|im_start|>user\n" + "<image>" * 64 + "\na?<|im_end|>\n<|im_start|>assistant"
    ).replace("<|im_end|>", "")
    codec = LlavaBackbone(template="llava_1_5").codec
    assert codec.decode(codec.image_prefix() + codec.question("a?")) == f"<s>USER: {'<image>' * 64}\na? ASSISTANT:"
    assert codec.end_id == codec.token_id("</s>")


def test_coordinates_are_fractions():
    codec = LlavaBackbone().codec
    assert codec.rope_axes == 1
    assert codec.coordinates.write([[47.5, 24]], (96, 96)) == ["0.500", "0.255"]
    close(
        torch.from_numpy(codec.coordinates.read("(0.500, 0.255)", (96, 96))),
        torch.tensor([[47.5, 24.0]]).double(),
        0.06,
    )


def test_statistics(tmp_path):
    means = {size: LlavaBackbone(size).codec.geometry.mean[0] for size in SIZES}
    assert list(means.values()) == [0.5, 0.48145466, 0.485]
    compose(tmp_path)
    (tmp_path / "vision" / "preprocessor_config.json").write_text(
        '{"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}'
    )
    backbone = LlavaBackbone(vision=str(tmp_path / "vision"), language=str(tmp_path / "lm"))
    assert (backbone.codec.geometry.mean, backbone.codec.geometry.std) == ((0.1, 0.2, 0.3), (1, 1, 1))


# ---- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_codec", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_reads_a_llava_folder(size, with_codec, tmp_path):
    torch.manual_seed(0)
    backbone = LlavaBackbone(size)
    backbone.model.save_pretrained(tmp_path)
    backbone.codec.save(tmp_path) if with_codec else backbone.codec.tokenizer.save_pretrained(tmp_path)
    loaded = LlavaBackbone(str(tmp_path))
    assert (loaded.codec.geometry, loaded.codec.template) == (backbone.codec.geometry, backbone.codec.template)
    assert loaded.model.config.vision_feature_layer == -1
    state = loaded.state_dict()
    for name, value in backbone.state_dict().items():
        assert torch.equal(state[name], value), name
    key = drop_key(tmp_path, "linear_2.bias")
    with pytest.raises(ValueError, match=r"1 missing keys \(model.multi_modal_projector.linear_2.bias"):
        LlavaBackbone(str(tmp_path))
    assert "projector" in key


def test_adds_a_missing_image_token(tmp_path):
    backbone = LlavaBackbone(template="llava_1_5")
    rows = backbone.model.config.text_config.vocab_size
    backbone.model.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(TINY_TOKENIZER)
    tokenizer.add_tokens(["<s>", "</s>", "<other>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path)
    loaded = LlavaBackbone(str(tmp_path), template="llava_1_5")
    assert len(tokenizer) == rows == loaded.codec.token_id("<image>") == loaded.model.config.image_token_id
    assert loaded.lm_head.weight.shape[0] == loaded.model.config.text_config.vocab_size == rows + 1
    close(loaded.lm_head.weight[rows], backbone.lm_head.weight.mean(0))
    with pytest.raises(ValueError, match=r"no hidden state of a siglip_vision_model of 4 layers"):
        LlavaBackbone(str(tmp_path), vision_feature_layer=5)


def test_unfit_folders_are_refused(tmp_path):
    def write(**changes):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"} | changes))

    write(model_type="internvl")
    with pytest.raises(ValueError, match="type 'internvl'"):
        LlavaBackbone(str(tmp_path))
    write(vision_config={"model_type": "pixtral"})
    with pytest.raises(ValueError, match="vision_config' holds a model of type 'pixtral'"):
        LlavaBackbone(str(tmp_path))
    write(text_config={"model_type": "mistral"})
    with pytest.raises(ValueError, match="text_config' holds a model of type 'mistral'"):
        LlavaBackbone(str(tmp_path))
    write(vision_feature_select_strategy="full")
    with pytest.raises(ValueError, match="only models trained with 'default' are read"):
        LlavaBackbone(str(tmp_path))
    write(vision_feature_layer=[-2, -1])
    load_tokenizer(TINY_TOKENIZER).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="give one integer from -25 to 24"):
        LlavaBackbone(str(tmp_path), weights="random")


# ---- compositions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lm", ["Qwen2", "Qwen3", "Llama", "SmolLM3"])
def test_composition_takes_both_parts(lm, tmp_path):
    backbone, tower, bare = compose(tmp_path, "siglip", lm, is_tied=lm != "Llama", attention="eager")
    core = backbone.model.model
    vision, language = core.vision_tower.state_dict(), core.language_model.state_dict()
    assert not any("head" in name for name in vision)
    assert all(torch.equal(tower.state_dict()[name], value) for name, value in vision.items())
    rows = bare.config.vocab_size
    for name, value in bare.model.state_dict().items():
        assert torch.equal(language[name][:rows] if "embed_tokens" in name else language[name], value), name
    assert torch.equal(backbone.lm_head.weight[:rows], bare.lm_head.weight)
    assert (backbone.lm_head.weight is core.language_model.embed_tokens.weight) == (lm != "Llama")
    assert backbone.model.config.image_token_id == rows == backbone.codec.token_id("<image>")
    assert backbone.attention == core.vision_tower.config._attn_implementation == "eager"
    config = backbone.model.config
    assert config.text_config is core.language_model.config and config.text_config.vocab_size == rows + 1
    assert not any(parameter.is_meta for parameter in [*backbone.parameters(), *backbone.buffers()])
    assert 0.01 < float(backbone.projector.linear_1.weight.detach().std()) < 0.03
    ids = [*backbone.codec.image_prefix(), *backbone.codec.question("the red cube")]
    with torch.no_grad():
        features = backbone.encode_images(torch.randn(1, 3, 96, 96))
        states = backbone.prefill(features, [ids]).states
        text = backbone.prefill(features, [ids[:67]]).states
    assert states.isfinite().all() and backbone.logits(states).shape[-1] == rows + 1
    close(states[:, :67], text)


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_composition_from_a_contrastive_model(kind, tmp_path):
    vision = SMALL | {"image_size": 96, "patch_size": 12}
    text = SMALL | {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{kind}Config")(vision_config=vision, text_config=text)
    both = getattr(transformers, f"{kind}Model")(config)
    both.save_pretrained(tmp_path / "both")
    write_lm(tmp_path / "lm")
    backbone = LlavaBackbone(vision=str(tmp_path / "both"), language=str(tmp_path / "lm"))
    source = both.vision_model.state_dict()
    assert all(torch.equal(source[name], value) for name, value in backbone.vision_tower.state_dict().items())


def test_flex_attention_is_for_the_language_model(tmp_path):
    composed = compose(tmp_path, attention="flex_attention")[0]
    composed.model.save_pretrained(tmp_path / "llava")
    composed.codec.save(tmp_path / "llava")
    for backbone in (composed, LlavaBackbone(str(tmp_path / "llava"), attention="flex_attention")):
        assert backbone.attention == "flex_attention"
        assert backbone.vision_tower.config._attn_implementation == "sdpa"


def test_incomplete_compositions_are_refused(tmp_path):
    compose(tmp_path)
    vision, lm = tmp_path / "vision", tmp_path / "lm"
    with pytest.raises(ValueError, match="a composition needs two parts"):
        LlavaBackbone(vision=str(vision))
    with pytest.raises(ValueError, match="are both given; drop one"):
        LlavaBackbone("llava-tiny", vision=str(vision), language=str(lm))
    with pytest.raises(ValueError, match="no folder 'nowhere'"):
        LlavaBackbone(vision="nowhere", language=str(lm))
    with pytest.raises(ValueError, match="holds a model of type 'qwen2'; this backbone reads clip_vision_model"):
        LlavaBackbone(vision=str(lm), language=str(vision))
    with pytest.raises(ValueError, match="holds a model of type 'siglip_vision_model'; this backbone reads qwen2"):
        LlavaBackbone(vision=str(vision), language=str(vision))
    key = drop_key(vision, "layers.1.mlp.fc1.weight")
    with pytest.raises(ValueError, match=rf"vision do not fit.*1 missing keys \({key}"):
        LlavaBackbone(vision=str(vision), language=str(lm))
    write_tower(vision)
    key = drop_key(lm, "layers.1.mlp.up_proj")
    with pytest.raises(ValueError, match=rf"lm do not fit.*1 missing keys \({key}"):
        LlavaBackbone(vision=str(vision), language=str(lm))
    (lm / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="download the weights too"):
        LlavaBackbone(vision=str(vision), language=str(lm))
    assert LlavaBackbone(vision=str(vision), language=str(lm), weights="random").text_width == 64


def test_settings_are_checked():
    with pytest.raises(ValueError, match="ignores a visibility"):
        LlavaBackbone(attention="flash_attention_2")
    with pytest.raises(ValueError, match="unknown chat template"):
        LlavaBackbone(template="vicuna")
    with pytest.raises(ValueError, match=r"no folder 'nowhere'.*llava-tiny"):
        LlavaBackbone("nowhere")


# ---- tied embeddings, saved runs, what trains -------------------------------------------------------------------------


@pytest.mark.parametrize("drop", [(), ("<|im_start|>",)])
@pytest.mark.parametrize("is_tied", [True, False])
def test_a_saved_run_is_built_again(is_tied, drop, tmp_path):
    settings = {"lora": Lora(rank=2, alpha=4), "trainable": FROZEN}
    model = with_head(compose(tmp_path, is_tied=is_tied, drop=drop, vision_feature_layer=-1, **settings)[0]).eval()
    model.backbone.save_config(tmp_path / "run")
    parts = {"vision": str(tmp_path / "vision"), "language": str(tmp_path / "lm")}
    again = LlavaBackbone(str(tmp_path / "run"), weights="random", **parts, **settings)  # as checkpoints are loaded
    assert again.model.config.vision_feature_layer == -1
    assert again.codec.template == model.backbone.codec.template
    other = with_head(again).eval()
    assert other.num_added_tokens == 0
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        batch = make_batch(model, scenes(0))
        expected = model.backbone(batch).states
        close(other.backbone(make_batch(other, scenes(0))).states, expected)
        close(other.backbone.logits(expected), model.backbone.logits(expected))


@pytest.mark.parametrize("is_tied", [True, False])
def test_lora_trains_adapters_new_rows_and_the_final_norm(is_tied, tmp_path):
    settings = {"lora": Lora(rank=2, alpha=4), "trainable": FROZEN}
    model = with_head(compose(tmp_path, is_tied=is_tied, drop=("<|im_start|>",), **settings)[0])
    backbone = model.backbone
    trains = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    others = {name for name in trains if "lora_" not in name and "trainable_tokens_delta" not in name}
    assert {name.rsplit("language_model.", 1)[-1] for name in others} == {"norm.weight"}
    assert sum("lora_A" in name for name in trains) == 3 * 7
    assert sum("trainable_tokens_delta" in name for name in trains) == (1 if is_tied else 2)

    def tables():
        ids = torch.arange(backbone.model.config.text_config.vocab_size)
        with torch.no_grad():
            return backbone.embed(ids[None])[0], backbone.lm_head(torch.eye(64)).T.clone()

    before = tables()
    assert is_tied == torch.allclose(*before)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1)
    losses = model.loss(make_batch(model, scenes(0, 7)))
    sum(value for name, value in losses.items() if not name.startswith("_")).backward()
    optimizer.step()
    after = tables()
    assert is_tied == torch.allclose(*after)
    new = {backbone.codec.token_id(name) for name in ("[SEG]", "[REJ]", "<|im_start|>")}
    changed = [set((old != now).any(1).nonzero()[:, 0].tolist()) for old, now in zip(before, after)]
    assert changed[1] == new and changed[0] <= new and backbone.codec.token_id("<|im_start|>") in changed[0]


def test_tied_embeddings_train_in_full(tmp_path):
    model = with_head(compose(tmp_path)[0])
    embeddings = model.backbone.model.get_input_embeddings()
    assert model.backbone.lm_head.weight is embeddings.weight and embeddings.weight.requires_grad
    assert embeddings.weight.shape[0] == len(model.backbone.codec.tokenizer)


def test_parameter_count_of_llava_1_5_7b():
    """That of the hub folder llava-hf/llava-1.5-7b-hf, nothing allocated."""
    with torch.device("meta"):
        backbone = LlavaBackbone("llava-hf/llava-1.5-7b-hf", weights="random")
    assert all(parameter.is_meta for parameter in backbone.parameters())
    assert sum(parameter.numel() for parameter in backbone.parameters()) == 7_063_427_072
    assert backbone.codec.geometry.num_tokens() == 576 and backbone.codec.template.style == "vicuna"
