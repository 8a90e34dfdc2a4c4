"""export_sft: labelled masks so far as training files of other trainers (SegAgent specification section 5).

What a click policy sees is an image with the mask so far on it. Other trainers read images from files, so these pictures are
written once for each image and mask, below `images/`, under names made from their content: a stopped export goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from mmseg_llm.heads.click_policy.codec import QWEN_MILLI, ClickCodec
from mmseg_llm.heads.click_policy.overlay import Overlay
from mmseg_llm.heads.click_policy.prompts import ClickPrompts, qwen_question
from mmseg_llm.heads.click_policy.text import write

if TYPE_CHECKING:
    from PIL import Image

    from mmseg_llm.heads.click_policy.head import ClickPolicyHead
    from mmseg_llm.structures import Mask, Query, Sample, Size

Style = Literal["llava", "qwen", "chat"]
ImageFormat = Literal["jpg", "png"]
FILES: dict[str, str] = {"llava": "llava.json", "qwen": "qwen.json", "chat": "chat.jsonl"}
DEFAULT_OVERLAY, DEFAULT_PROMPTS = Overlay(), ClickPrompts()

_RESERVED = re.compile(r"</?(?:image|img|video|audio|ref|box|quad)>|<\|")
_LLAMA_FACTORY = {
    "click_policy": {
        "file_name": FILES["chat"],
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "images": "images"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    }
}


def export_sft(
    dataset: Iterable[Sample],
    output: str | Path,
    style: Style,
    *,
    codec: ClickCodec = QWEN_MILLI,
    overlay: Overlay = DEFAULT_OVERLAY,
    prompts: ClickPrompts = DEFAULT_PROMPTS,
    with_iou: bool = True,
    with_estimates: bool = True,
    image_format: ImageFormat = "jpg",
    seed: int = 0,
) -> dict[str, Any]:
    """Write one record per query that says what the next click is.

    Into `output`: `llava.json` (LLaVA; its image folder is `output`), `qwen.json` (Qwen-VL in the wording of the released
    SegAgent weights; paths are relative, so train from within `output`) or `chat.jsonl` (`messages` and `images`, for ms-swift,
    and for LLaMA-Factory with `output` as its dataset folder, described in `dataset_info.json`); the pictures in `images/`; and
    `<style>.settings.json` with the codec, which whoever uses the trained weights needs. Styles can share a folder.

    Args:
        dataset: such as a `TrajectoryDataset`; every query brings its mask so far (`start`) and its `next_click`.
        output: folder to write into.
        style: which trainers are to read it.
        codec: of clicks and IoUs in the answers.
        overlay: how the mask so far is shown.
        prompts: question templates of `llava` and `chat`, of which each record draws one.
        with_iou: answers start with the IoU of the mask so far.
        with_estimates: keep labels that are an IoU only. A trainer that supervises whole answers learns from them to end an
            answer there, too.
        image_format: of the pictures; `jpg` of high quality, or lossless `png`.
        seed: of the templates.

    Returns:
        Counts: `records`, `images` they show, of which `written` now and `present` before, and `skipped` queries by reason.

    Raises:
        ValueError: for an unknown style or format, another colour than green with `qwen`, or nothing to write.
    """
    for name, value, known in (("style", style, FILES), ("image_format", image_format, get_args(ImageFormat))):
        if value not in known:
            raise ValueError(f"{name} is '{value}'; choose from {', '.join(known)}")
    if style == "qwen" and overlay.colour != "green":
        raise ValueError(f"the released wording calls the mask green; overlay.colour is {overlay.colour}")
    output, recipe = Path(output), _Recipe(style, codec, overlay, prompts, with_iou, with_estimates, seed)
    composites, skipped = Composites(output, overlay, image_format), Counter[str]()
    count = _write_records(output / FILES[style], _records(dataset, recipe, composites, skipped))
    if not count:
        raise ValueError(
            f"no query of the dataset can be learnt from, left out are {dict(skipped)}; see TrajectoryDataset"
        )
    counts: dict[str, Any] = {"records": count, "images": len(composites.used), "written": composites.written}
    counts |= {"present": len(composites.used) - composites.written, "skipped": dict(skipped)}
    if style == "chat":
        _replace(output / "dataset_info.json", json.dumps(_LLAMA_FACTORY, indent=1))
    settings = asdict(recipe) | {"image_format": image_format, "counts": counts}
    _replace(output / f"{style}.settings.json", json.dumps(settings, ensure_ascii=False, indent=1))
    return counts


def read_policy(run: str | Path, style: Style, head: str | None = None) -> ClickPolicyHead:
    """The click policy of a run folder as its configuration describes it, without weights and without an environment: its codec,
    overlay, prompts and `with_iou` are what an export has to say to fit it.

    Args:
        run: run folder.
        style: of the export.
        head: name of the policy; the first head when None.

    Raises:
        ValueError: for a folder that is no run, a head that is no click policy, or a style in other words than the policy's.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    from mmseg_llm.heads.base import Head
    from mmseg_llm.heads.click_policy.head import ClickPolicyHead
    from mmseg_llm.training.checkpoint import CONFIG, read_model_settings

    path = Path(run) / CONFIG
    if not path.is_file():
        raise ValueError(f"run folder {run} has no {CONFIG}; give the run folder of a training")
    heads = read_model_settings(path)["heads"]
    name = next(iter(heads), "") if head is None else head
    if name not in heads:
        raise ValueError(f"{path} has no head '{name}'; it has {', '.join(heads) or 'none'}")
    settings = dict(heads[name])
    settings["init_args"] = {k: v for k, v in (settings.get("init_args") or {}).items() if k != "environment"}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Head, "head")
    try:
        policy = parser.instantiate_classes(parser.parse_object({"head": settings})).head
    except ArgumentError as error:
        raise ValueError(f"{path}, head '{name}': {' '.join(str(error).split())}") from error
    if not isinstance(policy, ClickPolicyHead):
        raise ValueError(f"head '{name}' of {run} is no click policy; name one with --head, or leave out --checkpoint")
    if (style == "qwen") != (policy.prompt_style == "qwen"):
        words, remedy = ("its own words", "chat or llava") if style == "qwen" else ("the released words", "qwen")
        raise ValueError(f"the policy of {run} is asked in {words}; use --style {remedy}")
    return policy


class Composites:
    """The pictures of an export, each written once.

    Args:
        output: folder of the export.
        overlay: draws them.
        image_format: of the files.
    """

    def __init__(self, output: Path, overlay: Overlay, image_format: ImageFormat) -> None:
        self.folder = output / "images"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.overlay, self.suffix = overlay, f".{image_format}"
        self.used: set[str] = set()
        self.written = 0
        self._present = {entry.name for entry in os.scandir(self.folder)}
        self._digests: dict[str, str] = {}
        self._last: tuple[str, Image.Image] | None = None

    def path(self, sample: Sample, start: Mask | None) -> str:
        """Path relative to the export of an image with a mask on it; drawn and written where it is not there yet.

        Raises:
            ValueError: if the image is missing, or of another size than its sample says.
        """
        image, stem = self._identify(sample)
        mask = "" if start is None or not start.area else start.counts
        name = f"{stem}{_digest(f'{image}|{mask}|{self.overlay}'.encode())}{self.suffix}"
        if name not in self._present:
            if self._last is None or self._last[0] != image:  # the steps of an image mostly come one after the other
                self._last = (image, sample.load_image())
            shown = np.zeros(sample.size, bool) if start is None else replace(start).array
            self._save(self.overlay(self._last[1], shown), name)
            self._present.add(name)
            self.written += 1
        self.used.add(name)
        return f"{self.folder.name}/{name}"

    def _identify(self, sample: Sample) -> tuple[str, str]:
        """What tells an image from others, by content, and the beginning of its file name."""
        if not isinstance(sample.image, str | Path):
            pixels = sample.load_image()
            return _digest(f"{pixels.size}".encode() + pixels.tobytes()), ""
        path = str(sample.image)
        if path not in self._digests:
            try:
                self._digests[path] = _digest(Path(path).read_bytes())
            except OSError as error:
                raise ValueError(
                    f"image {path} cannot be read ({error}); check the image folder of the dataset"
                ) from error
        stem = re.sub(r"[^A-Za-z0-9]+", "_", Path(path).stem).strip("_")[:40]
        return self._digests[path], f"{stem}-" if stem else ""

    def _save(self, picture: Image.Image, name: str) -> None:
        """Write a picture so that it is whole or not there."""
        temporary = self.folder / f".{name}.{os.getpid()}"
        try:
            with temporary.open("wb") as file:
                if self.suffix == ".png":
                    picture.save(file, "PNG")
                else:
                    picture.save(file, "JPEG", quality=95, subsampling="4:4:4")
            temporary.replace(self.folder / name)
        finally:
            temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Recipe:
    """How labels become texts; see `export_sft`."""

    style: Style
    codec: ClickCodec
    overlay: Overlay
    prompts: ClickPrompts
    with_iou: bool
    with_estimates: bool
    seed: int

    def question(self, query: Query, number: int) -> str:
        """The words behind the image; the number of the record draws their template."""
        words = query.text.strip()
        if self.style == "qwen":
            return "".join(qwen_question(words))
        drawn = random.Random(f"{self.seed}/{number}").randrange(len(self.prompts.questions))
        return self.prompts.question(words, self.codec, self.overlay.colour, drawn, self.with_iou)

    def answer(self, query: Query, size: Size) -> str:
        """What is to be learnt."""
        label = query.next_click
        assert label is not None
        return write(label.click, size, self.codec, label.iou if self.with_iou else None, label.is_finished)

    def fault(self, query: Query) -> str:
        """Why a query gives no record; empty where it gives one."""
        label = query.next_click
        if label is None:
            return "without next click"
        if label.click is None and not label.is_finished and not (self.with_iou and self.with_estimates):
            return "estimate only"
        if not query.text.strip(" ."):
            return "empty expression"
        return "control words in the expression" if _RESERVED.search(query.text) else ""


def _records(
    dataset: Iterable[Sample], recipe: _Recipe, composites: Composites, skipped: Counter[str]
) -> Iterator[dict[str, Any]]:
    """One record per query, in order; what is left out is counted."""
    from rich.progress import track

    number = 0
    for sample in track(dataset, description="exporting", transient=True):
        for query in sample.queries:
            if fault := recipe.fault(query):
                skipped[fault] += 1
                continue
            key = f"{sample.id}/{query.id}"
            image = composites.path(sample, query.start)
            yield _LAYOUTS[recipe.style](key, image, recipe.question(query, number), recipe.answer(query, sample.size))
            number += 1


def _llava(key: str, image: str, question: str, answer: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": key, "image": image, "conversations": turns}


def _qwen(key: str, image: str, question: str, answer: str) -> dict[str, Any]:
    asked = f"Picture 1: <img>{image}</img>\n{question}"
    return {"id": key, "conversations": [{"from": "user", "value": asked}, {"from": "assistant", "value": answer}]}


def _chat(key: str, image: str, question: str, answer: str) -> dict[str, Any]:
    asked = {"role": "user", "content": f"<image>{question}"}
    return {"id": key, "messages": [asked, {"role": "assistant", "content": answer}], "images": [image]}


_LAYOUTS = {"llava": _llava, "qwen": _qwen, "chat": _chat}


def _write_records(path: Path, records: Iterable[dict[str, Any]]) -> int:
    """Write a JSON list (`.json`) or lines (`.jsonl`) as they come, whole or not at all; gives their number, 0 writes nothing."""
    is_list = path.suffix == ".json"
    temporary, count = path.with_name(f".{path.name}.{os.getpid()}"), 0
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for count, record in enumerate(records, 1):
                file.write(("[\n" if count == 1 else ",\n") if is_list else "")
                file.write(json.dumps(record, ensure_ascii=False) + ("" if is_list else "\n"))
            file.write("\n]\n" if is_list else "")
        if count:
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _replace(path: Path, text: str) -> None:
    """Write a small file so that it is whole or not there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=10).hexdigest()
