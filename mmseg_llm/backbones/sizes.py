"""Architectures by name: tiny random ones that need no download, and the released sizes of the families.

Figures of the released models: MLLMSeg paper section 4, STAMP specification 1.1 and the configs of the hub folders named in
`HUB_SOURCES`. Vocabulary rows are those before the heads' tokens are appended.
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
TINY_WIDTH = 128


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
    if width == TINY_WIDTH:
        config["initializer_range"] = TINY_INIT
    if family == "qwen3":
        config["head_dim"] = width // heads
    return config


INTERNVL: dict[str, dict[str, Any]] = {
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
    "Qwen/Qwen2-VL-2B-Instruct": "qwen2_vl-2b",
    "Qwen/Qwen2-VL-7B-Instruct": "qwen2_vl-7b",
    "Qwen/Qwen2.5-VL-3B-Instruct": "qwen2_5_vl-3b",
    "Qwen/Qwen2.5-VL-7B-Instruct": "qwen2_5_vl-7b",
    "Qwen/Qwen3-VL-2B-Instruct": "qwen3_vl-2b",
    "Qwen/Qwen3-VL-4B-Instruct": "qwen3_vl-4b",
    "Qwen/Qwen3-VL-8B-Instruct": "qwen3_vl-8b",
    "llava-hf/llava-1.5-7b-hf": "llava-1.5-7b",
    "Qwen/Qwen-VL-Chat": "qwen-vl-chat",
    "mistral-community/pixtral-12b": "pixtral-12b",
    "facebook/DepthLM": "pixtral-12b",
    "facebook/VLM3-depth": "qwen3_vl-4b",
}


# ---- Qwen-VL: vision towers of three generations around Qwen2 and Qwen3 decoders ------------------------------------------


def _qwen_vision(family: str, width: int, **size: Any) -> dict[str, Any]:
    """A vision config; `width` is that of the language model, `size` what differs from the released towers."""
    if family == "qwen2_vl":
        return {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "hidden_size": width, **size}
    if family == "qwen2_5_vl":
        released = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "window_size": 112}
        return {**released, "fullatt_block_indexes": [7, 15, 23, 31], "out_hidden_size": width, **size}
    released = {"depth": 24, "hidden_size": 1024, "num_heads": 16, "intermediate_size": 4096, "patch_size": 16}
    deep = {"deepstack_visual_indexes": [5, 11, 17], "num_position_embeddings": 2304}
    return {**released, **deep, "out_hidden_size": width, **size}


def _qwen_text(family: str, *size: int, tied: bool, head_dim: int | None = None) -> dict[str, Any]:
    """A text config; M-RoPE sections are shares of half a head: (16, 24, 24) of 64, interleaved (24, 20, 20) for Qwen3-VL."""
    width, layers, heads, kv_heads, mlp, vocab = size
    half = (head_dim or width // heads) // 2
    thirds = (24, 20) if family == "qwen3_vl" else (16, 24)
    sections = [half * thirds[0] // 64, half * thirds[1] // 64]
    rope: dict[str, Any] = {"rope_type": "default", "mrope_section": [*sections, half - sum(sections)]}
    rope["rope_theta"] = 5e6 if family == "qwen3_vl" else 1e6
    config: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "vocab_size": vocab,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768 if family == "qwen2_vl" else 128000,
        "rope_parameters": rope,
        "tie_word_embeddings": tied,
    }
    if family == "qwen3_vl":
        rope["mrope_interleaved"] = True
        config["head_dim"] = head_dim or width // heads
    if width == TINY_WIDTH:
        config["initializer_range"] = TINY_INIT
    return config


def _tiny_qwen(family: str) -> dict[str, Any]:
    """Four layers of width 128 on 12-pixel tokens; canvases of up to 96 x 96 pixels."""
    size: dict[str, Any] = {"depth": 4, "num_heads": 4, "patch_size": 6, "initializer_range": TINY_INIT}
    size["embed_dim" if family == "qwen2_vl" else "hidden_size"] = TINY_WIDTH
    if family == "qwen2_5_vl":
        size |= {"intermediate_size": 384, "window_size": 48, "fullatt_block_indexes": [1, 3]}
    if family == "qwen3_vl":
        size |= {"intermediate_size": 384, "num_position_embeddings": 256, "deepstack_visual_indexes": [0, 1]}
    vision = _qwen_vision(family, TINY_WIDTH, **({"hidden_size": TINY_WIDTH} if family == "qwen2_vl" else {}), **size)
    text = _qwen_text(family, TINY_WIDTH, 4, 4, 2, 384, 1, tied=False)
    return {"family": family, "vision": vision, "text": text, "pixels": (64 * 64, 96 * 96)}


def _qwen(family: str, *text: int, tied: bool, head_dim: int | None = None, **vision: Any) -> dict[str, Any]:
    return {
        "family": family,
        "vision": _qwen_vision(family, text[0], **vision),
        "text": _qwen_text(family, *text, tied=tied, head_dim=head_dim),
    }


QWEN_VL: dict[str, dict[str, Any]] = {
    "qwen2_vl-tiny": _tiny_qwen("qwen2_vl"),
    "qwen2_5_vl-tiny": _tiny_qwen("qwen2_5_vl"),
    "qwen3_vl-tiny": _tiny_qwen("qwen3_vl"),
    "qwen2_vl-2b": _qwen("qwen2_vl", 1536, 28, 12, 2, 8960, 151936, tied=True),
    "qwen2_vl-7b": _qwen("qwen2_vl", 3584, 28, 28, 4, 18944, 152064, tied=False),
    "qwen2_5_vl-3b": _qwen("qwen2_5_vl", 2048, 36, 16, 2, 11008, 151936, tied=True),
    "qwen2_5_vl-7b": _qwen("qwen2_5_vl", 3584, 28, 28, 4, 18944, 152064, tied=False),
    "qwen3_vl-2b": _qwen("qwen3_vl", 2048, 28, 16, 8, 6144, 151936, tied=True, head_dim=128),
    "qwen3_vl-4b": _qwen("qwen3_vl", 2560, 36, 32, 8, 9728, 151936, tied=True, head_dim=128),
    "qwen3_vl-8b": _qwen(
        *("qwen3_vl", 4096, 36, 32, 8, 12288, 151936),
        tied=False,
        head_dim=128,
        depth=27,
        hidden_size=1152,
        intermediate_size=4304,
        deepstack_visual_indexes=[8, 16, 24],
    ),
}


# ---- LLaVA: a plain vision encoder, two linear layers, a plain decoder --------------------------------------------------------


def _tiny_encoder(family: str) -> dict[str, Any]:
    """Four layers of width 128 on 8 x 8 patches of 12 pixels."""
    config: dict[str, Any] = {
        "model_type": family,
        "hidden_size": TINY_WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 96,
        "patch_size": 12,
    }
    if family != "dinov2":
        config["intermediate_size"] = 512
    if family != "siglip_vision_model":  # which scales its init by the width
        config["initializer_range"] = TINY_INIT
    if family == "siglip_vision_model":
        config["vision_use_head"] = False
    return config


def _llava(
    vision: dict[str, Any], text: dict[str, Any], layer: int = -1, template: str = "llava_chatml"
) -> dict[str, Any]:
    return {"vision": vision, "text": text, "layer": layer, "template": template}


CLIP_L_336: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}

LLAVA: dict[str, dict[str, Any]] = {
    "llava-tiny": _llava(_tiny_encoder("siglip_vision_model"), _text("qwen2", 128, 4, 4, 2, 384, 1)),
    "llava-tiny-clip-llama": _llava(_tiny_encoder("clip_vision_model"), _text("llama", 128, 4, 4, 2, 384, 1)),
    "llava-tiny-dinov2-smollm3": _llava(_tiny_encoder("dinov2"), _text("smollm3", 128, 4, 4, 2, 384, 1)),
    "llava-1.5-7b": _llava(
        CLIP_L_336,
        _text("llama", 4096, 32, 32, 32, 11008, 32064) | {"rope_theta": 1e4, "max_position_embeddings": 4096},
        layer=-2,
        template="llava_1_5",
    ),
}


# ---- Qwen-VL-Chat: its own vision tower, a resampler of learned queries, a Qwen2 decoder --------------------------------------


def _qwen_vl_chat(vision: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    """The original language model is a Qwen2 up to 2048 tokens; the rest of the released tower is the default."""
    del text["rope_theta"], text["model_type"]
    text |= {"max_position_embeddings": 2048, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    return {"vision": vision | {"output_size": text["hidden_size"]}, "text": text}


TINY_CHAT_VISION: dict[str, Any] = {
    "hidden_size": TINY_WIDTH,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "image_size": 96,
    "patch_size": 8,
    "num_positions": 36,
    "num_queries": 36,
    "num_pool_heads": 1,
    "initializer_range": TINY_INIT,
}

QWEN_VL_CHAT: dict[str, dict[str, Any]] = {
    "qwen-vl-chat-tiny": _qwen_vl_chat(TINY_CHAT_VISION, _text("qwen2", 128, 4, 4, 4, 384, 1)),
    "qwen-vl-chat": _qwen_vl_chat({}, _text("qwen2", 4096, 32, 32, 32, 11008, 151936)),
}


# ---- Pixtral: a vision encoder for any image size, two linear layers, a Mistral decoder ---------------------------------------


def _pixtral(vision: dict[str, Any], text: dict[str, Any], theta: float, head_dim: int) -> dict[str, Any]:
    """Figures of the released model: DepthLM specification J.1 and the configs of the hub folders."""
    del text["rope_theta"]
    rope = {"rope_type": "default", "rope_theta": theta}
    text |= {"head_dim": head_dim, "rms_norm_eps": 1e-5, "sliding_window": None, "rope_parameters": rope}
    return {"vision": {"model_type": "pixtral", "hidden_act": "silu", **vision}, "text": text}


TINY_PIXTRAL_VISION: dict[str, Any] = {
    "hidden_size": TINY_WIDTH,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 384,
    "image_size": 96,
    "patch_size": 12,
    "initializer_range": TINY_INIT,
}
PIXTRAL_400M: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "image_size": 1024,
    "patch_size": 16,
}

PIXTRAL: dict[str, dict[str, Any]] = {
    "pixtral-tiny": _pixtral(TINY_PIXTRAL_VISION, _text("mistral", 128, 4, 4, 2, 384, 1), 1e6, 32),
    "pixtral-12b": _pixtral(
        PIXTRAL_400M,
        _text("mistral", 5120, 40, 32, 8, 14336, 131072) | {"max_position_embeddings": 1024000},
        theta=1e9,
        head_dim=128,
    ),
}
