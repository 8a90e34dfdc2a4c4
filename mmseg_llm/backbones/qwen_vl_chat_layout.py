"""The official Qwen-VL-Chat layout (`model_type: qwen`), which SegAgent's weights have, and the names and rows used here.

Key map: SegAgent specification section 10.1. Both directions only rename, cut, join and reorder rows, so they are inverse bit
for bit.

Legend: D language width, V vision width, n heads, d width of a head.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from mmseg_llm.backbones.loading import CONFIG_FILE, fetch_folder, misfit, read_settings, weight_files

# Ours on the left. `{}` is the number of a layer.
PLAIN_NAMES = {
    "lm_head.weight": "lm_head.weight",
    "model.language_model.embed_tokens.weight": "transformer.wte.weight",
    "model.language_model.norm.weight": "transformer.ln_f.weight",
    "model.vision_tower.conv1.weight": "transformer.visual.conv1.weight",
    "model.vision_tower.positional_embedding": "transformer.visual.positional_embedding",
    "model.vision_tower.ln_pre.": "transformer.visual.ln_pre.",
    "model.projector.": "transformer.visual.",
}
DECODER_NAMES = {
    "input_layernorm.weight": "ln_1.weight",
    "post_attention_layernorm.weight": "ln_2.weight",
    "self_attn.o_proj.weight": "attn.c_proj.weight",
    "mlp.up_proj.weight": "mlp.w1.weight",
    "mlp.gate_proj.weight": "mlp.w2.weight",
    "mlp.down_proj.weight": "mlp.c_proj.weight",
}
DECODER, OFFICIAL_DECODER = "model.language_model.layers.", "transformer.h."
BLOCKS, OFFICIAL_BLOCKS = "model.vision_tower.blocks.", "transformer.visual.transformer.resblocks."
# Computed buffers that some copies of the official code stored; nothing is lost with them.
LEFTOVERS = re.compile(
    r"^transformer\.(rotary_emb\.inv_freq|h\.\d+\.attn\.(masked_bias|bias)|visual\.attn_pool\.attn_mask)$"
)
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def group_by_head(blocks: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows `[q; k; v]`, each `(n * d, ...)`, in the official order: per head its q, its k, its v."""
    return blocks.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)


def ungroup_heads(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Inverse of `group_by_head`."""
    return rows.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)


def official_state(state: Mapping[str, torch.Tensor], vision_heads: int) -> dict[str, torch.Tensor]:
    """A state dict of `QwenVlChatForCausalLM` under its official names; tensors on the meta device give names and shapes.

    Args:
        state: complete.
        vision_heads: n of the vision tower.
    """
    out: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        if key.startswith(DECODER):
            layer, _, name = key.removeprefix(DECODER).partition(".")
            stem = f"{OFFICIAL_DECODER}{layer}."
            if name in DECODER_NAMES:
                out[stem + DECODER_NAMES[name]] = value
            elif name.startswith("self_attn.q_proj."):
                parts = [state[key.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
                out[f"{stem}attn.c_attn.{name.rsplit('.', 1)[1]}"] = torch.cat(parts)
        elif key.startswith(BLOCKS):
            is_fused = ".attn.in_proj." in key
            out[OFFICIAL_BLOCKS + key.removeprefix(BLOCKS)] = group_by_head(value, vision_heads) if is_fused else value
        else:
            out[_renamed(key, PLAIN_NAMES.items())] = value
    return out


def own_state(key: str, value: torch.Tensor, vision_heads: int) -> dict[str, torch.Tensor]:
    """One official tensor under the names used here: one, or three for the fused projections of the decoder.

    Args:
        key: an official name.
        value: its tensor.
        vision_heads: n of the vision tower.
    """
    if key.startswith(OFFICIAL_DECODER):
        layer, _, name = key.removeprefix(OFFICIAL_DECODER).partition(".")
        stem = f"{DECODER}{layer}."
        if name.startswith("attn.c_attn."):
            leaf = name.rsplit(".", 1)[1]
            parts = zip("qkv", value.chunk(3), strict=True)
            return {f"{stem}self_attn.{part}_proj.{leaf}": rows for part, rows in parts}
        return {stem + {theirs: ours for ours, theirs in DECODER_NAMES.items()}[name]: value}
    if key.startswith(OFFICIAL_BLOCKS):
        is_fused = ".attn.in_proj." in key
        return {BLOCKS + key.removeprefix(OFFICIAL_BLOCKS): ungroup_heads(value, vision_heads) if is_fused else value}
    return {_renamed(key, ((theirs, ours) for ours, theirs in PLAIN_NAMES.items())): value}


def _renamed(key: str, names: Iterable[tuple[str, str]]) -> str:
    for old, new in names:
        if key.startswith(old):
            return new + key.removeprefix(old)
    raise AssertionError(f"no name for '{key}'")


# ---- folders ----------------------------------------------------------------------------------------------------------


def checkpoint_folder(source: str, with_weights: bool, sizes: Iterable[str]) -> Path:
    """The folder of a checkpoint, which mirrors nest one folder deep.

    Args:
        source: folder or hub id.
        with_weights: whether the weights are needed.
        sizes: names of the sizes that would have been understood, for the message.

    Raises:
        ValueError: if there is none, or more than one.
    """
    folder = fetch_folder(source, with_weights, list(sizes))
    if (folder / CONFIG_FILE).is_file():
        return folder
    inner = sorted(path.parent for path in folder.glob(f"*/{CONFIG_FILE}"))
    if len(inner) != 1:
        found = (
            f"{len(inner)} folders with one: {', '.join(path.name for path in inner)}"
            if inner
            else "nor has a folder in it"
        )
        raise ValueError(f"folder {folder} has no {CONFIG_FILE}, {found}; give the folder of one checkpoint")
    return inner[0]


def load_official(model: torch.nn.Module, folder: Path, dtype: torch.dtype, vision_heads: int) -> None:
    """Fill a model that was built on the meta device, file by file: beside the model there is never more than one file.

    Args:
        model: `QwenVlChatForCausalLM`.
        folder: with all weight files.
        dtype: storage type.
        vision_heads: n of the vision tower.

    Raises:
        ValueError: if a file is missing or damaged, or a tensor is missing, foreign, doubled or of another shape.
    """
    shapes = {key: tuple(value.shape) for key, value in official_state(model.state_dict(), vision_heads).items()}
    seen: set[str] = set()
    for path in _complete_files(folder):
        shard = read_tensors(path)
        own: dict[str, torch.Tensor] = {}
        for key in list(shard):
            value = shard.pop(key)
            if LEFTOVERS.match(key):
                continue
            _check(path, key, value, shapes, seen)
            seen.add(key)
            # copies, so that no part keeps the memory of a fused tensor or the mapping of the file
            parts = own_state(key, value, vision_heads).items()
            own |= {name: part.to(dtype, copy=True).contiguous() for name, part in parts}
        model.load_state_dict(own, strict=False, assign=True)
    missing = sorted(shapes.keys() - seen)
    if missing:
        raise ValueError(misfit(folder, missing))


def _check(
    path: Path, key: str, value: torch.Tensor, shapes: Mapping[str, tuple[int, ...]], seen: Iterable[str]
) -> None:
    """Raises: ValueError if a tensor is foreign, came before, or has another shape than the config gives."""
    if key not in shapes:
        raise ValueError(misfit(path.parent, [], [key]))
    if key in seen:
        raise ValueError(f"{path} holds {key} a second time; remove weight files of other checkpoints from its folder")
    if tuple(value.shape) != shapes[key]:
        raise ValueError(
            f"{key} in {path} has the shape {tuple(value.shape)} where the config gives {shapes[key]}; "
            "use weights and config of one checkpoint"
        )


def _complete_files(folder: Path) -> list[Path]:
    """Weight files of a folder.

    Raises:
        ValueError: if there are none, or one that an index names is missing.
    """
    files = weight_files(folder)
    index = INDEX_FILES[files[0].suffix != ".safetensors"]
    named = sorted(set(read_settings(folder, index).get("weight_map", {}).values()))
    missing = [name for name in named if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} has no {missing[0]}, which {index} names; download all weight files of the checkpoint"
        )
    return [folder / name for name in named] or files


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of one weight file; pickles are read without running code from them.

    Raises:
        ValueError: if the file is damaged, or holds more than tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    read: Callable[[Path], Any] = load_file if path.suffix == ".safetensors" else _unpickle
    try:
        return read(path)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} is damaged or holds more than tensors ({type(error).__name__}); download it again from its source"
        ) from error


def _unpickle(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, map_location="cpu", weights_only=True)


# ---- configs ----------------------------------------------------------------------------------------------------------


def convert_config(settings: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Arguments of `QwenVlChatConfig` from an official `config.json`; the id of the image token is left to the tokenizer.

    Args:
        settings: of the file.
        source: for messages.

    Raises:
        ValueError: if there is no vision tower, a setting is missing, or one has no counterpart here.
    """
    visual = settings.get("visual")
    if not visual:
        raise ValueError(
            f"'{source}' is a Qwen language model without a 'visual' section; give a Qwen-VL-Chat checkpoint"
        )
    try:
        width, heads = settings["hidden_size"], settings["num_attention_heads"]
        text = {
            "vocab_size": settings["vocab_size"],
            "hidden_size": width,
            "num_hidden_layers": settings["num_hidden_layers"],
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "intermediate_size": settings["intermediate_size"] // 2,  # the official one counts gate and up together
            "rms_norm_eps": settings.get("layer_norm_epsilon", 1e-6),
            "rope_parameters": {"rope_type": "default", "rope_theta": float(settings.get("rotary_emb_base", 10000))},
            # beyond it the original rescales rotary frequencies and attention, and is no Qwen2 any more
            "max_position_embeddings": settings["seq_length"],
            "tie_word_embeddings": False,
        }
        vision = {
            "hidden_size": visual["width"],
            "num_hidden_layers": visual["layers"],
            "num_attention_heads": visual["heads"],
            "intermediate_size": int(visual["width"] * visual["mlp_ratio"]),
            "image_size": visual["image_size"],
            "patch_size": visual["patch_size"],
            "num_queries": visual.get("n_queries", 256),
            "output_size": visual["output_dim"],
            "num_pool_heads": visual["output_dim"] // 128,
        }
    except KeyError as error:
        raise ValueError(f"the config of '{source}' has no {error}; use the config.json of the checkpoint") from error
    odd = {
        "rotary_pct": settings.get("rotary_pct", 1.0) != 1.0,
        "kv_channels": settings.get("kv_channels", width // heads) * heads != width,
        "tie_word_embeddings": bool(settings.get("tie_word_embeddings")),
        "output_dim": visual["output_dim"] != width or width % 128 != 0,
    }
    if any(odd.values()):
        name = next(name for name, is_odd in odd.items() if is_odd)
        value = settings.get(name, visual.get(name))
        raise ValueError(
            f"'{source}' has {name} = {value}, which no released Qwen-VL-Chat has; use an unchanged config.json"
        )
    return {"vision_config": vision, "text_config": text}
