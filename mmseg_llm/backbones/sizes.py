"""Architectures by name: tiny random ones that need no download, and the released InternVL2.5 sizes.

Figures of the released models: MLLMSeg paper section 4 and the configs of the hub folders named in `HUB_SOURCES`. Vocabulary
rows are those before `[SEG]` and `[REJ]` are appended.
"""

from __future__ import annotations

from typing import Any

INTERN_VIT_300M: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "image_size": 448,
    "patch_size": 14,
    "attention_bias": True,
    "layer_scale_init_value": 0.1,
}


# The stock 0.02 is made for widths of thousands; at width 128 it leaves every layer a gain of 0.2 and learning stalls.
TINY_INIT = 0.08


def _tiny_vision(image_size: int, patch_size: int) -> dict[str, Any]:
    """Four layers of width 128; layer scale starts at 1 because nothing is pre-trained."""
    return {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "image_size": image_size,
        "patch_size": patch_size,
        "attention_bias": True,
        "layer_scale_init_value": 1.0,
        "initializer_range": TINY_INIT,
    }


def _text(family: str, width: int, layers: int, heads: int, kv_heads: int, mlp: int, vocab: int) -> dict[str, Any]:
    """A text config; the family only decides biases, norms and rope settings."""
    config: dict[str, Any] = {
        "model_type": family,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "vocab_size": vocab,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6 if family != "llama" else 1e-5,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
    }
    if width == 128:
        config["initializer_range"] = TINY_INIT
    if family == "qwen3":
        config["head_dim"] = width // heads
    return config


SIZES: dict[str, dict[str, Any]] = {
    "internvl-tiny": {"vision": _tiny_vision(96, 8), "text": _text("qwen2", 128, 4, 4, 2, 384, 1)},
    "internvl-tiny-qwen3": {"vision": _tiny_vision(96, 8), "text": _text("qwen3", 128, 4, 4, 2, 384, 1)},
    "internvl-tiny-llama": {"vision": _tiny_vision(96, 8), "text": _text("llama", 128, 4, 4, 2, 384, 1)},
    "internvl-tiny-192": {"vision": _tiny_vision(192, 12), "text": _text("qwen2", 128, 4, 4, 2, 384, 1)},
    "internvl2_5-1b": {"vision": INTERN_VIT_300M, "text": _text("qwen2", 896, 24, 14, 2, 4864, 151674)},
    "internvl2_5-2b": {"vision": INTERN_VIT_300M, "text": _text("llama", 2048, 24, 16, 8, 8192, 92553)},
    "internvl2_5-4b": {"vision": INTERN_VIT_300M, "text": _text("qwen2", 2048, 36, 16, 2, 11008, 151674)},
    "internvl2_5-8b": {"vision": INTERN_VIT_300M, "text": _text("llama", 4096, 32, 32, 8, 14336, 92553)},
}

HUB_SOURCES = {
    "OpenGVLab/InternVL2_5-1B": "internvl2_5-1b",
    "OpenGVLab/InternVL2_5-2B": "internvl2_5-2b",
    "OpenGVLab/InternVL2_5-4B": "internvl2_5-4b",
    "OpenGVLab/InternVL2_5-8B": "internvl2_5-8b",
}
