"""Checkpoint folders: found locally or on the hub, read strictly, without running code from them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedConfig, PreTrainedModel

CONFIG_FILE = "config.json"


def local_folder(source: str, with_weights: bool, sizes: Sequence[str]) -> Path:
    """The folder itself, or the snapshot of a hub id.

    Args:
        source: folder or hub id.
        with_weights: whether the weights are needed.
        sizes: names of the sizes that would have been understood, for the message.

    Raises:
        ValueError: if it is neither, or holds no config.
    """
    folder = fetch_folder(source, with_weights, sizes)
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"folder {folder} has no {CONFIG_FILE}; give the folder of a checkpoint")
    return folder


def fetch_folder(source: str, with_weights: bool, sizes: Sequence[str]) -> Path:
    """As `local_folder`, whatever the folder holds.

    Raises:
        ValueError: if the source is neither a folder nor a hub id that can be fetched.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    if source.count("/") != 1 or source.startswith((".", "/")):
        raise ValueError(f"no folder '{source}', and it is no hub id; known sizes: {', '.join(sizes)}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
    patterns += ["*.safetensors", "*.bin"] if with_weights else []
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as error:
        raise ValueError(
            f"'{source}' cannot be fetched from the hub ({type(error).__name__}); "
            "check the name and the network, or download the folder and give its path"
        ) from error


def read_settings(folder: Path, name: str = CONFIG_FILE) -> dict[str, Any]:
    """A JSON file of a checkpoint folder; empty when it is absent."""
    path = folder / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def check_type(source: str, settings: Mapping[str, Any], known: Sequence[str]) -> str:
    """The model type of a config.

    Raises:
        ValueError: if this backbone does not read it.
    """
    kind = settings.get("model_type")
    if kind not in known:
        raise ValueError(
            f"'{source}' holds a model of type '{kind}'; this backbone reads {', '.join(known)}, "
            "so choose the backbone class of its family"
        )
    return str(kind)


def image_settings(folder: Path | None) -> dict[str, Any]:
    """Settings of the image processor in a folder, under either name that transformers gave the file; empty without."""
    if folder is None:
        return {}
    stored = read_settings(folder, "preprocessor_config.json")
    return stored or read_settings(folder, "processor_config.json").get("image_processor") or {}


def statistics(folder: Path | None) -> dict[str, Any]:
    """`mean` and `std` of the image processor stored in a folder, where there is one."""
    stored = image_settings(folder)
    if "image_mean" in stored and "image_std" in stored:
        return {"mean": tuple(stored["image_mean"]), "std": tuple(stored["image_std"])}
    return {}


def weight_files(folder: Path) -> list[Path]:
    """Weight files of a folder, safetensors preferred.

    Raises:
        ValueError: if there are none.
    """
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(f"folder {folder} has no *.safetensors and no pytorch_model*.bin; download the weights too")
    return files


def read_shards(folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    """The weight files of a checkpoint folder, one after the other; pickles are read without code.

    Raises:
        ValueError: if there are none.
    """
    from safetensors.torch import load_file

    for path in weight_files(folder):
        is_safe = path.suffix == ".safetensors"
        yield load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)


def cast(module: Module, dtype: torch.dtype) -> Module:
    """Change the storage type of a module in place, as `module.to(dtype)`, but leave rotary frequencies in float32.

    In half precision they are off by a radian after a thousand positions; stock loading keeps them, too.
    """
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_floating_point() and "inv_freq" not in name:
                part._buffers[name] = buffer.to(dtype)
    return module


def misfit(folder: Path, missing: Sequence[str], unexpected: Sequence[str] = ()) -> str:
    """One sentence about keys that do not fit."""
    parts = [f"{len(keys)} {kind} keys ({', '.join(sorted(keys)[:3])}, ...)"
             for kind, keys in (("missing", missing), ("unexpected", unexpected)) if keys]  # fmt: skip
    return f"the weights in {folder} do not fit the model: {' and '.join(parts)}; use the checkpoint its config is from"


def load_stock(
    model_class: Any, folder: Path, dtype: torch.dtype, config: PreTrainedConfig | None = None
) -> tuple[PreTrainedModel, list[str]]:
    """Load a folder in the transformers layout into its stock class.

    Args:
        model_class: stock model or auto class.
        folder: of the checkpoint.
        dtype: storage type.
        config: of a part of what the folder holds, such as its vision tower; that of the folder when None.

    Returns:
        The model, and the keys that the class does not know (a head's).

    Raises:
        ValueError: if a weight of the model is missing or has another shape.
    """
    weight_files(folder)  # raises without any
    chosen = {} if config is None else {"config": config}
    model, info = model_class.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **chosen
    )
    faults = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    if faults:
        raise ValueError(misfit(folder, faults))
    return model, sorted(info["unexpected_keys"])
