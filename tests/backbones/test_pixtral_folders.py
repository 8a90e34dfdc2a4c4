"""Pixtral and Qwen2.5-VL from folders: old layouts, strict loading, longest sides, what is refused, released sizes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from zoo.depthlm_folders import save_shards, write_json, write_pixtral, write_qwen

from backbones.pixtral_pieces import close, noise, prompt_of, stock_processor
from mmseg_llm.backbones.codec import Codec
from mmseg_llm.backbones.image_geometry import CLIP_STATISTICS
from mmseg_llm.backbones.loading import load_stock
from mmseg_llm.backbones.pixtral import PixtralBackbone
from mmseg_llm.backbones.qwen_vl import QwenVLBackbone

# ---- folders ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_old_layout(dtype, tmp_path):
    """Names and config of transformers 4.51: every weight arrives, none is left over, and the logits are the same."""
    from transformers import LlavaForConditionalGeneration

    written = write_pixtral(tmp_path, dtype)
    stock, foreign = load_stock(LlavaForConditionalGeneration, tmp_path, getattr(torch, dtype))
    assert foreign == []
    loaded = PixtralBackbone(str(tmp_path), dtype=dtype).eval()
    state = loaded.state_dict()
    assert state.keys() == written.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in written.state_dict().items())
    assert loaded.language_model.rotary_emb.inv_freq.dtype == torch.float32
    geometry = loaded.codec.geometry
    assert (geometry.max_side, geometry.image_size, geometry.patch) == (192, (192, 192), 12)
    assert {"mean": geometry.mean, "std": geometry.std} == CLIP_STATISTICS
    assert loaded.codec.template == written.codec.template and loaded.codec.context == 32768
    text, vision = loaded.model.config.text_config, loaded.model.config.vision_config
    assert (text.rope_parameters["rope_theta"], vision.rope_parameters["rope_theta"]) == (1e6, 1e4)
    image, ids = noise((60, 96))[0].to(loaded.model.dtype), prompt_of(loaded, (60, 96))
    ours = loaded.logits(loaded.prefill(loaded.encode_images(image[None]), [ids]).states[0])
    theirs = [
        model(input_ids=torch.tensor([ids]), pixel_values=image[None]).logits[0].float()
        for model in (stock.eval(), written.model)
    ]
    close(ours, theirs[0], 1e-5 if dtype == "float32" else 0.1)
    assert torch.equal(*theirs)


@torch.no_grad()
@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flat_qwen_config(is_tied, dtype, tmp_path):
    """Qwen2.5-VL with the fields of its language model at the top level; 3B has one matrix for embeddings and LM head."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    written = write_qwen(tmp_path / "old", dtype, is_tied)
    assert load_stock(Qwen2_5_VLForConditionalGeneration, tmp_path / "old", torch.float32)[1] == []
    loaded = QwenVLBackbone(str(tmp_path / "old"), dtype=dtype).eval()
    state = loaded.state_dict()
    assert state.keys() == written.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in written.state_dict().items())
    text = loaded.model.config.text_config
    assert (text.rope_parameters["mrope_section"], text.rope_parameters["rope_theta"]) == ([4, 6, 6], 1e6)
    assert (loaded.codec.geometry.min_pixels, loaded.codec.geometry.max_pixels) == (4096, 9216)
    loaded.save_config(tmp_path / "run")
    again = QwenVLBackbone(str(tmp_path / "run"), weights="random", dtype=dtype)
    for model in (loaded, again):
        assert (model.lm_head.weight is model.model.get_input_embeddings().weight) == is_tied
    image, ids = noise((60, 96))[0].to(loaded.model.dtype), prompt_of(loaded, (60, 96))
    ours, theirs = (
        model.logits(model.prefill(model.encode_images(image[None]), [ids]).states[0]) for model in (loaded, written)
    )
    assert torch.equal(ours, theirs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pixtral")
    write_pixtral(path)
    return path


@pytest.fixture
def spoiled(folder, tmp_path):
    """A copy to spoil."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def edit(folder, name: str, **changes) -> None:
    path = folder / f"{name}.json"
    content = json.loads(path.read_text())
    for key, value in changes.items():
        inner = content[key] if isinstance(value, dict) and isinstance(content.get(key), dict) else None
        content[key] = value if inner is None else inner | value
    write_json(folder, **{name: content})


def test_folders_load_strictly(spoiled):
    state = {}
    for file in sorted(spoiled.glob("*.safetensors")):
        state |= load_file(file)
        file.unlink()
    for part in ("vision_tower.ln_pre", "multi_modal_projector.linear_2.bias", "layers.2.self_attn.k_proj"):
        key = next(name for name in state if part in name)
        save_shards(spoiled, {name: value for name, value in state.items() if name != key})
        with pytest.raises(ValueError, match=r"1 missing keys \(\S*" + part.replace(".", r"\.")):
            PixtralBackbone(str(spoiled))
    save_shards(spoiled, state | {"language_model.model.extra.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"1 unexpected keys \(\S*extra\.weight"):
        PixtralBackbone(str(spoiled))
    for file in spoiled.glob("*.safetensors"):
        file.unlink()
    save_file(state, spoiled / "model.safetensors", {"format": "pt"})
    assert PixtralBackbone(str(spoiled)).text_width == 128
    (spoiled / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="download the weights too"):
        PixtralBackbone(str(spoiled))
    assert PixtralBackbone(str(spoiled), weights="random").text_width == 128


def test_longest_side_of_a_folder(spoiled):
    """Of the stored processor in all the ways it is written; what the constructor says wins; a run keeps its own."""

    def side(**given):
        return PixtralBackbone(str(spoiled), weights="random", **given).codec.geometry.max_side

    assert side() == 192 and side(max_side=240) == 240
    edit(spoiled, "preprocessor_config", size={"longest_edge": None, "height": 2048, "width": 2048})
    assert side() == 2048
    square = PixtralBackbone(str(spoiled), weights="random").codec.geometry.image_size
    assert square == (420, 420)  # 35 x 35 of the 1280 tokens that a square canvas may have
    PixtralImageProcessorPil(size={"longest_edge": 144}, patch_size={"height": 12, "width": 12}).save_pretrained(
        spoiled
    )
    assert side() == 144
    backbone = PixtralBackbone(str(spoiled), weights="random", max_side=180)
    backbone.save_config(spoiled / "run")
    assert Codec.load(spoiled / "run").geometry.max_side == 180
    again = PixtralBackbone(str(spoiled / "run"), weights="random")
    assert again.codec.geometry == backbone.codec.geometry
    other = PixtralBackbone(str(spoiled / "run"), weights="random", max_side=120).codec.geometry
    assert (other.max_side, other.image_size) == (120, (120, 120))
    stock_processor(backbone, 156).save_pretrained(spoiled)  # one file for all its parts
    (spoiled / "preprocessor_config.json").unlink(missing_ok=True)
    assert side() == 156
    (spoiled / "processor_config.json").unlink()
    assert side() == 96  # of the vision config


FAULTS = {
    "type": ("config", {"model_type": "internvl"}, "holds a model of type 'internvl'; this backbone reads llava"),
    "vision": (
        "config",
        {"vision_config": {"model_type": "clip_vision_model"}},
        "vision_config' holds a model of type 'clip_vision_model'; this backbone reads pixtral, so choose the backbone",
    ),
    "text": (
        "config",
        {"text_config": {"model_type": "llama"}},
        "text_config' holds a model of type 'llama'; this backbone reads mistral",
    ),
    "layer": ("config", {"vision_feature_layer": -2}, "vision_feature_layer is -2 .* only models trained with -1 and"),
    "strategy": ("config", {"vision_feature_select_strategy": "default"}, "select_strategy 'default', but a Pixtral"),
    "window": ("config", {"text_config": {"sliding_window": 64}}, "has a sliding window of 64 tokens, .* to null"),
    "image": ("config", {"image_token_index": 7}, r"gives \[IMG\] the id \d+ but the config of .* says 7; use the"),
    "rescale": ("preprocessor_config", {"do_rescale": False}, "has do_rescale set to false, .* cannot be used with"),
    "size": ("preprocessor_config", {"size": {"height": 96}}, "bounds height and width apart .* set size to a longest"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_unfit_folders_are_refused(spoiled, fault):
    name, changes, message = FAULTS[fault]
    edit(spoiled, name, **changes)
    with pytest.raises(ValueError, match=message):
        PixtralBackbone(str(spoiled), weights="random")


def test_unknown_names_are_refused(spoiled):
    with pytest.raises(ValueError, match=r"no folder 'nowhere'.*pixtral-tiny"):
        PixtralBackbone("nowhere")
    with pytest.raises(ValueError, match="unknown chat template 'other'; use one of"):
        PixtralBackbone(template="other")
    QwenVLBackbone("qwen2_5_vl-tiny").codec.tokenizer.save_pretrained(spoiled)
    with pytest.raises(ValueError, match=r"has no token '\[INST\]'; use the tokenizer saved with the checkpoint"):
        PixtralBackbone(str(spoiled), weights="random")


# ---- released sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["pixtral-12b", "mistral-community/pixtral-12b", "facebook/DepthLM"])
def test_released_size(source):
    """Nothing allocated; 25.4 GB in two bytes each (DepthLM specification J.1)."""
    with torch.device("meta"):
        backbone = PixtralBackbone(source, weights="random")
    assert all(parameter.is_meta for parameter in backbone.parameters())
    assert 2 * sum(parameter.numel() for parameter in backbone.parameters()) / 1e9 == pytest.approx(25.4, rel=0.002)
    text, geometry = backbone.model.config.text_config, backbone.codec.geometry
    assert (text.head_dim, text.vocab_size, text.rope_parameters["rope_theta"]) == (128, 131072, 1e9)
    assert (geometry.patch, geometry.merge, geometry.max_side, geometry.image_size) == (16, 1, 1024, (560, 560))
    assert (backbone.vision_width, backbone.text_width, backbone.codec.context) == (1024, 5120, 1024000)
    assert backbone.codec.rope_axes == 1 and backbone.codec.coordinates.bins == 1000
