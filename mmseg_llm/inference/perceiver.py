"""Perceiver: images and sentences in, predictions out. The same model and the same `predict` as in training."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmseg_llm.geometry import load_image
from mmseg_llm.inference.depth_maps import GRID, MAX_PIXELS, DepthMap, ask_depth_map
from mmseg_llm.inference.depth_queries import Asking, View, ask_points, open_view
from mmseg_llm.inference.object_depth import ObjectDepth, measure_objects
from mmseg_llm.inference.point_clouds import PointCloud
from mmseg_llm.segmenters import refine_predictions
from mmseg_llm.structures import Prediction, Query, Sample

if TYPE_CHECKING:
    from PIL import Image

    from mmseg_llm.cameras import Camera, Distance
    from mmseg_llm.heads.all_mask.conversation import Conversation
    from mmseg_llm.masks import Mask, Size
    from mmseg_llm.model import PerceptionModel
    from mmseg_llm.segmenters import Environment, Refiner


class Perceiver:
    """A trained model for use.

    Args:
        model: backbone and heads.
        refiner: sharpens the masks of any head, such as `segmenters.SamRefiner`.
    """

    def __init__(self, model: PerceptionModel, refiner: Refiner | None = None) -> None:
        self.model, self.refiner = model.eval(), refiner

    @classmethod
    def from_pretrained(
        cls, source: str | Path, device: str | None = None, dtype: str | None = None, refiner: Refiner | None = None
    ) -> Perceiver:
        """Load a run folder.

        Args:
            source: folder written by training.
            device: `cpu`, `cuda`, ...; a GPU where there is one when None.
            dtype: `float32`, `bfloat16` or `float16`; as saved when None.
            refiner: sharpens the masks.

        Raises:
            ValueError: if the folder is no run, or its weights do not fit.
        """
        import torch

        from mmseg_llm.backbones.loading import cast
        from mmseg_llm.training.checkpoint import load_model

        model = load_model(source)
        if device is None:  # processes that torchrun started each take the GPU of their rank
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
        if dtype is not None:
            cast(model, getattr(torch, dtype))
        return cls(model.to(device), refiner)

    def click_on(
        self,
        environment: Environment | None = None,
        head: str | None = None,
        *,
        max_clicks: int | None = None,
        candidates: int | None = None,
    ) -> None:
        """Let a click policy click on another segmenter, or more or less often, than in its training.

        Args:
            environment: such as `segmenters.SamEnvironment`; the one of the run when None.
            head: name of the policy; the first head when None.
            max_clicks: of an episode.
            candidates: answers tried per mask with protocol `search`.

        Raises:
            ValueError: if the head does not click, or a number is out of range.
        """
        policy: Any = self.model.head(head)
        if environment is None and max_clicks is None and candidates is None:
            return
        if not hasattr(policy, "click_environment"):
            raise ValueError(f"head '{policy.name}' does not click; leave out environment, max_clicks and candidates")
        if max_clicks is not None and max_clicks < 1:
            raise ValueError(f"max_clicks is {max_clicks}; it must be at least 1")
        policy.environment = environment or policy.environment
        policy.max_clicks = max_clicks or policy.max_clicks
        if candidates is not None:
            policy.search = replace(policy.search, candidates=candidates)

    def predict(
        self,
        image: str | Path | Image.Image,
        queries: Sequence[str] | str | None = None,
        *,
        points: Sequence[tuple[float, float]] | np.ndarray | None = None,
        camera: Camera | None = None,
        fov: float | None = None,
        head: str | None = None,
        protocol: str | None = None,
        start: Sequence[Mask | np.ndarray] | Mask | np.ndarray | None = None,
    ) -> list[Prediction]:
        """Answer queries about one image, or how far points of it are; N questions give N predictions in order.

        Args:
            image: path or PIL image.
            queries: expressions such as `"the red cube"`.
            points: instead of queries, pixels `(x, y)` of the stored image whose depth is asked; `prediction.measurement` tells
                the metres, or the reason why there are none, and the camera with its origin. Photographs that their EXIF data
                turn are better given as `geometry.upright(PIL.Image.open(path))`, here and below.
            camera: intrinsics for points; those of the EXIF data, else assumed ones, when None.
            fov: field of view in degrees over the longer side, to assume for points.
            head: name of the head; when None the first one, or for points the first that measures depth.
            protocol: way of predicting, see the head's `protocols`; its first one when None.
            start: masks that a click policy goes on from, one per query, such as those another head predicted, or bool arrays.

        Raises:
            ValueError: for an image that cannot be read, an empty query, another number of masks than queries, both or neither
                of queries and points, or a camera without points.
        """
        if (queries is None) == (points is None):
            raise ValueError(
                "give either queries, such as 'the red cube', or points, such as (120, 80), to be measured"
            )
        if points is not None:
            if start is not None:
                raise ValueError(
                    "start masks are for queries of a click policy; leave them out when points are measured"
                )
            return ask_points(self.model, open_view(image, camera, fov), points, Asking(head, protocol))
        if camera is not None or fov is not None:
            raise ValueError("a camera or field of view is for points; leave it out of queries")
        texts = [queries] if isinstance(queries, str) else list(queries or ())
        sample = _sample(image, texts, 0)
        if start is not None:
            masks = [as_mask(item) for item in (start if isinstance(start, Sequence) else [start])]
            if len(masks) != len(texts):
                raise ValueError(f"{len(masks)} start masks for {len(texts)} queries; give one mask per query")
            queries_from = tuple(replace(q, start=mask) for q, mask in zip(sample.queries, masks, strict=True))
            sample = replace(sample, queries=queries_from)
        return next(self._answer([sample], head, protocol))

    def depth_map(
        self,
        image: str | Path | Image.Image,
        camera: Camera | None = None,
        *,
        fov: float | None = None,
        grid: Size = GRID,
        head: str | None = None,
        protocol: str | None = None,
        distance: Distance | None = None,
    ) -> DepthMap:
        """Metres on a grid of points over an image, asked in one batched call.

        Args:
            image: path or PIL image.
            camera: intrinsics; those of the EXIF data, else assumed ones, when None.
            fov: field of view in degrees over the longer side, to assume.
            grid: rows and columns of points, at the centres of equal cells; at most one per pixel.
            head: name of the depth head; the first one when None.
            protocol: way of predicting; the head's first one when None.
            distance: what the metres are measured along, for heads that do not say.

        Raises:
            ValueError: for an image that cannot be read, a grid without cells, or without a depth head.
        """
        return ask_depth_map(self.model, open_view(image, camera, fov), grid, Asking(head, protocol, distance))

    def point_cloud(
        self,
        image: str | Path | Image.Image,
        camera: Camera | None = None,
        *,
        fov: float | None = None,
        grid: Size = GRID,
        dense: bool = False,
        max_pixels: int = MAX_PIXELS,
        head: str | None = None,
        protocol: str | None = None,
        distance: Distance | None = None,
    ) -> PointCloud:
        """Coloured points in space, metres: of the grid of `depth_map`, or of every pixel by its `resized` when `dense`.

        Points of a dense cloud are interpolated, and of images beyond `max_pixels` there are no more of them than that.

        Raises:
            ValueError: as `depth_map`, or if nobody says what the metres are measured along.
        """
        view = open_view(image, camera, fov)
        depth = ask_depth_map(self.model, view, grid, Asking(head, protocol, distance))
        return PointCloud.of(depth.resized(max_pixels=max_pixels) if dense else depth, view.name)

    def measure(
        self,
        image: str | Path | Image.Image,
        expressions: Sequence[str] | str | None = None,
        camera: Camera | None = None,
        *,
        fov: float | None = None,
        masks: Sequence[Mask | np.ndarray | Prediction] | None = None,
        mask_head: str | None = None,
        depth_head: str | None = None,
        protocol: str | None = None,
        distance: Distance | None = None,
        points_per_object: int = 32,
        seed: int = 0,
    ) -> list[ObjectDepth]:
        """How far and how large objects are: masks of a segmentation head, depths of points well inside of them.

        Args:
            image: path or PIL image.
            expressions: what to measure; with masks their names.
            camera: intrinsics; those of the EXIF data, else assumed ones, when None.
            fov: field of view in degrees over the longer side, to assume.
            masks: to measure instead of what the segmentation head finds: bool arrays, or ones of 0 and 1, or the predictions
                of another model.
            mask_head: name of the segmentation head; the first one that does not measure depth when None.
            depth_head: name of the depth head; the first one when None.
            protocol: of the depth head; its first one when None.
            distance: what the metres are measured along, for heads that do not say.
            points_per_object: most points asked within each mask.
            seed: of their choice.

        Raises:
            ValueError: without expressions and masks, for another number of masks than expressions, masks of another size than
                the image or with other values than 0 and 1, or a model without the heads that are needed.
        """
        texts = [expressions] if isinstance(expressions, str) else expressions
        view = open_view(image, camera, fov)
        if masks is not None:
            found = _named_masks(view, masks, texts)
        elif texts:
            found = self.predict(image, texts, head=mask_head or self._mask_head())
        else:
            raise ValueError("nothing to measure; give expressions such as 'the red cube', or masks")
        asking = Asking(depth_head, protocol, distance)
        return measure_objects(self.model, view, found, asking, points_per_object, seed)

    def _mask_head(self) -> str:
        for name, head in self.model.heads.items():
            if not hasattr(head, "distance"):
                return name
        raise ValueError(f"the model has no head that finds objects, only {', '.join(self.model.heads)}; give masks")

    def converse(self, image: str | Path | Image.Image, *, head: str | None = None) -> Conversation:
        """A conversation about one image, with heads that hold one: `.ask(text)` gives words and masks.

        Raises:
            ValueError: if the head answers single queries only.
        """
        return self.model.head(head).converse(self.model.backbone, image, self.refiner)

    def predict_many(
        self,
        requests: Iterable[tuple[str | Path | Image.Image, Sequence[str]]],
        *,
        head: str | None = None,
        protocol: str | None = None,
        batch_size: int = 8,
    ) -> Iterator[list[Prediction]]:
        """Stream over many images, `batch_size` of them at once; one list of predictions per request, in order."""
        batch: list[Sample] = []
        for number, (image, texts) in enumerate(requests):
            batch.append(_sample(image, texts, number))
            if len(batch) == batch_size:
                yield from self._answer(batch, head, protocol)
                batch = []
        if batch:
            yield from self._answer(batch, head, protocol)

    def _answer(self, samples: Sequence[Sample], head: str | None, protocol: str | None) -> Iterator[list[Prediction]]:
        found = self.model.predict(samples, head, protocol or self.model.head(head).protocols[0])
        if self.refiner is not None:
            found = refine_predictions(self.refiner, found)
        predictions = iter(found)
        for sample in samples:
            yield [next(predictions) for _ in sample.queries]


def as_mask(mask: Mask | np.ndarray) -> Mask:
    """A mask, given as one or as an array `(H, W)` of bool, or of 0 and 1.

    Raises:
        ValueError: for other values, such as probabilities.
    """
    from mmseg_llm.masks import Mask

    if isinstance(mask, Mask):
        return mask
    array = np.asarray(mask)
    if array.dtype != bool and not np.isin(array, (0, 1)).all():
        raise ValueError(
            f"a mask holds values from {array.min():g} to {array.max():g}; give bool, or 0 and 1, such as mask > 0.5"
        )
    return Mask.from_array(array.astype(bool))


def _named_masks(
    view: View, masks: Sequence[Mask | np.ndarray | Prediction], names: Sequence[str] | None
) -> list[Prediction]:
    """Given masks as predictions; those that are some already keep their query unless they are named."""
    if names is not None and len(names) != len(masks):
        raise ValueError(f"{len(masks)} masks for {len(names)} expressions; give one mask per expression")
    found = []
    for index, item in enumerate(masks):
        if isinstance(item, Prediction) and item.measurement is not None:
            raise ValueError(
                f"mask {index} is an answer about depth, which has no mask; give those of a segmentation head"
            )
        if not isinstance(item, Prediction):
            mask = as_mask(item)
            item = Prediction(f"object {index}", mask.size, str(index), view.name, mask=mask, box=mask.box, score=1.0)
        found.append(item if names is None else replace(item, query=names[index]))
    return found


def _sample(image: str | Path | Image.Image, texts: Sequence[str], number: int) -> Sample:
    """A request as a sample; the id is the file name where there is one."""
    loaded = load_image(image)
    for text in texts:
        if not text.strip(" ."):
            raise ValueError(f"query {text!r} is empty; give an expression such as 'the red cube'")
    name = Path(image).name if isinstance(image, str | Path) else f"image_{number}"
    queries = tuple(Query(text=text, id=str(i)) for i, text in enumerate(texts))
    return Sample(image=loaded, size=(loaded.height, loaded.width), queries=queries, id=name)
