"""Released SegAgent weights (Qwen): full fine-tunes of Qwen-VL-Chat without parameters of their own, written as run folders.

A click policy is prompt, coordinate codec and parser (SegAgent specification sections 4 and 16); they are settings of the head.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

from mmseg_llm.backbones.loading import cast
from mmseg_llm.backbones.qwen_vl_chat import QwenVlChatBackbone
from mmseg_llm.model import PerceptionModel
from mmseg_llm.training.checkpoint import new_run, save_run

HEADS: dict[str, Any] = {
    "click_policy": {
        "class_path": "mmseg_llm.heads.click_policy.head.ClickPolicyHead",
        "init_args": {"prompt_style": "qwen"},  # its codec is `qwen_milli` unless another one is named
    }
}
"""The prompt that the weights were trained with; (row, column) as integers of a thousand, IoU in percent."""

DType = Literal["float32", "bfloat16", "float16"]


def load_segagent(
    source: str | Path, *, dtype: DType = "bfloat16", attention: str = "sdpa", heads: dict[str, Any] | None = None
) -> PerceptionModel:
    """Released SegAgent weights as a model of this library, in evaluation mode; its head is called `click_policy`.

    Args:
        source: folder or hub id in the Qwen-VL-Chat layout; the files may lie one folder deep.
        dtype: storage type; the weights are released in bfloat16.
        attention: `sdpa`, `eager` or `flex_attention`.
        heads: settings of the heads, by name, when they are not to be `HEADS`.

    Raises:
        ValueError: if the source is no such checkpoint, weights are missing or foreign, or the tokenizer is of another model.
    """
    backbone = QwenVlChatBackbone(str(source), dtype=dtype, attention=attention)
    model = PerceptionModel(backbone, _build_heads(HEADS if heads is None else heads)).eval()
    cast(model, backbone.model.dtype)  # as run folders are loaded
    return model


def convert_segagent(
    source: str | Path,
    output: str | Path,
    *,
    dtype: DType = "bfloat16",
    attention: str = "sdpa",
    heads: dict[str, Any] | None = None,
) -> Path:
    """Write released SegAgent weights as a run folder, for `Perceiver.from_pretrained`, evaluation and further training.

    To train on, take architecture and vocabulary from the folder, too: `--model.backbone.init_args.source OUTPUT/backbone
    --model.backbone.init_args.weights random --model.initial_weights OUTPUT`.

    Args:
        source: see `load_segagent`, as all others.
        output: folder to write.

    Returns:
        The folder.

    Raises:
        ValueError: as `load_segagent`, or if the folder holds a model already.
    """
    folder = new_run(output)
    chosen = copy.deepcopy(HEADS if heads is None else heads)
    model = load_segagent(source, dtype=dtype, attention=attention, heads=chosen)
    arguments = {"source": str(source), "dtype": dtype, "attention": attention}
    backbone = {"class_path": "mmseg_llm.backbones.QwenVlChatBackbone", "init_args": arguments}
    return save_run(model, folder, {"backbone": backbone, "heads": chosen})


def _build_heads(settings: dict[str, Any]) -> Any:
    """Heads from their settings, by the parser that training uses."""
    from jsonargparse import ArgumentParser

    from mmseg_llm.heads.base import Head

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--heads", type=dict[str, Head])
    return parser.instantiate_classes(parser.parse_object({"heads": settings})).heads
