"""Writes synthetic scenes in the formats of real datasets, so that the readers of those read them."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmseg_llm.data.synthetic.levels import Level, get_level
from mmseg_llm.data.synthetic.pictures import write_pictures
from mmseg_llm.data.synthetic.records import Records
from mmseg_llm.data.synthetic.scene import GENERATOR_VERSION

if TYPE_CHECKING:
    from collections.abc import Callable

SPLIT_BY = "synthetic"
"""The `split_by` under which the reference files are read."""
_MANIFEST = "dataset.json"


def write_dataset(
    root: str | Path,
    level: Level | str,
    splits: dict[str, int],
    seed: int = 0,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write a dataset of `splits` name -> number of images; returns at once where it is there already.

    Below `root`: `instances.json` (COCO), `refs(synthetic).p` and its twin `.json` (expressions with one target,
    RefCOCO layout), `grefs(synthetic).json` (all expressions, gRefCOCO layout), `images/`, `questions.jsonl` (one line
    per image), `dataset.json` (manifest); solid levels add `depth/` (16-bit PNG, millimetres, 0 unlabelled) and
    `intrinsics.json`. The content depends on level, splits and seed, not on `workers`. Read it with
    `ReferDataset(root=root, split_by="synthetic", split=..., grefs=True)`.

    Args:
        root: folder to create; must be absent, empty, or hold the same dataset.
        level: a `Level` or the name of one of `LEVELS`.
        splits: images per split; every split shows other scenes.
        seed: which world.
        workers: processes.
        progress: called with `(images done, images in all)`.

    Returns:
        The manifest with `root`, `is_reused` and `seconds`.

    Raises:
        ValueError: for wrong arguments, or when `root` holds anything else.
    """
    root, level, started = Path(root), get_level(level), time.perf_counter()
    _check(splits, seed, workers)
    request = {
        "level": level.name,
        "seed": seed,
        "splits": dict(splits),
        "generator_version": GENERATOR_VERSION,
        "settings": json.loads(json.dumps(asdict(level))),  # as it will be read back: lists for tuples
    }
    manifest = _present(root, request)
    is_reused = manifest is not None
    if manifest is None:
        manifest = _write_beside(root, level, request, workers, progress)
    return {**manifest, "root": str(root), "is_reused": is_reused, "seconds": time.perf_counter() - started}


def _check(splits: dict[str, int], seed: int, workers: int) -> None:
    """Reject arguments that cannot be written."""
    if not splits or any(count < 1 for count in splits.values()):
        raise ValueError(f"splits {splits} must map at least one name to a number of images of 1 or more")
    for name in splits:
        if not name.isidentifier():
            raise ValueError(f"split name '{name}' becomes part of file names; use letters, digits and underscores")
    if seed < 0 or workers < 1:
        raise ValueError(f"seed {seed} must not be negative and workers {workers} must be 1 or more")


def _present(root: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest when `root` holds the requested dataset, None when there is nothing yet.

    Raises:
        ValueError: when something else is there.
    """
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return None
    path = root / _MANIFEST
    if not path.is_file():
        raise ValueError(f"{root} is not empty and is no synthetic dataset; choose another folder")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or "generator_version" not in manifest:
        raise ValueError(f"{path} is not the manifest of a synthetic dataset; choose another folder")
    differing = [key for key, value in request.items() if manifest.get(key) != value]
    if differing:
        raise ValueError(
            f"{root} holds a synthetic dataset with another {differing[0]}; delete it or choose another folder"
        )
    return manifest


def _write_beside(
    root: Path, level: Level, request: dict[str, Any], workers: int, progress: Callable[[int, int], None] | None
) -> dict[str, Any]:
    """Write into a temporary folder beside `root` and rename it, so that `root` is whole or absent."""
    root.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{root.name}.", dir=root.parent))
    folder = beside / root.name  # made here, for `mkdtemp` makes folders that only their owner can read
    try:
        folder.mkdir()
        manifest = _write(folder, level, request, workers, progress)
        if root.is_dir():
            root.rmdir()  # empty, as `_present` saw
        folder.rename(root)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return manifest


def _write(
    folder: Path, level: Level, request: dict[str, Any], workers: int, progress: Callable[[int, int], None] | None
) -> dict[str, Any]:
    """Write all files into an empty folder; gives the manifest."""
    total = sum(request["splits"].values())
    records = Records(level)
    pictures = write_pictures(folder, level, request["splits"], request["seed"], workers)
    with (folder / "questions.jsonl").open("w", encoding="utf-8") as questions:
        for done, record in enumerate(pictures, 1):
            questions.write(json.dumps(records.add(record)) + "\n")
            if progress is not None:
                progress(done, total)
    _dump(folder / "instances.json", records.instances(f"mmseg_llm synthetic {level.name}, seed {request['seed']}"))
    _dump(folder / f"refs({SPLIT_BY}).json", records.refs)
    _dump(folder / f"grefs({SPLIT_BY}).json", records.grefs)
    with (folder / f"refs({SPLIT_BY}).p").open("wb") as file:
        # A pickle remembers which strings are one object, which depends on `workers`; reading the JSON back forgets it.
        pickle.dump(json.loads(json.dumps(records.refs)), file, protocol=2)
    if records.cameras:
        _dump(folder / "intrinsics.json", {"distance": "planar", "metres_per_unit": 0.001, "images": records.cameras})
    digest = hashlib.sha256((folder / "instances.json").read_bytes()).hexdigest()
    manifest = {**request, "counts": records.counts(), "instances_sha256": digest}
    _dump(folder / _MANIFEST, manifest, indent=1)
    return manifest


def _dump(path: Path, content: Any, indent: int | None = None) -> None:
    """Write JSON."""
    path.write_text(json.dumps(content, indent=indent), encoding="utf-8")
