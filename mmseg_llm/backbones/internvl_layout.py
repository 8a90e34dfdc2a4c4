"""The original InternVL checkpoint layout (`internvl_chat`) read into the stock transformers model.

Key map: MLLMSeg specification section 7.3; InternLM2 language models become Llama ones, their fused `wqkv` is split. LoRA left
unmerged in a checkpoint (`use_llm_lora` > 0) is merged while reading.
"""

from __future__ import annotations

import re
from typing import Any

import torch

VISION_RENAMES = (
    (r"^embeddings\.class_embedding$", "embeddings.cls_token"),
    (r"^embeddings\.position_embedding$", "embeddings.position_embeddings"),
    (r"^embeddings\.patch_embedding\.", "embeddings.patch_embeddings.projection."),
    (r"^encoder\.layers\.", "encoder.layer."),
    (r"\.ls1$", ".lambda_1"),
    (r"\.ls2$", ".lambda_2"),
    (r"\.attn\.proj\.", ".attention.projection_layer."),
    (r"\.attn\.(q_norm|k_norm)\.", r".attention.\1."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
)
INTERNLM2_RENAMES = (
    (r"^model\.tok_embeddings\.", "model.embed_tokens."),
    (r"^output\.", "lm_head."),
    (r"\.attention_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.attention\.wo\.", ".self_attn.o_proj."),
    (r"\.feed_forward\.w1\.", ".mlp.gate_proj."),
    (r"\.feed_forward\.w3\.", ".mlp.up_proj."),
    (r"\.feed_forward\.w2\.", ".mlp.down_proj."),
)
PROJECTOR = {"0": "layer_norm", "1": "linear_1", "3": "linear_2"}


def convert_state_dict(
    state: dict[str, torch.Tensor], config: Any, lora_scale: float = 2.0
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Rename and split an `internvl_chat` state dict.

    Args:
        state: keys under `vision_model.`, `mlp1.`, `language_model.` and possibly others (a head's).
        config: the `InternVLConfig` to load into (head counts of the fused projections).
        lora_scale: alpha / rank of unmerged LoRA (the released recipes use 128 / 64).

    Returns:
        The state dict of `InternVLForConditionalGeneration`, and the entries that belong to nobody here, unchanged.
    """
    converted: dict[str, torch.Tensor] = {}
    rest: dict[str, torch.Tensor] = {}
    for key, value in merge_lora(state, lora_scale).items():
        part, _, name = key.partition(".")
        if part == "vision_model":
            converted.update(_vision(name, value))
        elif part == "mlp1":
            index, _, leaf = name.partition(".")
            converted[f"model.multi_modal_projector.{PROJECTOR[index]}.{leaf}"] = value
        elif part == "language_model":
            converted.update(_language(name, value, config.text_config))
        else:
            rest[key] = value
    return converted, rest


def merge_lora(state: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """Fold `lora_A`/`lora_B` pairs into their base weights: `W + scale * B @ A`; nothing to do for merged checkpoints."""
    merged: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        if ".lora_A." in key or ".lora_B." in key:
            continue
        name = key.replace("language_model.base_model.model.", "language_model.")
        if ".base_layer." in key:
            stem = key.split(".base_layer.")[0]
            pair = [state.get(f"{stem}.lora_{side}.default.weight") for side in "BA"]
            name = name.replace(".base_layer.", ".")
            if pair[0] is not None and pair[1] is not None and key.endswith("weight"):
                value = (value.float() + scale * pair[0].float() @ pair[1].float()).to(value.dtype)
        merged[name] = value
    return merged


def _rename(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _vision(name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    prefix = "model.vision_tower."
    fused = re.match(r"^encoder\.layers\.(\d+)\.attn\.qkv\.(weight|bias)$", name)
    if fused:
        layer, leaf = fused.groups()
        stem = f"{prefix}encoder.layer.{layer}.attention."
        return {f"{stem}{x}_proj.{leaf}": part.clone() for x, part in zip("qkv", value.chunk(3), strict=True)}
    return {prefix + _rename(name, VISION_RENAMES): value}


def _language(name: str, value: torch.Tensor, text: Any) -> dict[str, torch.Tensor]:
    fused = re.match(r"^model\.layers\.(\d+)\.attention\.wqkv\.weight$", name)
    if fused:
        stem = f"model.language_model.layers.{fused.group(1)}.self_attn."
        q, k, v = split_wqkv(value, text.num_attention_heads, text.num_key_value_heads)
        return {f"{stem}q_proj.weight": q, f"{stem}k_proj.weight": k, f"{stem}v_proj.weight": v}
    if name.endswith("rotary_emb.inv_freq"):  # a computed buffer that old checkpoints stored
        return {}
    name = _rename(name, INTERNLM2_RENAMES)
    return {("model.language_model." + name.removeprefix("model.")) if name.startswith("model.") else name: value}


def split_wqkv(
    weight: torch.Tensor, num_heads: int, num_kv_heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Undo InternLM2's fusion: per key-value head, its query heads, then its key, then its value; `(rows, D)` each.

    The row order depends on the head counts only, so the `lora_B` of a fused adapter is split by the same function.
    """
    group = num_heads // num_kv_heads
    per_head = weight.unflatten(0, (num_kv_heads, group + 2, -1))  # (kv, group + 2, head_dim, D)
    q, k, v = per_head[:, :group], per_head[:, group], per_head[:, group + 1]
    return q.flatten(0, 2).contiguous(), k.flatten(0, 1).contiguous(), v.flatten(0, 1).contiguous()


def convert_config(chat: dict[str, Any]) -> dict[str, Any]:
    """`InternVLConfig` arguments from the `config.json` of an `internvl_chat` folder.

    Raises:
        ValueError: for a language model that has no stock counterpart here.
    """
    llm, vit = chat["llm_config"], chat["vision_config"]
    architecture = (llm.get("architectures") or ["?"])[0]
    families = {
        "InternLM2ForCausalLM": "llama",
        "LlamaForCausalLM": "llama",
        "Qwen2ForCausalLM": "qwen2",
        "Qwen3ForCausalLM": "qwen3",
    }
    if architecture not in families:
        raise ValueError(f"language model '{architecture}' is not supported; supported: {', '.join(families)}")
    kept = (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"),
        *("vocab_size", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling"),
        *("head_dim", "bos_token_id", "eos_token_id", "pad_token_id"),
    )
    text = {key: llm[key] for key in kept if llm.get(key) is not None}
    if text.get("rope_scaling"):
        scaling = dict(text.pop("rope_scaling"))
        scaling["rope_type"] = scaling.pop("type", scaling.get("rope_type", "default"))
        text["rope_parameters"] = {**scaling, "rope_theta": text.pop("rope_theta", 10000.0)}
    text |= {"model_type": families[architecture], "tie_word_embeddings": False}
    vision = {
        "hidden_size": vit["hidden_size"],
        "num_hidden_layers": vit["num_hidden_layers"],
        "num_attention_heads": vit["num_attention_heads"],
        "intermediate_size": vit["intermediate_size"],
        "image_size": chat.get("force_image_size") or vit["image_size"],
        "patch_size": vit["patch_size"],
        "attention_bias": vit.get("qkv_bias", True),
        "use_qk_norm": vit.get("qk_normalization", False),
        "norm_type": vit.get("norm_type", "layer_norm"),
        "layer_norm_eps": vit.get("layer_norm_eps", 1e-6),
        "hidden_act": vit.get("hidden_act", "gelu"),
        "layer_scale_init_value": vit.get("initializer_factor", 0.1),
    }
    return {
        "vision_config": vision,
        "text_config": text,
        "downsample_ratio": chat.get("downsample_ratio", 0.5),
        "tie_word_embeddings": False,
    }
