"""Released STAMP checkpoints: full models (STAMP-2B-uni) and LoRA adapters (STAMP-7B-lora), read, converted, written back.

A checkpoint is stock Qwen2-VL with four more tokens and `classifier`, a linear layer with one output (STAMP specification section
1.4, 2.1 and 7).

Legend: V rows of the vocabulary, D language width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from mmseg_llm.backbones.qwen_vl import QwenVLBackbone
from mmseg_llm.heads.all_mask.head import AllMaskHead
from mmseg_llm.model import PerceptionModel
from mmseg_llm.training.checkpoint import new_run, save_run
from mmseg_llm.zoo.stamp_adapter import Adapter, fit_vocabulary, merge, merged_state
from mmseg_llm.zoo.stamp_files import (
    CLASSIFIER,
    EMBEDDINGS,
    LM_HEAD,
    Weights,
    adapter_files,
    fetch,
    flat_name,
    is_adapter,
    model_files,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEAD = "all_mask"
MIN_PIXELS, MAX_PIXELS = 1024 * 28 * 28, 1280 * 28 * 28
"""Canvas areas that STAMP was trained with and its demo uses; its evaluation takes the smaller one for both (section 1.2)."""

DType = Literal["float32", "bfloat16", "float16"]


def load_stamp(
    source: str | Path,
    *,
    base: str | Path | None = None,
    dtype: DType = "float32",
    attention: str = "sdpa",
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    mask_attention: Literal["bidirectional", "causal"] = "bidirectional",
    upsampling: Literal["bilinear", "nearest"] = "bilinear",
    max_new_tokens: int = 1024,
) -> PerceptionModel:
    """A released STAMP checkpoint as a model of this library, in evaluation mode; its head is called `all_mask`.

    An adapter is merged into its base, so the model has no adapters. Nothing is taken from the checkpoint's image processor but
    the channel statistics.

    Args:
        source: folder or hub id of a full model or of a LoRA adapter.
        base: folder or hub id that an adapter is merged into; the one it names when None.
        dtype: storage type. An update is added in float32 to the base as it is in this type.
        attention: `sdpa`, `eager` or `flex_attention`.
        min_pixels, max_pixels: bounds on the area of a canvas; `MIN_PIXELS` and `MAX_PIXELS` when None.
        mask_attention: `bidirectional`, or `causal` (section 8, quirk 1).
        upsampling: of cells to pixels: `bilinear` on logits, or the reference's `nearest`; the protocol `official` always takes
            the latter.
        max_new_tokens: bound of an answer; the reference's by default.

    Raises:
        ValueError: if the source is no such checkpoint, keys are missing or unexpected, the vocabulary or the classifier does
            not fit, or `base` is given for a full model.
    """
    folder = fetch(source)
    low, high = min_pixels or MIN_PIXELS, max_pixels or MAX_PIXELS
    arguments: dict[str, Any] = {"dtype": dtype, "attention": attention, "min_pixels": low, "max_pixels": high}
    head = AllMaskHead(
        label_rule="centre_strict", mask_attention=mask_attention, upsampling=upsampling, max_new_tokens=max_new_tokens
    )
    from_adapter = is_adapter(folder)
    if from_adapter:
        weights = Weights(folder, adapter_files(folder))
        backbone = _merged_backbone(folder, weights, base, arguments)
    elif base is not None:
        raise ValueError(f"{folder} is a full model, which needs no base; leave `base` out")
    else:
        weights = Weights(folder, model_files(folder))
        weights.require((EMBEDDINGS, *CLASSIFIER))
        weights.check_classifier()
        with _without_load_report():
            backbone = QwenVLBackbone(str(folder), **arguments)
    _record_tie(backbone.model)
    _check_vocabulary(backbone, folder)
    model = PerceptionModel(backbone, {HEAD: head})
    _put_classifier(head, weights, backbone.model.dtype)
    if not from_adapter:
        names = state_dict_stamp(model).keys()
        weights.require(names)
        weights.refuse(weights.shapes.keys() - names - {LM_HEAD})
    return model.eval()


def convert_stamp(
    source: str | Path,
    output: str | Path,
    *,
    base: str | Path | None = None,
    dtype: DType = "float32",
    attention: str = "sdpa",
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    mask_attention: Literal["bidirectional", "causal"] = "bidirectional",
    upsampling: Literal["bilinear", "nearest"] = "bilinear",
    max_new_tokens: int = 1024,
) -> Path:
    """Write a released STAMP checkpoint as a run folder, for `Perceiver.from_pretrained`, evaluation and further training.

    To train on, take architecture and vocabulary from the folder, too: `--model.backbone.init_args.source OUTPUT/backbone
    --model.backbone.init_args.weights random --model.initial_weights OUTPUT`.

    Args:
        source: see `load_stamp`, as all others.
        output: folder to write.

    Returns:
        The folder.

    Raises:
        ValueError: as `load_stamp`, or if the folder holds a model already.
    """
    folder = new_run(output)
    model = load_stamp(
        source,
        base=base,
        dtype=dtype,
        attention=attention,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        mask_attention=mask_attention,
        upsampling=upsampling,
        max_new_tokens=max_new_tokens,
    )
    return save_run(model, folder, _settings(model, str(source)))


def state_dict_stamp(model: PerceptionModel) -> dict[str, torch.Tensor]:
    """The weights of a model under the official names, for the official code; those of the model itself, copies only where
    adapters are merged.

    Args:
        model: a Qwen2-VL or Qwen2.5-VL backbone with a one-class `all_mask` head on the reference's grid.

    Returns:
        `visual.*`, `model.*`, `lm_head.weight` unless it is tied, `classifier.weight` `(1, D)` and `classifier.bias` `(1,)`.

    Raises:
        ValueError: if the official code has no place for what the model holds.
    """
    heads = [head for head in model.heads.values() if isinstance(head, AllMaskHead)]
    family = getattr(model.backbone.model.config, "model_type", None)
    if not heads or family not in ("qwen2_vl", "qwen2_5_vl"):
        raise ValueError(
            f"a model of type '{family}' with the heads {', '.join(model.heads)} is no STAMP; it takes a Qwen2-VL or "
            "Qwen2.5-VL backbone and an all-mask head"
        )
    if len(heads[0].classifier.weight) != 1 or heads[0].place is not None:
        raise ValueError(
            "STAMP's classifier has one output per image token; train with num_classes, scale and cells of 1"
        )
    state = merged_state(model.backbone.model)
    if model.backbone.lm_head.weight is model.backbone.model.get_input_embeddings().weight:
        del state[LM_HEAD]
    values = {flat_name(key): value for key, value in state.items()}
    classifier = heads[0].classifier
    return values | {CLASSIFIER[0]: classifier.weight.detach(), CLASSIFIER[1]: classifier.bias.detach()}


def _merged_backbone(
    folder: Path, weights: Weights, base: str | Path | None, arguments: dict[str, Any]
) -> QwenVLBackbone:
    """The base of an adapter with the adapter merged into it."""
    adapter = Adapter.read(folder)
    weights.require((EMBEDDINGS, *CLASSIFIER))
    weights.check_classifier()
    if base is None and not adapter.base:
        raise ValueError(f"the adapter in {folder} names no base; give it as `base`")
    try:
        base_folder = fetch(base or adapter.base)
    except ValueError as error:
        if base is not None:
            raise
        raise ValueError(f"the base that {folder} names is not there ({error}); give it as `base`") from error
    backbone = QwenVLBackbone(str(base_folder), **arguments)
    fit_vocabulary(backbone, weights)
    merge(backbone.model, adapter, weights)
    return backbone


@torch.no_grad()
def _put_classifier(head: AllMaskHead, weights: Weights, dtype: torch.dtype) -> None:
    """Copy the classifier and give the head the type of the model; the rotary frequencies of a model stay float32."""
    head.classifier.weight.copy_(weights.tensor(CLASSIFIER[0]))
    head.classifier.bias.copy_(weights.tensor(CLASSIFIER[1]))
    head.to(dtype)


@contextmanager
def _without_load_report() -> Iterator[None]:
    """The stock class reports the classifier as a key it ignores; every key is accounted for here."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _record_tie(model: PreTrainedModel) -> None:
    """Make the config say whether LM head and embeddings are tied, as it is built from anew in a run folder."""
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = is_tied


def _check_vocabulary(backbone: QwenVLBackbone, folder: Path) -> None:
    """Raises: ValueError if a control token is missing, or the tokenizer has more tokens than the embeddings have rows."""
    tokenizer, rows = backbone.codec.tokenizer, backbone.model.get_input_embeddings().weight.shape[0]
    known = tokenizer.get_vocab()
    missing = [token for token in AllMaskHead.tokens if token not in known]
    if missing:
        raise ValueError(
            f"the tokenizer of {folder} has no {missing[0]}; use the tokenizer that was saved with the checkpoint"
        )
    last = max(known[token] for token in AllMaskHead.tokens)
    if len(tokenizer) > rows or last >= rows:
        raise ValueError(
            f"the tokenizer of {folder} has {len(tokenizer)} tokens and control tokens up to id {last}, the embeddings have "
            f"{rows} rows; use the tokenizer that was saved with the checkpoint"
        )


def _settings(model: PerceptionModel, source: str) -> dict[str, Any]:
    """Backbone and head as a training config names them, with what was resolved."""
    backbone, head = model.backbone, model.head(HEAD)
    assert isinstance(head, AllMaskHead)
    return {
        "backbone": {
            "class_path": "mmseg_llm.backbones.QwenVLBackbone",
            "init_args": {
                "source": source,
                "dtype": str(backbone.model.dtype).removeprefix("torch."),
                "attention": backbone.attention,
                "min_pixels": backbone.codec.geometry.min_pixels,
                "max_pixels": backbone.codec.geometry.max_pixels,
            },
        },
        "heads": {
            HEAD: {
                "class_path": "mmseg_llm.heads.AllMaskHead",
                "init_args": {
                    "label_rule": head.label_rule,
                    "mask_attention": "bidirectional" if head.is_bidirectional else "causal",
                    "upsampling": head.upsampling,
                    "max_new_tokens": head.max_new_tokens,
                },
            }
        },
    }
