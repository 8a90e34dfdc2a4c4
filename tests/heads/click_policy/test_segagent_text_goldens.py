"""Parity with the text interface of SegAgent (goldens README, "segagent_text")."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from golden_files import golden_files, read_golden, unpack_bits
from PIL import Image

from mmseg_llm.heads.click_policy.codec import QWEN_MILLI
from mmseg_llm.heads.click_policy.overlay import COLOURS, Overlay
from mmseg_llm.heads.click_policy.prompts import qwen_prompt
from mmseg_llm.heads.click_policy.text import Status, parse, parse_official, select_official

pytestmark = [
    pytest.mark.golden,
    pytest.mark.parametrize("path", golden_files("segagent_text*"), ids=lambda path: path.stem),
]


def test_segagent_text_parser(path: Path):
    _, meta = read_golden(path)
    for case in meta["parser"]:
        action = parse_official(case["text"])
        assert action.is_positive == case["positive"], case
        assert action.point == (None if case["point"] is None else tuple(case["point"])), case
        assert list(action.box) == case["box_mode_box"], case
        for size in meta["sizes"]:
            pixel = case["pixels"]["x".join(map(str, size))]
            if pixel is not None:
                assert list(QWEN_MILLI.decode(action.point, size, clamp=False)) == pixel, case
                inside = [min(max(value, 0), extent - 1) for value, extent in zip(pixel, size)]
                assert list(QWEN_MILLI.decode(action.point, size)) == inside, case
    print(path.stem, f"{len(meta['parser'])} answers equal")


def test_segagent_text_clean_parser_agrees_where_both_read(path: Path):
    """What the clean parser accepts is what the official one reads, where that reads anything."""
    _, meta = read_golden(path)
    for case in meta["parser"]:
        for size in meta["sizes"]:
            action = parse(case["text"], tuple(size))
            if action.status is Status.OK and case["point"] is not None:
                inside = [min(max(v, 0), e - 1) for v, e in zip(case["pixels"]["x".join(map(str, size))], size)]
                assert [action.click.row, action.click.col] == inside, case
                assert action.click.is_positive == case["positive"], case
            if case["point"] is not None and (max(case["point"]) > 999 or min(case["point"]) < 0):
                assert action.status is Status.OUT_OF_RANGE, case


def test_segagent_text_overlay(path: Path):
    tensors, _ = read_golden(path)
    image, mask = tensors["overlay.image"].numpy(), tensors["overlay.mask"].numpy()
    for colour in COLOURS:
        shown = np.asarray(Overlay(colour=colour)(Image.fromarray(image), mask))
        assert np.array_equal(shown, tensors[f"overlay.{colour}"].numpy()), colour


def paint(mask: np.ndarray, row: int, col: int, is_positive: bool, meta: dict) -> np.ndarray:
    """One click of the `disks` segmenter."""
    radius = meta["episode_segmenter"]["rp" if is_positive else "rn"]
    rows, cols = np.indices(mask.shape)
    return np.where((rows - row) ** 2 + (cols - col) ** 2 <= radius**2, is_positive, mask)


def test_segagent_text_episodes(path: Path):
    """The official loop, replayed: unclamped pixels, any failure ends it."""
    tensors, meta = read_golden(path)
    size = tuple(meta["episode_size"])
    assert meta["episode_segmenter"]["kind"] == "disks"
    for e, episode in enumerate(meta["episodes"]):
        mask, observed, clicks = np.zeros(size, bool), [], []
        script = iter([*episode["outputs"], *["Finish"] * meta["n_clicks"]])
        for _ in range(meta["n_clicks"]):
            observed.append(mask)
            action = parse_official(next(script))
            if action.point is None:
                break
            clicks.append([*QWEN_MILLI.decode(action.point, size, clamp=False), action.is_positive])
            mask = paint(mask, *clicks[-1], meta)
        assert (len(observed), clicks, int(mask.sum())) == (episode["calls"], episode["clicks"], episode["final_area"])
        assert np.array_equal(mask, unpack_bits(tensors[f"episode{e}.final_mask_bits"], size)), e
        shown = unpack_bits(tensors[f"episode{e}.observed_mask_bits"], (len(observed), *size))
        assert np.array_equal(np.stack(observed), shown), e


def test_segagent_text_posthoc(path: Path):
    _, meta = read_golden(path)
    for case in meta["posthoc"]:
        assert select_official(case["outputs"]) == case["selected"], case


def test_segagent_text_prompt(path: Path):
    _, meta = read_golden(path)
    start, end = "Picture 1: <img>", "</img>"
    image = meta["prompt_example"].split(start)[1].split(end)[0]
    caption = meta["prompt_example"].split("<ref>")[1].split("</ref>")[0]
    assert qwen_prompt(caption, image) == meta["prompt_example"]
