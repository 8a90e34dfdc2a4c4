"""The nouns of the library: plain frozen dataclasses that flow from a dataset to a metric.

`Sample -> (head.build) -> Example -> (collate) -> Batch -> (backbone, head) -> Prediction -> metric`.

Coordinates are always pixels of the original image: x to the right, y down, boxes `(x1, y1, x2, y2)` with exclusive
right and bottom edges, a point `(x, y)` names the pixel whose centre is `(x + 0.5, y + 0.5)`.

Shape legend: H W pixels, B sequences, N tokens, I images, Q queries.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmseg_llm.cameras import Camera
from mmseg_llm.clicks import Click, NextClick, PolicyStep
from mmseg_llm.masks import Box, Mask, Size
from mmseg_llm.quantities import DepthPoint, Measurement

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from PIL import Image

    from mmseg_llm.backbones.visibility import Visibility

__all__ = [
    "Batch",
    "Box",
    "Camera",
    "Canvas",
    "Click",
    "DenseBlock",
    "DepthPoint",
    "Example",
    "Mask",
    "Measurement",
    "NextClick",
    "PolicyStep",
    "Prediction",
    "Query",
    "Sample",
    "Size",
    "Suffix",
    "unique_by_id",
]


@dataclass(frozen=True)
class Query:
    """One thing asked about an image, with its optional answer.

    Attributes:
        text: the referring expression or question.
        masks: instance masks of the answer, whose union is the target; `()` means "labelled: no target", None
            "unlabelled".
        boxes: `(x1, y1, x2, y2)` per instance, original pixels.
        points: pixels asked for, with metric depth when labelled.
        id: unique within its dataset.
        task: `segment`, `chat`, `depth`, or another key of `questions.QUESTIONS`.
        value: labelled number of a question whose answer is no depth of a point, in the unit of its task.
        answer: target text of free-form tasks.
        history: earlier turns of the conversation, as (question, answer) pairs.
        start: the mask so far, of whatever source, that a click policy goes on from; None starts with an empty one.
        next_click: label of the mask so far.
        ignore: pixels that no score and no annotator counts, such as an uncertain border; None counts all. Only
            interactive protocols have such pixels.
    """

    text: str
    masks: tuple[Mask, ...] | None = None
    boxes: tuple[Box, ...] | None = None
    points: tuple[DepthPoint, ...] = ()
    id: str = ""
    task: str = "segment"
    answer: str | None = None
    history: tuple[tuple[str, str], ...] = ()
    start: Mask | None = None
    next_click: NextClick | None = None
    ignore: Mask | None = None
    value: float | None = None

    @property
    def is_no_target(self) -> bool:
        """Whether the label says that nothing in the image fits (no mask, or only empty ones)."""
        return self.masks is not None and all(mask.area == 0 for mask in self.masks)

    def target(self, size: Size) -> Mask:
        """Union of the target masks at image size `(H, W)`.

        Raises:
            ValueError: if the query is unlabelled.
        """
        if self.masks is None:
            raise ValueError(f"query '{self.text}' ({self.id}) has no mask label")
        return Mask.union(self.masks, size)


@dataclass(frozen=True)
class Sample:
    """What a dataset yields before any model has touched it.

    Attributes:
        image: path of the image, or the image itself.
        size: `(H, W)` in pixels of the original image.
        queries: what is asked about this image.
        id: image identity, unique within its dataset.
        source: name of the dataset and split.
        camera: intrinsics where known.
    """

    image: str | Path | Image.Image
    size: Size
    queries: tuple[Query, ...] = ()
    id: str = ""
    source: str = ""
    camera: Camera | None = None

    def load_image(self) -> Image.Image:
        """The image as RGB.

        Raises:
            ValueError: if the file is missing or corrupt, or its size is not `size`.
        """
        from mmseg_llm.geometry import load_image

        image = load_image(self.image)
        if (image.height, image.width) != tuple(self.size):
            raise ValueError(
                f"image {self.image} is {image.height}x{image.width} (HxW) but its annotations say "
                f"{self.size[0]}x{self.size[1]}; point the dataset to the images the annotations were made on"
            )
        return image


@dataclass(frozen=True)
class Canvas:
    """The exact image a model sees, and the affine map between it and the original.

    `canvas = (original + 0.5) * scale + offset - 0.5` per axis: pixel centres map to pixel centres.

    Attributes:
        image: RGB, the size the model takes; never resized again.
        original_size: `(H, W)` of the original.
        scale: `(sx, sy)` canvas pixels per original pixel.
        offset: `(ox, oy)` canvas pixels of padding (positive) or crop (negative) at the left and top.
    """

    image: Image.Image
    original_size: Size
    scale: tuple[float, float]
    offset: tuple[float, float] = (0.0, 0.0)

    @property
    def size(self) -> Size:
        """`(H, W)` of the canvas."""
        return (self.image.height, self.image.width)

    def to_canvas(self, points: np.ndarray) -> np.ndarray:
        """Map original pixel coordinates `(..., 2)` as (x, y) to the canvas, float64, without rounding."""
        return (np.asarray(points, np.float64) + 0.5) * self.scale + self.offset - 0.5

    def to_original(self, points: np.ndarray) -> np.ndarray:
        """Inverse of `to_canvas`."""
        return (np.asarray(points, np.float64) + 0.5 - self.offset) / self.scale - 0.5


@dataclass(frozen=True)
class DenseBlock:
    """Tokens that are read all at once, such as one per cell of a mask; nothing that follows in the dialogue sees them.

    The block sees the branch up to and including the slot it hangs off, and itself.

    Attributes:
        token_id: all of them have this id; what tells them apart is added to their embeddings by the head.
        offsets: int64 `(A, M)` rotary positions relative to the one behind the slot.
        is_bidirectional: whether they see each other in both directions.
    """

    token_id: int
    offsets: np.ndarray
    is_bidirectional: bool = True

    @property
    def length(self) -> int:
        """M."""
        return self.offsets.shape[1]


@dataclass(frozen=True)
class Suffix:
    """What follows the shared prefix of an image: one dialogue branch that no other branch of the image can see.

    Attributes:
        ids: token ids.
        labels: same length, next-token targets aligned with `ids`; -100 where not supervised.
        query_ids: queries (positions in `Sample.queries`) answered here, in the order of their answer slots.
        slots: position in `ids` of the answer token ([SEG], [REJ], <|seg|>, ...) of each of `query_ids`.
        dense: the dense queries of a head, one block of them per slot that has any (`dense_slots`).
        dense_slots: indices into `slots`: where the blocks hang off.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    query_ids: tuple[int, ...] = ()
    slots: tuple[int, ...] = ()
    dense: DenseBlock | None = None
    dense_slots: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Length with its dense blocks."""
        return len(self.ids) + (0 if self.dense is None else self.dense.length * len(self.dense_slots))


@dataclass(frozen=True)
class Example:
    """A `Sample` rendered by a head for one backbone; made in data-loader workers.

    Attributes:
        head: name of the head whose loss it feeds.
        sample: where it came from.
        canvas: the image the model sees.
        pixels: float32 `(3, H, W)` of the canvas, normalised for the backbone.
        prefix: token ids shared by all suffixes, image placeholders expanded.
        suffixes: dialogue branches.
        targets: head-specific dense targets, one per entry of all `query_ids` in order (numpy arrays).
        prefix_labels: next-token targets aligned with `prefix` where a head supervises it; nothing of it when empty.
    """

    head: str
    sample: Sample
    canvas: Canvas
    pixels: np.ndarray
    prefix: tuple[int, ...]
    suffixes: tuple[Suffix, ...]
    targets: tuple[Any, ...] = ()
    prefix_labels: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Length of the packed sequence."""
        return len(self.prefix) + sum(suffix.num_tokens for suffix in self.suffixes)


@dataclass
class Batch:
    """Collated `Example`s of one head: every image is one row, its suffixes packed behind its prefix.

    Attributes:
        head: name of the head.
        ids: `(B, N)` token ids.
        labels: `(B, N)` next-token targets aligned with `ids`, -100 where not supervised.
        positions: `(A, B, N)` rotary positions on A axes; suffixes restart after the prefix, dense blocks after their slot.
        visibility: who may attend to whom.
        pixels: `(B, 3, H, W)` float, smaller canvases in the upper left corner.
        canvas_sizes: size of each canvas.
        image_positions: `(B, T)` positions of the image tokens in each row, -1 at padding.
        slot_rows, slot_positions: `(Q,)` row and position of the answer token of each query.
        slot_queries: `(Q,)` index of the query in `samples[row].queries`.
        dense_positions: `(B, M)` positions of all dense queries of a row, block after block, -1 at padding.
        dense_index: `(B, M)` rank of each within its block, -1 at padding.
        dense_starts: `(Q,)` where the block of each slot starts in `dense_positions`, -1 for slots without one.
        targets: ragged, one entry per slot.
        samples: originals, for ids and sizes.
    """

    head: str
    ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    visibility: Visibility
    pixels: torch.Tensor
    canvas_sizes: list[Size]
    image_positions: torch.Tensor
    slot_rows: torch.Tensor
    slot_positions: torch.Tensor
    slot_queries: torch.Tensor
    dense_positions: torch.Tensor
    dense_index: torch.Tensor
    dense_starts: torch.Tensor
    targets: list[Any]
    samples: list[Sample]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with all its tensors on `device`."""
        from dataclasses import fields, replace

        import torch

        def move(value: Any) -> Any:
            if isinstance(value, list):
                return [move(item) for item in value]
            movable = isinstance(value, torch.Tensor) or hasattr(value, "render")
            return value.to(device, non_blocking=non_blocking) if movable else value

        return replace(self, **{item.name: move(getattr(self, item.name)) for item in fields(self)})

    def pin_memory(self) -> Batch:
        """Page-lock the pixels, which are most of the bytes (called by the DataLoader)."""
        from dataclasses import replace

        return replace(self, pixels=self.pixels.pin_memory())


@dataclass(frozen=True)
class Prediction:
    """What a user gets for one query.

    Attributes:
        query: text asked.
        query_id, sample_id: identity of the query and of its image.
        size: `(H, W)` of the original image.
        text: what the model said.
        mask: at original size.
        box: tight `(x1, y1, x2, y2)` of the mask, None when empty.
        score: confidence in [0, 1] that the target exists and the mask is right.
        exists: False when the model answered that nothing fits, or gave no answer; a mask given all the same is what
            the model would have drawn (some reference protocols score it).
        measurement: the number in the answer, for questions about depth and other quantities.
        mask_logits: float32 `(h, w)` soft mask over the whole image at the head's own resolution, for refiners and uncertainty;
            not serialised.
        trajectory: of a click policy: the mask it started from, then one step per click.
        stop: why a click policy stopped (`heads.click_policy.episodes.Ending`); empty for other heads.
        image: the original image, for `show` and `save`; not serialised.
    """

    query: str
    size: Size
    query_id: str = ""
    sample_id: str = ""
    text: str = ""
    mask: Mask | None = None
    box: Box | None = None
    score: float = 0.0
    exists: bool = True
    measurement: Measurement | None = None
    trajectory: tuple[PolicyStep, ...] = ()
    stop: str = ""
    mask_logits: np.ndarray | None = field(default=None, repr=False, compare=False)
    image: str | Path | Image.Image | None = field(default=None, repr=False, compare=False)

    @classmethod
    def answering(cls, sample: Sample, index: int, mask: Mask, **fields: Any) -> Prediction:
        """The answer to one query of a sample by a mask: who it belongs to and its box follow."""
        query = sample.queries[index]
        return cls(
            query=query.text,
            size=(int(sample.size[0]), int(sample.size[1])),
            query_id=query.id or str(index),
            sample_id=sample.id,
            mask=mask,
            box=mask.box,
            image=sample.image,
            **fields,
        )

    @property
    def depth(self) -> float | None:
        """The number in the answer, None where there is none: metres of a depth query."""
        return None if self.measurement is None else self.measurement.value

    @property
    def answer_mask(self) -> Mask:
        """What the model answers: its mask, or an empty one where it says that nothing fits (`exists` is False)."""
        return self.mask if self.exists and self.mask is not None else Mask.empty(self.size)

    def to_json(self) -> dict[str, Any]:
        """A plain dict for JSON, from which `from_json` restores everything but the image."""
        return {
            "sample_id": self.sample_id,
            "query_id": self.query_id,
            "query": self.query,
            "text": self.text,
            "exists": self.exists,
            "score": round(float(self.score), 6),
            "box": list(self.box) if self.box else None,
            "size": list(self.size),
            "mask": self.mask.to_coco() if self.mask else None,
            **({} if self.measurement is None else {"measurement": self.measurement.to_json()}),
            **({"trajectory": [step.to_json() for step in self.trajectory]} if self.trajectory else {}),
            **({"stop": self.stop} if self.stop else {}),
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Prediction:
        """Inverse of `to_json`.

        Raises:
            ValueError: if a field is missing or the mask has another size than the image.
        """
        try:
            size = (int(record["size"][0]), int(record["size"][1]))
            mask = Mask.from_coco(record["mask"], size) if record["mask"] is not None else None
            return cls(
                query=record["query"],
                size=size,
                query_id=record["query_id"],
                sample_id=record["sample_id"],
                text=record["text"],
                mask=mask,
                box=tuple(record["box"]) if record["box"] else None,
                score=record["score"],
                exists=record["exists"],
                measurement=Measurement.from_json(record["measurement"]) if "measurement" in record else None,
                trajectory=tuple(PolicyStep.from_json(step, size) for step in record.get("trajectory", ())),
                stop=record.get("stop", ""),
            )
        except KeyError as error:
            raise ValueError(f"prediction record lacks the field {error}; write it with Prediction.to_json") from error

    def to_coco(self, image_id: int | str | None = None, category_id: int = 1) -> dict[str, Any]:
        """A COCO result entry (`bbox` is xywh); a rejection or empty mask gives an empty RLE and a zero box."""
        x1, y1, x2, y2 = (self.box if self.exists else None) or (0.0, 0.0, 0.0, 0.0)
        mask = self.answer_mask
        return {
            "image_id": self.sample_id if image_id is None else image_id,
            "category_id": category_id,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": mask.area,
            "segmentation": mask.to_coco(),
            "score": round(float(self.score), 6),
            "caption": self.query,
        }

    def show(self) -> Image.Image:
        """The image with mask, box and caption drawn on it.

        Raises:
            ValueError: if the prediction carries no image.
        """
        if self.image is None:
            raise ValueError("this prediction carries no image; set it with dataclasses.replace(prediction, image=...)")
        from mmseg_llm.inference.visualize import draw_predictions

        return draw_predictions(self.image, [self])

    def save(self, path: str | Path) -> Path:
        """Write to `path` by its suffix: `.json` record, `.png` mask (0/255), `.jpg` overlay, `.gif` clicks as animation.

        Raises:
            ValueError: for another suffix, a picture without image, or an animation without trajectory.
        """
        from PIL import Image

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            path.write_text(json.dumps(self.to_json(), ensure_ascii=False, indent=1), encoding="utf-8")
        elif path.suffix == ".png":
            Image.fromarray(self.answer_mask.array.astype(np.uint8) * 255).save(path)
        elif path.suffix in {".jpg", ".jpeg"}:
            self.show().save(path, quality=92)
        elif path.suffix == ".gif":
            from mmseg_llm.inference.episodes import save_animation

            save_animation(self, path)
        else:
            raise ValueError(
                f"cannot save a prediction as '{path.suffix}'; use .json, .png (mask), .jpg (overlay) or .gif (clicks)"
            )
        return path


def unique_by_id(predictions: Iterable[Prediction]) -> list[Prediction]:
    """Drop repeats of the same (sample, query), as samplers that pad for equal ranks produce; keeps first and order."""
    seen: dict[tuple[str, str], Prediction] = {}
    for prediction in predictions:
        seen.setdefault((prediction.sample_id, prediction.query_id), prediction)
    return list(seen.values())
