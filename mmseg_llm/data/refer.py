"""Referring expressions in the layouts of RefCOCO, RefCOCO+, RefCOCOg, RefCLEF and gRefCOCO.

    refer_seg/
      refcoco/    instances.json  refs(unc).p  refs(google).p
      refcoco+/   instances.json  refs(unc).p
      refcocog/   instances.json  refs(umd).p  refs(google).p
      refclef/    instances.json  refs(unc).p  refs(berkeley).p
      grefcoco/   instances.json  grefs(unc).json
      images/     mscoco/images/train2014/  saiapr_tc-12/

Split names follow the REFER API (https://github.com/lichengunc/refer), gRefCOCO https://github.com/henghuiding/gRefCOCO.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from mmseg_llm.data.base import Faults, SampleDataset, read_json
from mmseg_llm.data.coco import CocoIndex
from mmseg_llm.data.unpickle import ForbiddenGlobalError, load_plain_pickle
from mmseg_llm.structures import Mask, Query, Sample

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class _Expression(NamedTuple):
    """One sentence about one image; no annotation ids mean "no target"."""

    text: str
    id: str
    annotation_ids: tuple[Any, ...]


class ReferDataset(SampleDataset):
    """One query per sentence; masks and boxes are those of the sentence's annotations, in original pixels.

    Sample ids are image ids, query ids `<ref_id>-<sent_id>` (with `.2`, `.3`, ... appended where a file repeats one).

    Args:
        root: folder of one dataset, with `instances.json` and the reference file.
        split_by: who made the split: `unc`, `google`, `umd`, `berkeley`, ...
        split: `train`, `val`, `testA`, `testB`, `test`, ...; None for all.
        images: image folder, absolute or relative to `root` or to its parent; by default `<root>/images`, then
            `<root>/../images/mscoco/images/train2014` (`saiapr_tc-12` for refclef).
        grefs: read `grefs(<split_by>).json` (several targets, no target); None: where there is no `refs(<split_by>)`.
        group: one sample per `image` with all its expressions, or one per `expression`.
        max_samples: keep the first samples only.
        on_error: `raise` on a reference whose annotation or image is missing, or `skip` and count it.
        name: by default `<folder>_<split_by>_<split>`.

    Raises:
        ValueError: if a file is missing or malformed, the split is unknown, or a join is broken.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        split_by: str,
        split: str | None,
        images: str | Path | None = None,
        grefs: bool | None = None,
        group: Literal["image", "expression"] = "image",
        max_samples: int | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        name: str | None = None,
    ) -> None:
        if group not in {"image", "expression"}:
            raise ValueError(f"group is '{group}'; use 'image' or 'expression'")
        root = Path(root)
        self.name = name or "_".join((root.name, split_by, split or "all"))
        self.images = _image_folder(root, images)
        faults = Faults(on_error)
        self.skipped = faults.counts
        refs, self.path = _read_refs(_reference_file(root, split_by, grefs))
        refs = _of_split(refs, split, self.path)
        self.index = CocoIndex(root / "instances.json")
        pairs = list(_expressions(refs, self.index, self.path, faults))
        self._samples = _grouped(pairs, group)[:max_samples]
        self.index.keep(
            {i for _, sentences in self._samples for sentence in sentences for i in sentence.annotation_ids}
        )

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        """The image at `index` with its expressions (one of them with `group='expression'`)."""
        image_id, sentences = self._samples[index]
        image = self.index.images[image_id]
        cache: dict[Any, Mask] = {}
        queries = []
        for text, query_id, annotation_ids in sentences:
            masks, boxes = self.index.targets(annotation_ids, cache)
            queries.append(Query(text=text, masks=masks, boxes=boxes, id=query_id))
        path = self.images / image.file_name
        return Sample(image=path, size=image.size, queries=tuple(queries), id=str(image_id), source=self.name)

    def query_counts(self) -> Iterator[tuple[str, int | None]]:
        """Per expression: `(image id, number of target instances)`, without decoding masks."""
        for image_id, sentences in self._samples:
            for sentence in sentences:
                yield str(image_id), len(sentence.annotation_ids)


def _image_folder(root: Path, images: str | Path | None) -> Path:
    """Find the image folder; the conventional one is returned unseen, so that labels can be read without images."""
    if images is None:
        inner = "saiapr_tc-12" if root.name == "refclef" else "mscoco/images/train2014"
        own = root / "images"
        return own if own.is_dir() else root.parent / "images" / inner
    candidates = [root / images, root.parent / images, Path(images)]  # an absolute path replaces what it is joined to
    for folder in candidates:
        if folder.is_dir():
            return folder
    tried = ", ".join(str(folder) for folder in dict.fromkeys(candidates))
    raise ValueError(f"the image folder '{images}' does not exist (tried {tried}); give the folder of the image files")


def _reference_file(root: Path, split_by: str, grefs: bool | None) -> Path:
    """The reference file of `root`: the pickle where there is one, else its JSON twin."""
    plain = [root / f"refs({split_by}).p", root / f"refs({split_by}).json"]
    general = [root / f"grefs({split_by}).p", root / f"grefs({split_by}).json"]
    candidates = plain + general if grefs is None else general if grefs else plain
    for path in candidates:
        if path.is_file():
            return path
    present = ", ".join(sorted(path.name for path in root.glob("*refs(*)*"))) or "no reference file"
    raise ValueError(
        f"{root} has no {' or '.join(p.name for p in candidates)} (it has {present}); check root and split_by"
    )


def _read_refs(path: Path) -> tuple[list[dict[str, Any]], Path]:
    """Read a reference file and check that it is a list of records with the keys that are used; says what it read."""
    try:
        refs = load_plain_pickle(path) if path.suffix == ".p" else read_json(path)
    except ForbiddenGlobalError as error:
        # Pickles written in passing from pandas hold NumPy scalars; where the same records lie beside them as JSON,
        # there is no need to let anything of the pickle run.
        twin = path.with_suffix(".json")
        if error.module.partition(".")[0] not in {"numpy", "_codecs"} or not twin.is_file():
            raise
        warnings.warn(f"{error}; reading its twin {twin.name}", stacklevel=3)
        refs, path = read_json(twin), twin
    if not isinstance(refs, list) or not all(isinstance(ref, dict) for ref in refs):
        raise ValueError(f"{path} is not a list of reference records; get the original file")
    for position, ref in enumerate(refs):
        for key in ("ref_id", "ann_id", "image_id", "split", "sentences"):
            if key not in ref:
                raise ValueError(f"{path}: reference {ref.get('ref_id', f'number {position}')} lacks '{key}'; add it")
        for sentence in ref["sentences"]:
            if "sent_id" not in sentence or "sent" not in sentence:
                raise ValueError(f"{path}: a sentence of reference {ref['ref_id']} lacks 'sent_id' or 'sent'; add it")
    return refs, path


def _of_split(refs: list[dict[str, Any]], split: str | None, path: Path) -> list[dict[str, Any]]:
    """References of a split; as in the REFER API, `testA` takes `testAB` too, and `test` all test splits."""
    if split is None:
        return refs

    def belongs(own: str) -> bool:
        if split == "test" or (split.startswith("test") and len(split) == 5):
            return own.startswith("test") and split[4:] in own
        return own == split

    chosen = [ref for ref in refs if belongs(ref["split"])]
    if not chosen:
        present = ", ".join(sorted({ref["split"] for ref in refs}))
        raise ValueError(f"{path} has no references of the split '{split}'; it has {present}")
    return chosen


def _expressions(
    refs: Iterable[dict[str, Any]], index: CocoIndex, path: Path, faults: Faults
) -> Iterator[tuple[Any, _Expression]]:
    """All `(image id, expression)` of the references that join; the others are reported."""
    seen: dict[str, int] = {}
    for ref in refs:
        image_id, annotations = ref["image_id"], ref["ann_id"]
        annotations = tuple(annotations) if isinstance(annotations, (list, tuple)) else (annotations,)
        annotations = () if annotations == (-1,) else annotations
        fault = _fault(image_id, annotations, index)
        if fault is not None:
            reason, detail = fault
            faults.report(reason, f"{path}: reference {ref['ref_id']}: {detail} {index.path}")
            continue
        for sentence in ref["sentences"]:
            query_id = f"{ref['ref_id']}-{sentence['sent_id']}"
            seen[query_id] = seen.get(query_id, 0) + 1
            if seen[query_id] > 1:
                query_id = f"{query_id}.{seen[query_id]}"
            yield image_id, _Expression(sentence["sent"], query_id, annotations)


def _fault(image_id: Any, annotation_ids: tuple[Any, ...], index: CocoIndex) -> tuple[str, str] | None:
    """Reason and detail of a reference that does not join, None for a sound one."""
    if image_id not in index.images:
        return "missing image", f"image {image_id} is not in"
    for annotation_id in annotation_ids:
        reason = index.fault(annotation_id)
        if reason is not None:
            detail = "is not in" if reason == "missing annotation" else f"has {reason} in"
            return reason, f"annotation {annotation_id} {detail}"
        if index.annotations[annotation_id]["image_id"] != image_id:
            return "other image", f"annotation {annotation_id} is not on image {image_id} in"
    return None


def _grouped(pairs: list[tuple[Any, _Expression]], group: str) -> list[tuple[Any, list[_Expression]]]:
    """Samples as `(image id, expressions)`, in the order in which the file first names each image."""
    if group == "expression":
        return [(image_id, [expression]) for image_id, expression in pairs]
    by_image: dict[Any, list[_Expression]] = {}
    for image_id, expression in pairs:
        by_image.setdefault(image_id, []).append(expression)
    return list(by_image.items())
