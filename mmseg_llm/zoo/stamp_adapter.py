"""STAMP's LoRA adapters, merged into the base: `W += scale * B @ A` in float32 (specification section 5 and 7.3).

Legend: V rows of the vocabulary, D language width, r rank.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mmseg_llm.backbones.codec import load_tokenizer
from mmseg_llm.backbones.loading import read_settings
from mmseg_llm.heads.all_mask.head import AllMaskHead
from mmseg_llm.zoo.stamp_files import ADAPTER_CONFIG, CLASSIFIER, EMBEDDINGS, LM_HEAD, Weights, flat_name, has_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mmseg_llm.backbones.base import Backbone

# Settings of PEFT that change what an adapter computes, with the values under which it is plain LoRA.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False,),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "layers_to_transform": ([],),
    "exclude_modules": ([], ""),
    "layer_replication": ([],),
    "target_parameters": ([],),
    "trainable_token_indices": ([], {}),
    "init_lora_weights": (True, False, "gaussian"),  # others change the base
}


@dataclass(frozen=True)
class Adapter:
    """What `adapter_config.json` says.

    Attributes:
        folder: of the adapter.
        base: folder or hub id of the base as it was called in training; may be empty.
        rank: r.
        scale: of the update, alpha / sqrt(r) with rsLoRA and alpha / r without.
        targets: names of linear layers, or a pattern over their full names.
    """

    folder: Path
    base: str
    rank: int
    scale: float
    targets: tuple[str, ...] | str

    @classmethod
    def read(cls, folder: Path) -> Adapter:
        """Read the config of an adapter.

        Raises:
            ValueError: if it lacks a setting, or is another kind of adapter than plain or rank-stabilized LoRA.
        """
        config = read_settings(folder, ADAPTER_CONFIG)
        lacking = [name for name in ("peft_type", "r", "lora_alpha", "target_modules") if not config.get(name)]
        if lacking:
            raise ValueError(f"{folder / ADAPTER_CONFIG} has no {lacking[0]}; download the file of the adapter again")
        for name, plain in _PLAIN.items():
            value = config.get(name)
            if value is not None and value not in plain:
                raise ValueError(
                    f"the adapter in {folder} has {name} = {value!r}, which is not merged here; merge it with peft "
                    "(merge_and_unload) and give the full model"
                )
        rank, alpha, targets = int(config["r"]), float(config["lora_alpha"]), config["target_modules"]
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        names = targets if isinstance(targets, str) else tuple(targets)
        return cls(folder, config.get("base_model_name_or_path") or "", rank, scale, names)

    def adapts(self, name: str) -> bool:
        """Whether a linear layer is a target, by PEFT's rule: the end of its name, or the whole of it for a pattern."""
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, name) is not None
        return any(name == target or name.endswith(f".{target}") for target in self.targets)


def fit_vocabulary(backbone: Backbone, weights: Weights) -> None:
    """Give the base the tokens of an adapter and as many rows as it has, in place; the base may shrink (STAMP 1.4).

    Raises:
        ValueError: if the adapter's tokenizer is not that of the base with more tokens, or its matrices have other shapes than
            the tokens and the width ask for.
    """
    folder, model = weights.folder, backbone.model
    if has_tokenizer(folder):
        tokenizer = load_tokenizer(folder)
        known = tokenizer.get_vocab()
        moved = [name for name, index in backbone.codec.tokenizer.get_vocab().items() if known.get(name) != index]
        if moved:
            raise ValueError(
                f"the tokenizer in {folder} gives '{min(moved)}' another id than that of the base; "
                "give the base that the adapter was trained on"
            )
        backbone.codec = replace(backbone.codec, tokenizer=tokenizer)
    else:
        backbone.codec.add_tokens(AllMaskHead.tokens)
    rows, width = len(backbone.codec.tokenizer), backbone.text_width
    for name in (EMBEDDINGS, LM_HEAD):
        if weights.shapes.get(name, (rows, width)) != (rows, width):
            raise ValueError(
                f"{name} of the adapter in {folder} has the shape {weights.shapes[name]} where a base of width {width} with "
                f"{rows} tokens ({', '.join(AllMaskHead.tokens)} included) gives ({rows}, {width}); give the base that the "
                "adapter was trained on"
            )
    model.resize_token_embeddings(rows, mean_resizing=False)


@torch.no_grad()
def merge(model: PreTrainedModel, adapter: Adapter, weights: Weights) -> None:
    """Add the updates of an adapter to the base and put its embeddings and LM head in place.

    Sums are made in float32 and rounded once, to the type of the model.

    Raises:
        ValueError: if a target has no update or one of another shape, no layer is a target, the LM head of an untied base is
            missing, or the adapter holds something that nothing takes.
    """
    layers = {
        flat_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and adapter.adapts(name)
    }
    if not layers:
        raise ValueError(
            f"the targets {adapter.targets} of {adapter.folder} match no layer of the base; give its own base"
        )
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    required = {EMBEDDINGS, *CLASSIFIER} | (set() if is_tied else {LM_HEAD})
    updates = [f"{name}.lora_{part}.weight" for name in layers for part in "AB"]
    weights.require([*updates, *sorted(required)])
    weights.refuse(weights.shapes.keys() - required - {LM_HEAD} - set(updates))
    for name, layer in layers.items():
        down, up = (weights.tensor(f"{name}.lora_{part}.weight").float() for part in "AB")  # (r, in), (out, r)
        found, wanted = (down.shape, up.shape), ((adapter.rank, layer.in_features), (layer.out_features, adapter.rank))
        if found != wanted:
            raise ValueError(
                f"the update of {name} in {adapter.folder} has the shapes {tuple(found[0])} and {tuple(found[1])} where the "
                f"base and rank {adapter.rank} give {wanted[0]} and {wanted[1]}; give the base that it was trained on"
            )
        layer.weight.copy_(layer.weight.float() + adapter.scale * (up @ down))
    model.get_input_embeddings().weight.copy_(weights.tensor(EMBEDDINGS))
    if LM_HEAD in weights.shapes:
        _put_lm_head(model, weights.tensor(LM_HEAD), is_tied)


def _put_lm_head(model: PreTrainedModel, value: torch.Tensor, is_tied: bool) -> None:
    """Copy the LM head; an adapter may have trained it apart from embeddings that were tied to it in the base."""
    head: Any = model.get_output_embeddings()
    if is_tied:
        if torch.equal(value.to(head.weight.dtype), head.weight):
            return
        head.weight = nn.Parameter(head.weight.clone())
    head.weight.copy_(value)


@torch.no_grad()
def merged_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The state of a model whose adapters, LoRA and rows of new tokens, are merged into copies of what they adapt.

    Raises:
        ValueError: if it has an adapter of another kind.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    state = model.state_dict()
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        layer: Any = module
        weight = layer.get_base_layer().weight
        if isinstance(module, TrainableTokensLayer):
            merged = layer.get_merged_weights(layer.active_adapters)
        elif isinstance(module, LoraLayer) and isinstance(layer.get_base_layer(), nn.Linear):
            merged = weight.float() + sum(layer.get_delta_weight(active).float() for active in layer.active_adapters)
        else:
            raise ValueError(f"{name} has an adapter of type {type(module).__name__}, which is not merged here")
        bias = layer.get_base_layer().state_dict().get("bias")
        state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
        state[f"{name}.weight"] = merged.to(weight.dtype)
        if bias is not None:
            state[f"{name}.bias"] = bias
    return state
