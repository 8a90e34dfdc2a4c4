"""Predictions for annotation tools: one COCO file with clicks, and pre-annotations for Label Studio.

Label Studio stores a brush stroke as the picture of its mask, RGBA of 8 bits, packed by thi.ng's rle-pack: 32 bits number of
values, 5 bits word size - 1, four times 4 bits run size - 1, then runs: 1 bit "all the same", 2 bits which run size, the length
- 1 in so many bits, then one word, or one word for each value. Places are percentages of the image.

Legend: H W pixels, R runs, N values (4 H W).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from mmseg_llm.inference.episodes import NEGATIVE, POSITIVE
from mmseg_llm.inference.visualize import PALETTE
from mmseg_llm.masks import Mask, Size
from mmseg_llm.structures import Click, Prediction

RUN_SIZES = (3, 4, 8, 16)
"""Bits of the length of a run, as Label Studio itself packs them."""
IMAGE, BRUSH, POINT = "image", "mask", "click"
"""Names of the tags in the labelling configuration, which results refer to."""
SIGNS = {True: "positive", False: "negative"}
_HEADER_BITS, _WORD, _FULL = 53, 8, 0xFFFF_FFFF_FFFF_FFFF
_POINT_WIDTH = 0.75  # percent of the width of the image


def to_coco_file(answers: Sequence[Sequence[Prediction]], images: Sequence[str], path: str | Path) -> Path:
    """Write one COCO instances file; each annotation of a click policy has its `clicks`: `[{row, col, is_positive}, ...]`.

    Args:
        answers: predictions per image, at least one each, as they tell its size.
        images: file names, in the same order.
        path: file to write.

    Raises:
        ValueError: if the numbers differ, or an image has no predictions or ones of different sizes.
    """
    _check_images(answers, images)
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "referred"}]}
    for image_id, (predictions, name) in enumerate(zip(answers, images), 1):
        height, width = predictions[0].size
        content["images"].append({"id": image_id, "file_name": name, "height": height, "width": width})
        for prediction in predictions:
            entry: dict[str, Any] = {"id": len(content["annotations"]) + 1, "iscrowd": 0, "exists": prediction.exists}
            entry |= prediction.to_coco(image_id)
            if prediction.trajectory:
                entry["clicks"] = [asdict(click) for click in clicks_of_answer(prediction)]
            content["annotations"].append(entry)
    return _write(path, content)


def to_label_studio(
    answers: Sequence[Sequence[Prediction]],
    image_urls: Sequence[str],
    labels: Mapping[str, str] | None = None,
    model_version: str = "mmseg_llm",
) -> list[dict[str, Any]]:
    """Tasks with pre-annotations, one per image, to be imported as a JSON list into a project of `label_studio_config`.

    Every mask is a brush region with a score; the clicks of a click policy are key points below it. Queries that nothing fits
    are listed in the task's data as `no_target`, as Label Studio has no empty regions.

    Args:
        answers: predictions per image.
        image_urls: where Label Studio finds the images, in the same order.
        labels: what to call the answer to a query; by default the query itself.
        model_version: shown with the predictions.

    Raises:
        ValueError: if the numbers differ, a query has no label, or an image has no predictions or ones of different sizes.
    """
    _check_images(answers, image_urls)
    tasks = []
    for predictions, url in zip(answers, image_urls):
        found = [item for item in predictions if item.answer_mask.area]
        missing = [item.query for item in predictions if not item.answer_mask.area]
        results = [result for index, item in enumerate(found) for result in _regions(item, index, labels)]
        score = sum(float(item.score) for item in found) / len(found) if found else 0.0
        prediction = {"model_version": model_version, "score": round(score, 6), "result": results}
        data: dict[str, Any] = {IMAGE: url} | ({"no_target": missing} if missing else {})
        tasks.append({"data": data, "predictions": [prediction]})
    return tasks


def write_label_studio(
    tasks: Sequence[Mapping[str, Any]], path: str | Path, labels: Mapping[str, str] | None = None
) -> Path:
    """Write tasks as the JSON file that Label Studio imports, with the matching configuration beside it (`<stem>.xml`).

    The configuration also has the labels of queries that were found in no image: annotators may know better.

    Args:
        tasks: of `to_label_studio`.
        path: of the JSON file.
        labels: as given to `to_label_studio`.
    """
    names: list[str] = []
    for task in tasks:
        regions = [region for made in task["predictions"] for region in made["result"]]
        names += [label for region in regions for label in region["value"].get("brushlabels", ())]
        names += [(labels or {}).get(query, query) for query in task["data"].get("no_target", ())]
    path = _write(path, tasks)
    _replace(path.with_suffix(".xml"), label_studio_config(names or ["object"]))
    return path


def label_studio_config(labels: Iterable[str]) -> str:
    """The labelling configuration (XML) that tasks of `to_label_studio` fit: brushes by label, and clicks by sign.

    Args:
        labels: of masks; repeats are dropped.

    Raises:
        ValueError: without labels, or for an empty one.
    """
    names = list(dict.fromkeys(labels))
    if not names or not all(name.strip() for name in names):
        raise ValueError(f"labels are {names}; a labelling configuration needs at least one, and none of them empty")
    view = ElementTree.Element("View")
    ElementTree.SubElement(view, "Image", name=IMAGE, value=f"${IMAGE}", zoom="true", zoomControl="true")
    brush = ElementTree.SubElement(view, "BrushLabels", name=BRUSH, toName=IMAGE)
    for index, name in enumerate(names):
        ElementTree.SubElement(brush, "Label", value=name, background=_hex(PALETTE[index % len(PALETTE)]))
    points = ElementTree.SubElement(view, "KeyPointLabels", name=POINT, toName=IMAGE)
    for is_positive, color in ((True, POSITIVE), (False, NEGATIVE)):
        ElementTree.SubElement(points, "Label", value=SIGNS[is_positive], background=_hex(color))
    ElementTree.indent(view)
    return ElementTree.tostring(view, encoding="unicode") + "\n"


def clicks_of_answer(prediction: Prediction) -> list[Click]:
    """The clicks that led to the mask a prediction answers with; all of the episode where that mask was made elsewhere."""
    if not prediction.exists:
        return []
    masks = [step.mask for step in prediction.trajectory]
    last = len(masks) - masks[::-1].index(prediction.mask) if prediction.mask in masks else len(masks)
    return [step.click for step in prediction.trajectory[:last] if step.click is not None]


def to_percent(click: Click, size: Size) -> tuple[float, float]:
    """The centre of a clicked pixel as percentages (x, y) of the width and height of an image `(H, W)`."""
    return 100 * (click.col + 0.5) / size[1], 100 * (click.row + 0.5) / size[0]


def from_percent(x: float, y: float, is_positive: bool, size: Size) -> Click:
    """Inverse of `to_percent`; the edges of the image belong to its outer pixels.

    Raises:
        ValueError: for a place outside of the image.
    """
    if not (0 <= x <= 100 and 0 <= y <= 100):
        raise ValueError(f"x={x}, y={y} lies outside of the image; percentages reach from 0 to 100")
    row, col = math.floor(y * size[0] / 100), math.floor(x * size[1] / 100)
    return Click(min(row, size[0] - 1), min(col, size[1] - 1), is_positive)


def encode_brush(mask: Mask) -> list[int]:
    """The RLE bytes of a brush region: the mask as picture, 255 in all four channels where it is set."""
    flat = replace(mask).array.ravel()  # of a copy: a file is written of many masks, which would all keep their pixels
    starts = np.concatenate(([0], np.flatnonzero(flat[1:] != flat[:-1]) + 1, [flat.size]))
    return encode_runs(4 * np.diff(starts), np.where(flat[starts[:-1]], 255, 0))


def decode_brush(rle: Sequence[int] | bytes, size: Size) -> Mask:
    """The mask of a brush region on an image `(H, W)`: where it is not fully transparent.

    Raises:
        ValueError: if the bytes are damaged, or belong to an image of another size.
    """
    values = decode_values(rle, limit=4 * size[0] * size[1])
    if values.size != 4 * size[0] * size[1]:
        raise ValueError(
            f"brush RLE of {values.size} values does not fit an image of size {tuple(size)} (H, W) in RGBA; "
            "give `original_height` and `original_width` of its region"
        )
    return Mask.from_array(values.reshape(size[0], size[1], 4)[..., 3])


def encode_runs(lengths: np.ndarray, values: np.ndarray) -> list[int]:
    """Pack runs of equal bytes as Label Studio's own encoder does, but for a last byte of zeros that it may append.

    Args:
        lengths: int `(R,)`, at least 1 each, N in all.
        values: int `(R,)`, 0 to 255.
    """
    longest = 1 << RUN_SIZES[-1]
    parts = -(-lengths // longest)  # of runs that are longer than any size can say
    ends, rest = np.cumsum(parts) - 1, lengths - (parts - 1) * longest
    kinds = np.repeat(np.searchsorted([1 << size for size in RUN_SIZES[:-1]], lengths), parts)
    is_run = np.repeat(lengths > 1, parts)
    said = np.full(len(kinds), longest - 1, np.int64)
    said[ends] = rest - 1
    sizes = np.array(RUN_SIZES)[kinds]
    codes = ((is_run * 4 + kinds) << (sizes + _WORD)) | (said << _WORD) | np.repeat(values, parts)
    header = _WORD - 1
    for size in RUN_SIZES:
        header = header << 4 | (size - 1)
    codes = np.concatenate(([int(lengths.sum()), header], codes))
    return _pack(codes, np.concatenate(([32, _HEADER_BITS - 32], 3 + sizes + _WORD))).tolist()


def _pack(codes: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """uint8: non-negative numbers int64 `(R,)` of up to 32 bits behind each other, each as wide as `widths` says."""
    ends = np.cumsum(widths)
    begins = ends - widths
    codes = codes << (40 - widths - begins % 8)  # 40 bits from the byte they begin in
    packed = np.zeros((int(ends[-1]) + 7) // 8 + 4, np.int64)
    for place in range(5):
        part = codes >> (32 - 8 * place) & 255
        packed += np.bincount(begins // 8 + place, part, len(packed)).astype(np.int64)  # their bits never meet
    return packed[: (int(ends[-1]) + 7) // 8].astype(np.uint8)


def decode_values(rle: Sequence[int] | bytes, limit: int) -> np.ndarray:
    """Unpack bytes of rle-pack, whatever packed them.

    Args:
        rle: the bytes.
        limit: refuse to unpack more values.

    Returns:
        uint8 `(N,)`.

    Raises:
        ValueError: if they end too early, hold words of more than 8 bits, or more than `limit` values.
    """
    data = bytes(rle)
    header = int.from_bytes(data[:7].ljust(7, b"\0"), "big") >> (56 - _HEADER_BITS)
    total, word = header >> 21, (header >> 16 & 31) + 1
    sizes = [(header >> (12 - 4 * place) & 15) + 1 for place in range(4)]
    if word > _WORD or total > limit:
        raise ValueError(f"brush RLE holds {total} values of {word} bits; expected at most {limit} of {_WORD} bits")
    values: list[int] = []
    lengths: list[int] = []
    end, data, done, at = 8 * len(data), data + bytes(8), 0, _HEADER_BITS
    while done < total:
        window = (
            int.from_bytes(data[at >> 3 : (at >> 3) + 8], "big") << (at & 7) & _FULL
        )  # 57 bits of it are needed at most
        size = sizes[window >> 61 & 3]
        length = ((window << 3 & _FULL) >> (64 - size)) + 1
        words, at = 1 if window >> 63 else length, at + 3 + size
        if at + words * word > end or done + length > total:
            raise ValueError(f"brush RLE is damaged after {done} of {total} values; export the annotation again")
        if words == 1:
            values.append((window << (3 + size) & _FULL) >> (64 - word))
            lengths.append(length)
        else:
            values += _words(data, at, words, word)
            lengths += [1] * words
        at, done = at + words * word, done + length
    return np.repeat(np.array(values, np.uint8), lengths)


def _words(data: bytes, at: int, count: int, width: int) -> list[int]:
    """So many words of `width` bits from bit `at` on."""
    bits = np.unpackbits(np.frombuffer(data[at >> 3 : (at + count * width + 7) >> 3], np.uint8))
    words = bits[at & 7 : (at & 7) + count * width].reshape(count, width)
    return (words @ (1 << np.arange(width)[::-1])).tolist()


def _regions(prediction: Prediction, index: int, labels: Mapping[str, str] | None) -> list[dict[str, Any]]:
    """The results of one query: its mask, then its clicks."""
    query, (height, width) = prediction.query, prediction.size
    if labels is not None and query not in labels:
        raise ValueError(
            f"query '{query}' has no label among those of {', '.join(map(repr, labels))}; add it to `labels`"
        )
    name = f"{BRUSH}{index}"
    shared = {"to_name": IMAGE, "original_width": width, "original_height": height, "image_rotation": 0}
    brush = {
        "format": "rle",
        "rle": encode_brush(prediction.answer_mask),
        "brushlabels": [(labels or {query: query})[query]],
    }
    about = {"score": round(float(prediction.score), 6), "meta": {"text": [query]}}
    regions = [{"id": name, "from_name": BRUSH, "type": "brushlabels", **shared, "value": brush, **about}]
    for number, click in enumerate(clicks_of_answer(prediction), 1):
        x, y = to_percent(click, prediction.size)
        point = {"x": x, "y": y, "width": _POINT_WIDTH, "keypointlabels": [SIGNS[click.is_positive]]}
        link = {"id": f"{name}_{POINT}{number}", "parentID": name, "from_name": POINT, "type": "keypointlabels"}
        regions.append({**link, **shared, "value": point})
    return regions


def _check_images(answers: Sequence[Sequence[Prediction]], images: Sequence[str]) -> None:
    """Refuse predictions that cannot be told by image."""
    if len(answers) != len(images):
        raise ValueError(f"predictions of {len(answers)} images, but {len(images)} names; give one name per image")
    for predictions, name in zip(answers, images):
        sizes = {tuple(prediction.size) for prediction in predictions}
        if len(sizes) != 1:
            found = f"of sizes {sorted(sizes)}" if sizes else "none"
            raise ValueError(f"image '{name}' needs at least one prediction, all of its size; there are {found}")


def _hex(color: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


def _write(path: str | Path, content: Any) -> Path:
    return _replace(Path(path), json.dumps(content, ensure_ascii=False))


def _replace(path: Path, text: str) -> Path:
    """Write a file so that it is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    return temporary.replace(path)
