"""Checkpoint folders as transformers 4.51 wrote them: Pixtral under its old names, Qwen2.5-VL with a flat config."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file

from mmseg_llm.backbones.loading import cast
from mmseg_llm.backbones.pixtral import PixtralBackbone
from mmseg_llm.backbones.qwen_vl import QwenVLBackbone

PIXTRAL_NAMES = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}
QWEN_NAMES = {"model.visual.": "visual.", "model.language_model.": "model."}


def old_state(model, names: dict[str, str], is_tied: bool = False) -> dict[str, torch.Tensor]:
    state = {}
    for key, value in model.state_dict().items():
        if is_tied and key == "lm_head.weight":
            continue
        start = next((new for new in names if key.startswith(new)), "")
        state[names.get(start, "") + key.removeprefix(start)] = value.clone().contiguous()
    return state


def save_shards(folder, state, parts: int = 2) -> None:
    names = sorted(state)
    index = {"metadata": {"total_size": sum(value.nbytes for value in state.values())}, "weight_map": {}}
    for part in range(parts):
        file = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        save_file({name: state[name] for name in names[part::parts]}, folder / file, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(names[part::parts], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_json(folder, **files) -> None:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def write_pixtral(folder, dtype: str = "float32", longest: int = 192) -> PixtralBackbone:
    """As `facebook/DepthLM` is laid out (DepthLM specification J.1), from a tiny model, which is returned."""
    torch.manual_seed(0)
    backbone = PixtralBackbone(dtype=dtype).eval()
    config, tokenizer = backbone.model.config, backbone.codec.tokenizer
    text, vision = config.text_config, config.vision_config
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    save_shards(folder, old_state(backbone.model, PIXTRAL_NAMES))
    kept = ("head_dim", "hidden_size", "intermediate_size", "max_position_embeddings", "model_type", "rms_norm_eps")
    kept += ("num_attention_heads", "num_hidden_layers", "num_key_value_heads", "vocab_size")
    old_text = {name: getattr(text, name) for name in kept}
    old_text |= {"rope_theta": text.rope_parameters["rope_theta"], "sliding_window": None, "torch_dtype": dtype}
    kept = ("head_dim", "hidden_act", "hidden_size", "image_size", "intermediate_size", "model_type", "patch_size")
    kept += ("num_attention_heads", "num_hidden_layers")
    old_vision = {name: getattr(vision, name) for name in kept} | {"rope_theta": 10000.0, "torch_dtype": dtype}
    patch = {"height": vision.patch_size, "width": vision.patch_size}
    tokens = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
    write_json(
        folder,
        config={
            "architectures": ["LlavaForConditionalGeneration"],
            "ignore_index": -100,
            "image_seq_length": 1,
            "image_token_index": config.image_token_id,
            "model_type": "llava",
            "multimodal_projector_bias": True,
            "projector_hidden_act": "gelu",
            "text_config": old_text,
            "torch_dtype": dtype,
            "transformers_version": "4.51.1",
            "vision_config": old_vision,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
        preprocessor_config={
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_processor_type": "PixtralImageProcessor",
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "patch_size": patch,
            "processor_class": "PixtralProcessor",
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"longest_edge": longest},
        },
        processor_config={"patch_size": vision.patch_size, "processor_class": "PixtralProcessor", **tokens},
        generation_config={"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2},
    )
    return backbone


def write_qwen(folder, dtype: str = "float32", is_tied: bool = False) -> QwenVLBackbone:
    """Qwen2.5-VL as transformers 4.51 wrote it: fields of the language model at the top level; returns the model."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    backbone = QwenVLBackbone("qwen2_5_vl-tiny", template="qwen2_vl", dtype=dtype).eval()
    if is_tied:
        config = backbone.model.config
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
        backbone.model = cast(Qwen2_5_VLForConditionalGeneration(config), getattr(torch, dtype)).eval()
        assert backbone.lm_head.weight is backbone.model.get_input_embeddings().weight
    config = backbone.model.config
    text = config.text_config
    folder.mkdir(parents=True, exist_ok=True)
    backbone.codec.tokenizer.save_pretrained(folder)
    save_shards(folder, old_state(backbone.model, QWEN_NAMES, is_tied))
    kept = ("hidden_act", "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads")
    kept += ("num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "vocab_size", "bos_token_id", "eos_token_id")
    rope = text.rope_parameters
    sections = {"mrope_section": rope["mrope_section"], "rope_type": "default", "type": "default"}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    vision = config.vision_config.to_diff_dict() | {"torch_dtype": dtype}
    vision.pop("dtype", None)
    write_json(
        folder,
        config={
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            **{name: getattr(text, name) for name in kept},
            **{name: getattr(config, name) for name in names},
            "max_window_layers": 70,
            "rope_scaling": sections,
            "rope_theta": rope["rope_theta"],
            "sliding_window": 32768,
            "use_sliding_window": False,
            "tie_word_embeddings": is_tied,
            "torch_dtype": dtype,
            "transformers_version": "4.51.1",
            "vision_config": vision,
        },
        preprocessor_config={
            "image_processor_type": "Qwen2VLImageProcessor",
            "min_pixels": 64 * 64,
            "max_pixels": 96 * 96,
            "patch_size": 6,
            "merge_size": 2,
        },
    )
    return backbone


def write_qwen3(folder, dtype: str = "float32") -> QwenVLBackbone:
    """Qwen3-VL as transformers 5 writes it, which `facebook/VLM3-depth` needs; returns the model."""
    torch.manual_seed(0)
    backbone = QwenVLBackbone("qwen3_vl-tiny", dtype=dtype).eval()
    backbone.model.save_pretrained(folder)
    backbone.codec.tokenizer.save_pretrained(folder)
    size = {"shortest_edge": 12 * 12, "longest_edge": 240 * 240}
    write_json(folder, preprocessor_config={"size": size, "patch_size": 6, "merge_size": 2})
    return backbone
