"""Reading the numeric test vectors of the reference implementations (`goldens/README.md` of the shared material).

The folder is named by the environment variable MMSEG_GOLDENS; without it, `tests/goldens` is read. Sizes and seeds
always come from the metadata of a file, so that any further set of the same schema is checked by the same tests.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open


def golden_folder() -> Path:
    """The folder that holds the vectors."""
    return Path(os.environ.get("MMSEG_GOLDENS") or Path(__file__).parent / "goldens")


def golden_files(pattern: str) -> list[Path]:
    """Files of the golden folder that match `pattern` (`metrics*` or `metrics*.safetensors`), sorted by name.

    A folder named by MMSEG_GOLDENS may hold some kinds of vectors only: the tests of the others are skipped then.

    Raises:
        FileNotFoundError: if the folder of this repository has none; a parity test that finds no vectors must not pass.
    """
    pattern = pattern if pattern.endswith(".safetensors") else f"{pattern}.safetensors"
    files = sorted(golden_folder().glob(pattern))
    if not files and not os.environ.get("MMSEG_GOLDENS"):
        raise FileNotFoundError(f"no golden file matches {golden_folder() / pattern}; set MMSEG_GOLDENS to the folder")
    return files


def read_golden(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """All tensors of a file and its settings."""
    with safe_open(str(path), "pt") as file:
        meta = json.loads(file.metadata()["meta"])
        return {key: file.get_tensor(key) for key in file.keys()}, meta  # noqa: SIM118  (not a dict)


def z(key: str, shape: Any, seed: int) -> np.ndarray:
    """Standard normal float32 values of `shape`, a stream of their own for every `(key, seed)`."""
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()) + seed))
    return generator.standard_normal(tuple(shape)).astype(np.float32)


def weight(meta: dict[str, Any], key: str, check: bool = True) -> torch.Tensor:
    """One generated weight by its official state-dict key, row factors applied.

    Raises:
        ValueError: if the generator does not reproduce the stored sum, or the kind is unknown.
    """
    entry = meta["weights"][key]
    values = z(key, entry["shape"], meta["seed"])
    if entry["kind"] == "abs":
        values = np.abs(values)
    elif entry["kind"] != "normal":
        raise ValueError(f"weight {key} is of kind '{entry['kind']}', which is not generated")
    values = np.asarray(np.float32(entry["scale"]) * values + np.float32(entry["add"]))
    if check and "sum" in entry:
        total = float(values.sum(dtype=np.float64))
        if abs(total - entry["sum"]) > 1e-6 * max(1.0, float(np.abs(values).sum(dtype=np.float64))):
            raise ValueError(f"weight {key} sums to {total}, the file says {entry['sum']}")
    factor = (meta.get("weight_rows_multiplied") or {}).get(key)
    if factor is not None:
        values[factor["rows"]] *= np.float32(factor["factor"])
    return torch.from_numpy(values)


def weights(meta: dict[str, Any]) -> dict[str, torch.Tensor]:
    """All generated weights by official key; constants set by the constructor (kind `keep`) are left out."""
    return {key: weight(meta, key) for key, entry in meta["weights"].items() if entry["kind"] != "keep"}


def generated(meta: dict[str, Any], key: str | None = None) -> Any:
    """The generated input `key` (such as `input.vit`) as float32 tensor, or a dict of all of them.

    `meta["inputs"]` gives a shape, or `{"shape", "scale", "add"}`; inputs given by a formula are not generated here.
    """
    if key is None:
        return {name: generated(meta, name) for name, entry in meta["inputs"].items() if not isinstance(entry, str)}
    entry = meta["inputs"][key]
    entry = entry if isinstance(entry, dict) else {"shape": entry}
    values = z(key, entry["shape"], meta["seed"])
    return torch.from_numpy(np.float32(entry.get("scale", 1.0)) * values + np.float32(entry.get("add", 0.0)))


def unpack_bits(bits: torch.Tensor | np.ndarray, shape: Any, start: int = 0) -> np.ndarray:
    """Unpack `*_bits`: the `shape` boolean values that begin at bit `start` of the packed C-order stream."""
    count = int(np.prod(tuple(shape)))
    flat = np.unpackbits(np.asarray(bits, np.uint8))[start : start + count]
    return flat.reshape(tuple(shape)).astype(bool)
