"""COCO instance annotations: the index that readers join on, and the dataset "all instances of a category"."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from mmseg_llm.data.base import Faults, SampleDataset, read_json
from mmseg_llm.structures import Mask, Query, Sample

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from mmseg_llm.structures import Box, Size


class CocoImage(NamedTuple):
    """One entry of `images`: file name relative to the image folder, `(H, W)` in pixels."""

    file_name: str
    size: Size


class CocoIndex:
    """An instances JSON read once and indexed by id; masks are decoded when asked for.

    Attributes:
        path: the JSON file.
        images: image id -> `CocoImage`.
        annotations: annotation id -> its record as in the file.
        categories: category id -> name.

    Raises:
        ValueError: if the file is missing or malformed, or two different records have the same id.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        content = read_json(self.path)
        missing = [key for key in ("images", "annotations") if not isinstance(content, dict) or key not in content]
        if missing:
            raise ValueError(f"{self.path} lacks the list '{missing[0]}'; give a COCO instances JSON")
        images = self._by_id(content["images"], "image", ("file_name", "height", "width"))
        self.images: dict[Any, CocoImage] = {
            image_id: CocoImage(record["file_name"], (int(record["height"]), int(record["width"])))
            for image_id, record in images.items()
        }
        self.annotations: dict[Any, dict[str, Any]] = self._by_id(content["annotations"], "annotation", ("image_id",))
        categories = self._by_id(content.get("categories", ()), "category", ("name",))
        self.categories: dict[Any, str] = {category_id: record["name"] for category_id, record in categories.items()}

    def _by_id(self, records: Sequence[dict[str, Any]], kind: str, keys: tuple[str, ...]) -> dict[Any, dict[str, Any]]:
        """Index `records` and check that each has an `id` of its own and `keys`."""
        indexed: dict[Any, dict[str, Any]] = {}
        for position, record in enumerate(records):
            absent = [key for key in ("id", *keys) if key not in record]
            if absent:
                raise ValueError(
                    f"{self.path}: {kind} {record.get('id', f'number {position}')} lacks '{absent[0]}'; add it"
                )
            if indexed.setdefault(record["id"], record) != record:
                raise ValueError(f"{self.path}: two different records have the {kind} id {record['id']}; renumber one")
        return indexed

    def keep(self, annotation_ids: Collection[Any]) -> None:
        """Forget all other annotations, which frees most of the memory of a large file."""
        self.annotations = {key: self.annotations[key] for key in annotation_ids}

    def fault(self, annotation_id: Any) -> str | None:
        """Why an annotation gives no mask (`missing annotation`, `missing image`, `no mask`), None if it does."""
        annotation = self.annotations.get(annotation_id)
        if annotation is None:
            return "missing annotation"
        if annotation["image_id"] not in self.images:
            return "missing image"
        segmentation = annotation.get("segmentation")
        is_polygon_list = isinstance(segmentation, list) and any(len(polygon) >= 6 for polygon in segmentation)
        return None if is_polygon_list or isinstance(segmentation, dict) else "no mask"

    def mask(self, annotation_id: Any) -> Mask:
        """Decode one annotation at the size of its image.

        Raises:
            ValueError: if its segmentation is absent or malformed; names file and annotation.
        """
        annotation = self.annotations[annotation_id]
        size = self.images[annotation["image_id"]].size
        try:
            return Mask.from_coco(annotation.get("segmentation") or [], size)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.path}: annotation {annotation_id}: {error}") from error

    def box(self, annotation_id: Any) -> Box | None:
        """The annotated `bbox` (x, y, width, height) as `(x1, y1, x2, y2)`; None where the file gives none."""
        bbox = self.annotations[annotation_id].get("bbox")
        if not bbox:
            return None
        x, y, width, height = (float(value) for value in bbox)
        return (x, y, x + width, y + height)

    def targets(
        self, annotation_ids: Sequence[Any], cache: dict[Any, Mask]
    ) -> tuple[tuple[Mask, ...], tuple[Box, ...]]:
        """Masks and boxes of a query; `cache` spares decoding an instance that several queries of an image share."""
        for annotation_id in annotation_ids:
            if annotation_id not in cache:
                cache[annotation_id] = self.mask(annotation_id)
        masks = tuple(cache[annotation_id] for annotation_id in annotation_ids)
        boxes = (self.box(annotation_id) or cache[annotation_id].box for annotation_id in annotation_ids)
        return masks, tuple(box for box in boxes if box is not None)


class CocoInstances(SampleDataset):
    """One sample per image, one query per category in it: the category's name asks for all its instances.

    Crowd regions are no instances; they are counted in `skipped`, and so are images that are left without a query.

    Args:
        annotations: instances JSON.
        images: image folder; a missing file is reported when it is opened.
        categories: names to ask for; all when None.
        max_samples: keep the first samples only.
        on_error: `raise` on an annotation without image, category or mask, or `skip` and count it.
        name: by default the stem of `annotations`.

    Raises:
        ValueError: for a faulty file (see `CocoIndex`), an unknown category, or a broken join.
    """

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path,
        *,
        categories: Sequence[str] | None = None,
        max_samples: int | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        name: str | None = None,
    ) -> None:
        self.index = CocoIndex(annotations)
        self.images = Path(images)
        self.name = name or self.index.path.stem
        unknown = sorted(set(categories or ()) - set(self.index.categories.values()))
        if unknown:
            known = ", ".join(sorted(self.index.categories.values()))
            raise ValueError(f"{self.index.path} has no category '{unknown[0]}'; it has {known}")
        wanted = None if categories is None else set(categories)
        faults = Faults(on_error)
        self.skipped = faults.counts
        instances = self._group(wanted, faults)
        for _ in range(len(self.index.images) - len(instances)):
            faults.count("image without instances")
        self._samples = [(image_id, instances[image_id]) for image_id in self.index.images if image_id in instances]
        self._samples = self._samples[:max_samples]

    def _group(self, wanted: set[str] | None, faults: Faults) -> dict[Any, dict[Any, list[Any]]]:
        """Image id -> category id -> annotation ids, categories in the order of their ids."""
        grouped: dict[Any, dict[Any, list[Any]]] = defaultdict(lambda: defaultdict(list))
        for annotation_id, annotation in self.index.annotations.items():
            category_id = annotation.get("category_id")
            if category_id not in self.index.categories:
                sentence = f"{self.index.path}: annotation {annotation_id} has the unknown category {category_id}"
                faults.report("missing category", sentence)
            elif wanted is not None and self.index.categories[category_id] not in wanted:
                continue
            elif annotation.get("iscrowd"):
                faults.count("crowd annotation")
            elif (reason := self.index.fault(annotation_id)) is not None:
                sentence = f"{self.index.path}: annotation {annotation_id} of image {annotation['image_id']}: {reason}"
                faults.report(reason, sentence)
            else:
                grouped[annotation["image_id"]][category_id].append(annotation_id)
        return {image_id: dict(sorted(by_category.items())) for image_id, by_category in grouped.items()}

    def __len__(self) -> int:
        """Number of images with at least one query."""
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        """The image at `index` with one query per category."""
        image_id, by_category = self._samples[index]
        image = self.index.images[image_id]
        queries = []
        for category_id, annotation_ids in by_category.items():
            masks, boxes = self.index.targets(annotation_ids, {})
            text = self.index.categories[category_id]
            queries.append(Query(text=text, masks=masks, boxes=boxes, id=f"{image_id}-{category_id}"))
        path = self.images / image.file_name
        return Sample(image=path, size=image.size, queries=tuple(queries), id=str(image_id), source=self.name)

    def query_counts(self) -> Iterator[tuple[str, int | None]]:
        """Per query: `(image id, number of instances)`, without decoding masks."""
        for image_id, by_category in self._samples:
            for annotation_ids in by_category.values():
                yield str(image_id), len(annotation_ids)
