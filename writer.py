"""Writes synthetic scenes as a dataset that readers of COCO, RefCOCO and gRefCOCO understand.

    root/
      dataset.json            what this is: settings, counts, checksum
      instances.json          COCO, masks as compressed RLE
      refs(synthetic).p       RefCOCO references (single targets), and refs(synthetic).json, the same
      grefs(synthetic).json   gRefCOCO references: single, several and no targets
      questions.jsonl         per image, all expressions with the masks of their answers
      images/<split>_<index>.png
      depth/<split>_<index>.png, intrinsics.json    solid levels only: 16-bit millimetres (0 unlabelled), pinhole cameras
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import tempfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mmseg_llm.data.synthetic.levels import Level, get_level
from mmseg_llm.data.synthetic.records import Records, scene_record
from mmseg_llm.data.synthetic.scene import make_scene

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

GENERATOR_VERSION = 1  # raise it whenever the same seed gives other scenes
_CHUNK = 64
_Job = tuple[str, Level, int, str, range]


def split_seed(seed: int, split: str) -> int:
    """The world seed of a split: 64 bits of a hash, so that no two splits share scenes.

    Raises:
        ValueError: if the seed is negative.
    """
    if seed < 0:
        raise ValueError(f"seed {seed} must not be negative")
    low, high = np.random.SeedSequence([seed, zlib.crc32(split.encode())]).generate_state(2)
    return int(high) << 32 | int(low)


def write_dataset(
    root: str | Path,
    level: Level | str,
    splits: Mapping[str, int],
    seed: int = 0,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write a dataset; returns at once when the same one is there already.

    Args:
        root: folder to make. It appears only when complete, so several processes may ask for the same one.
        level: a difficulty or its name.
        splits: split name -> number of images.
        seed: world, not negative.
        workers: processes; the files do not depend on it.
        progress: called with (images done, images in all).

    Returns:
        the manifest, as in `dataset.json`.

    Raises:
        ValueError: for bad arguments, or if `root` holds anything else.
    """
    level, root = get_level(level), Path(root)
    _check_arguments(splits, workers)
    seeds = {split: split_seed(seed, split) for split in splits}
    wanted = _identity(level, splits, seed)
    present = _present(root, wanted)
    if present is not None:
        return present
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}.", dir=root.parent, ignore_cleanup_errors=True) as folder:
        draft = Path(folder) / "dataset"
        (draft / "images").mkdir(parents=True)
        if level.renderer == "solid":
            (draft / "depth").mkdir()
        jobs: list[_Job] = [
            (str(draft), level, seeds[split], split, range(first, min(first + _CHUNK, count)))
            for split, count in splits.items()
            for first in range(0, count, _CHUNK)
        ]
        records, total, done = Records(level), sum(splits.values()), 0
        with (draft / "questions.jsonl").open("w", encoding="ascii") as questions:
            for chunk in _run(jobs, workers):
                questions.writelines(json.dumps(records.add(record)) + "\n" for record in chunk)
                done += len(chunk)
                if progress is not None:
                    progress(done, total)
        manifest = _write_annotations(draft, records, wanted)
        return _publish(draft, root, wanted, manifest)


def _check_arguments(splits: Mapping[str, int], workers: int) -> None:
    if not splits:
        raise ValueError("splits is empty; give at least one, such as {'train': 100}")
    for split, count in splits.items():
        if not re.fullmatch(r"[A-Za-z0-9]+", split):
            raise ValueError(f"split name '{split}' must be letters and digits, such as 'train' or 'testA'")
        if count < 1:
            raise ValueError(f"split '{split}' has {count} images; give 1 or more, or leave the split out")
    if workers < 1:
        raise ValueError(f"workers is {workers}; give 1 or more")


def _identity(level: Level, splits: Mapping[str, int], seed: int) -> dict[str, Any]:
    """What decides the content of a dataset, as JSON gives it back."""
    identity = {
        "level": level.name,
        "seed": seed,
        "splits": dict(splits),
        "generator_version": GENERATOR_VERSION,
        "settings": asdict(level),
    }
    loaded: dict[str, Any] = json.loads(json.dumps(identity))
    return loaded


def _present(root: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest in `root` if it is the wanted dataset, None if there is nothing.

    Raises:
        ValueError: if there is anything else.
    """
    if not root.exists():
        return None
    if not root.is_dir():
        raise ValueError(f"{root} is a file; give another folder for the synthetic dataset")
    if not any(root.iterdir()):
        return None
    path = root / "dataset.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        manifest = None
    if not isinstance(manifest, dict):
        raise ValueError(f"{root} is not empty and holds no synthetic dataset; give an empty or a new folder")
    differing = [key for key, value in wanted.items() if manifest.get(key) != value]
    if differing:
        raise ValueError(
            f"{root} holds another synthetic dataset (it differs in {', '.join(differing)}); "
            "give another folder or remove this one"
        )
    return manifest


def _run(jobs: list[_Job], workers: int) -> Iterator[list[dict[str, Any]]]:
    """Results in the order of the jobs, whoever does them."""
    if workers == 1 or len(jobs) == 1:
        yield from map(_write_scenes, jobs)
        return
    with ProcessPoolExecutor(min(workers, len(jobs))) as pool:
        yield from pool.map(_write_scenes, jobs)


def _write_scenes(job: _Job) -> list[dict[str, Any]]:
    """Render scenes, write their pictures, and give their records."""
    folder, level, seed, split, indices = job
    records = []
    for index in indices:
        scene = make_scene(level, seed, index)
        name = f"{split}_{index:06d}.png"
        Image.fromarray(scene.image).save(Path(folder) / "images" / name, compress_level=1)
        if scene.depth is not None:
            millimetres = np.rint(scene.depth * 1000).astype(np.uint16)
            Image.fromarray(millimetres).save(Path(folder) / "depth" / name, compress_level=1)
        records.append(scene_record(scene, name, split))
    return records


def _write_annotations(folder: Path, records: Records, identity: dict[str, Any]) -> dict[str, Any]:
    """Write everything but pictures and questions; gives the manifest."""
    description = f"mmseg_llm synthetic {identity['level']}, seed {identity['seed']}"
    instances = json.dumps(records.instances(description)).encode("ascii")
    (folder / "instances.json").write_bytes(instances)
    # Protocol 2 and builtin types only: what RefCOCO ships, and what restricted unpicklers accept.
    (folder / "refs(synthetic).p").write_bytes(pickle.dumps(records.refs, protocol=2))
    (folder / "refs(synthetic).json").write_text(json.dumps(records.refs), encoding="ascii")
    (folder / "grefs(synthetic).json").write_text(json.dumps(records.grefs), encoding="ascii")
    if records.cameras:
        (folder / "intrinsics.json").write_text(json.dumps(records.cameras), encoding="ascii")
    manifest = {
        **identity,
        "counts": records.counts(),
        "instances_sha256": hashlib.sha256(instances).hexdigest(),
    }
    (folder / "dataset.json").write_text(json.dumps(manifest, indent=1), encoding="ascii")
    return manifest


def _publish(draft: Path, root: Path, wanted: dict[str, Any], manifest: dict[str, Any]) -> dict[str, Any]:
    """Move the finished dataset into place, unless another process was faster with the same one."""
    try:
        if root.is_dir() and not any(root.iterdir()):
            root.rmdir()
        draft.rename(root)
    except OSError:
        present = _present(root, wanted)
        if present is None:
            raise
        return present
    return manifest
