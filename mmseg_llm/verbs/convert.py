"""Verbs that read released checkpoints of the reference codes: `mmseg-llm convert ...`.

Heavy libraries are imported inside the verbs, so that `--help` is instant.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def stamp(
    *,
    source: str,
    output: Path,
    base: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    mask_attention: Literal["bidirectional", "causal"] = "bidirectional",
    upsampling: Literal["bilinear", "nearest"] = "bilinear",
) -> None:
    """Write a released STAMP checkpoint (full model or LoRA adapter) as a run folder that every tool reads.

    Args:
        source: folder or hub id, such as JiaZL/STAMP-2B-uni.
        output: folder to write.
        base: base model of an adapter; the one its config names by default.
        dtype: storage type.
        min_pixels: lower bound on the area of a canvas; that of the training by default.
        max_pixels: upper bound.
        mask_attention: whether mask tokens see each other in both directions.
        upsampling: of mask cells to pixels; the reference takes nearest.
    """
    from mmseg_llm.zoo.stamp import convert_stamp as run

    folder = run(
        *(source, output),
        base=base,
        dtype=dtype,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        mask_attention=mask_attention,
        upsampling=upsampling,
    )
    print(f"written: {folder}")


def segagent(
    *,
    source: str,
    output: Path,
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
) -> None:
    """Write released SegAgent weights (a full Qwen-VL-Chat) as a run folder that every tool reads.

    Args:
        source: folder or hub id in the Qwen-VL-Chat layout; the files may lie one folder deep.
        output: folder to write.
        dtype: storage type.
    """
    from mmseg_llm.zoo.segagent import convert_segagent

    print(f"written: {convert_segagent(source, output, dtype=dtype)}")


def depthlm(
    *,
    source: str,
    output: Path,
    preset: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
    max_new_tokens: int = 64,
) -> None:
    """Write DepthLM weights (a full Pixtral, Qwen2.5-VL or Qwen3-VL) as a run folder that every tool reads.

    Args:
        source: folder or hub id, such as facebook/DepthLM or facebook/VLM3-depth.
        output: folder to write.
        preset: facebook/DepthLM or facebook/VLM3-depth, for weights elsewhere that have no depthlm_config.json next to them.
        dtype: storage type.
        max_new_tokens: bound of an answer that is decoded freely.
    """
    from mmseg_llm.zoo.depthlm import convert_depthlm

    folder = convert_depthlm(source, output, preset=preset, dtype=dtype, max_new_tokens=max_new_tokens)
    print(f"written: {folder}")


def simple_click(*, source: Path, output: Path) -> None:
    """Copy the tensors of a released SimpleClick file (.pth) to safetensors, running nothing that it holds.

    Args:
        source: official file, such as cocolvis_vit_large.pth.
        output: safetensors file to write.
    """
    from mmseg_llm.segmenters.simple_click import convert_simple_click

    print(f"written: {convert_simple_click(source, output)}")
