"""What trains in a backbone: parts, LoRA adapters and the rows of new tokens, through peft, per language-model family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from mmseg_llm.backbones.base import Backbone

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Linear layers of a decoder block by transformers model type (MLLMSeg specification section 5).
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "qwen2": PROJECTIONS,
    "qwen3": PROJECTIONS,
    "llama": PROJECTIONS,
    "mistral": PROJECTIONS,
    "smollm3": PROJECTIONS,
    "qwen2_vl_text": PROJECTIONS,
    "qwen2_5_vl_text": PROJECTIONS,
    "qwen3_vl_text": PROJECTIONS,
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
}


@dataclass(frozen=True)
class Lora:
    """LoRA on the language model.

    Attributes:
        rank: of the update.
        alpha: the update is scaled by alpha / rank, or by alpha / sqrt(rank) with `rank_stabilized` (rsLoRA).
        dropout: on the input of the update.
        targets: names of linear layers; those of the model family when None.
        rank_stabilized: see `alpha`; STAMP's 7B recipe (specification section 5).
    """

    rank: int = 64
    alpha: float = 128
    dropout: float = 0.05
    targets: tuple[str, ...] | None = None
    rank_stabilized: bool = False


@dataclass(frozen=True)
class Trainable:
    """Which parts of a backbone train in full; heads always do.

    Attributes:
        vision: vision tower.
        projector: projector between vision tower and language model.
        language: decoder stack, embeddings and LM head.
        embeddings: input embeddings and LM head in full (the reference does so for InternLM2 only).
        new_rows: the embedding and LM-head rows of the tokens that heads added, when the rest of them is frozen.
        final_norm: the norm behind the last decoder layer.
    """

    vision: bool = True
    projector: bool = True
    language: bool = True
    embeddings: bool = True
    new_rows: bool = True
    final_norm: bool = True


def lora_targets(model_type: str) -> tuple[str, ...]:
    """Target names of a language-model family.

    Raises:
        ValueError: if the family is unknown.
    """
    if model_type not in LORA_TARGETS:
        raise ValueError(
            f"no LoRA targets are known for the language model '{model_type}' (known: {', '.join(LORA_TARGETS)}); "
            "name them in lora.targets"
        )
    return LORA_TARGETS[model_type]


def add_lora(language_model: PreTrainedModel, lora: Lora) -> None:
    """Inject LoRA layers into the decoder stack, in place.

    Raises:
        ValueError: if a target matches no layer.
    """
    from peft import LoraConfig, inject_adapter_in_model

    targets = lora.targets or lora_targets(language_model.config.model_type)
    names = {name.rsplit(".", 1)[-1] for name, _ in language_model.named_modules()}
    missing = [target for target in targets if target not in names]
    if missing:
        raise ValueError(f"LoRA targets {missing} match no layer of the language model; it has {sorted(names)[:20]}")
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(targets),
        use_rslora=lora.rank_stabilized,
    )
    inject_adapter_in_model(config, language_model)


def add_trainable_rows(model: PreTrainedModel, token_ids: Sequence[int]) -> None:
    """Make single rows of the input embeddings and of the LM head trainable while the matrices stay frozen, in place."""
    from peft import TrainableTokensConfig, inject_adapter_in_model

    # peft ties the LM head's rows to those of the embeddings by itself, and fails when both are named
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    targets = ["embed_tokens"] if is_tied else ["embed_tokens", "lm_head"]
    config = TrainableTokensConfig(target_modules=targets, token_indices=sorted(token_ids))
    inject_adapter_in_model(config, model, adapter_name="rows")


def set_trainable(backbone: Backbone, policy: Trainable) -> None:
    """Freeze and unfreeze the parts of a backbone; adapters that were injected before stay trainable."""
    model, language_model = backbone.model, backbone.language_model
    parts = [(backbone.vision_tower, policy.vision), (backbone.projector, policy.projector)]
    parts += [(language_model, policy.language), (model.get_output_embeddings(), policy.embeddings)]
    parts += [(model.get_input_embeddings(), policy.embeddings), (language_model.norm, policy.final_norm)]
    for module, trains in parts:
        for name, parameter in module.named_parameters():
            if "lora_" not in name and "trainable_tokens_delta" not in name:
                parameter.requires_grad_(trains)
