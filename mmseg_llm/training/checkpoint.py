"""Run folders: what training leaves and everything else reads.

config.yaml         resolved configuration of the run
model.safetensors   weights of backbone and heads
backbone/           architecture, tokenizer and codec, so that the base checkpoint is not needed again
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from mmseg_llm.backbones.loading import cast

if TYPE_CHECKING:
    from mmseg_llm.model import PerceptionModel

CONFIG = "config.yaml"
WEIGHTS = "model.safetensors"
BACKBONE = "backbone"
ASSETS = Path(__file__).parent.parent / "assets"


def save_weights(model: PerceptionModel, folder: Path) -> Path:
    """Write weights, architecture and tokenizer; the weights file is replaced in one step, never half written."""
    from safetensors.torch import save_model

    folder.mkdir(parents=True, exist_ok=True)
    model.backbone.save_config(folder / BACKBONE)
    temporary = folder / f".{WEIGHTS}.{os.getpid()}"
    try:
        save_model(model, str(temporary))
        temporary.replace(folder / WEIGHTS)
    finally:
        temporary.unlink(missing_ok=True)
    return folder / WEIGHTS


def new_run(folder: str | Path) -> Path:
    """A folder that holds no run yet.

    Raises:
        ValueError: if it does.
    """
    for name in (CONFIG, WEIGHTS):
        if (Path(folder) / name).exists():
            raise ValueError(f"{folder} already holds a {name}; choose another output folder")
    return Path(folder)


def save_run(model: PerceptionModel, folder: Path, settings: dict[str, Any]) -> Path:
    """Write a run folder of a model that was not trained here, with the settings (`backbone`, `heads`) it was built from."""
    save_weights(model, folder)
    text = yaml.safe_dump({"model": settings}, sort_keys=False, allow_unicode=True)
    (folder / CONFIG).write_text(text, encoding="utf-8")
    return folder


def load_model(folder: str | Path, attention: str | None = None) -> PerceptionModel:
    """Build the model of a run folder and load its weights strictly.

    Args:
        folder: written by training.
        attention: overrides the attention implementation of the run.

    Raises:
        ValueError: if the folder is no run, lacks weights, or the weights do not fit.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no folder '{folder}'; give the run folder of a training (it holds {CONFIG})")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"run folder {folder} has no {name}; train to the end or copy the file from the run")
    settings = read_model_settings(folder / CONFIG)
    backbone = settings["backbone"]
    arguments = backbone.setdefault("init_args", {})
    arguments |= {"source": str(folder / BACKBONE), "weights": "random"}
    if attention is not None:
        arguments["attention"] = attention
    model = build_model(settings)
    if model.num_added_tokens:
        tokens = ", ".join(token for head in model.heads.values() for token in head.tokens)  # type: ignore[union-attr]
        raise ValueError(
            f"the tokenizer in {folder / BACKBONE} lacks some of the tokens {tokens} that the heads need; "
            "use the tokenizer saved with this run"
        )
    load_weights(model, folder / WEIGHTS)
    cast(model, model.backbone.model.dtype)
    return model.eval()


def read_model_settings(path: Path) -> dict[str, Any]:
    """The `backbone` and `heads` of a saved configuration.

    Raises:
        ValueError: if they are missing.
    """
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    model = (config or {}).get("model") or {}
    if "backbone" not in model or "heads" not in model:
        raise ValueError(f"{path} has no model.backbone and model.heads; it is not the config of a run")
    return {"backbone": model["backbone"], "heads": model["heads"]}


def build_model(settings: dict[str, Any]) -> PerceptionModel:
    """Instantiate backbone and heads from their configuration, with the same parser that training uses."""
    from jsonargparse import ArgumentParser

    from mmseg_llm.model import PerceptionModel

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(PerceptionModel, "model", sub_configs=True)
    config = parser.parse_object({"model": settings})
    return parser.instantiate_classes(config).model


def find_weights(name: str) -> Path:
    """A weights file: a path, a run folder, or the name of a file that ships with the package.

    Raises:
        ValueError: if there is none.
    """
    candidates = [Path(name), Path(name) / WEIGHTS, ASSETS / name]
    for path in candidates:
        if path.is_file():
            return path
    shipped = ", ".join(sorted(path.name for path in ASSETS.glob("*.safetensors"))) or "none"
    raise ValueError(f"no weights file '{name}'; give a run folder or a .safetensors file (shipped: {shipped})")


def load_weights(model: PerceptionModel, path: Path) -> None:
    """Load a weights file strictly, in place, cast to the types of the model.

    Raises:
        ValueError: if the file is damaged, or keys or shapes do not fit.
    """
    from safetensors.torch import load_model as load_into

    with _reading(path):
        missing, unexpected = load_into(model, str(path), strict=False)
    if missing or unexpected:
        raise ValueError(f"{path} does not fit the model: {_faults(missing, unexpected)}; use the file of this run")


def load_backbone(model: PerceptionModel, path: Path) -> None:
    """Load the backbone of a run whose heads may be others, in place.

    The rows of control tokens, which differ between heads, keep their fresh values; those of the base vocabulary are taken.

    Raises:
        ValueError: if the file is damaged or holds another backbone.
    """
    from safetensors.torch import load_file

    with _reading(path):
        stored = load_file(path)
    wanted = dict(model.backbone.named_parameters()) | dict(model.backbone.named_buffers())
    stored = {key.removeprefix("backbone."): value for key, value in stored.items() if key.startswith("backbone.")}
    persistent = model.backbone.state_dict()
    missing, unexpected = persistent.keys() - stored.keys(), stored.keys() - persistent.keys()
    head = model.backbone.lm_head.weight
    if head is model.backbone.model.get_input_embeddings().weight:  # stored once where they are tied
        missing = {
            key for key in missing if wanted.get(key) is not head and persistent[key].data_ptr() != head.data_ptr()
        }
    if missing or unexpected:
        raise ValueError(
            f"{path} holds another backbone: {_faults(missing, unexpected)}; use one of the same architecture"
        )
    base = model.backbone.base_vocabulary
    vocabulary = {id(head), id(model.backbone.model.get_input_embeddings().weight)}
    with torch.no_grad():
        for key, value in stored.items():
            target = wanted[key]
            rows = base if id(target) in vocabulary else len(target) if target.dim() else None
            if value.shape[1:] != target.shape[1:] or (rows is not None and len(value) < rows):
                raise ValueError(
                    f"{path} holds another backbone: {key} is {tuple(value.shape)}, the model has {tuple(target.shape)}; "
                    "use one of the same architecture and vocabulary"
                )
            if rows is None:
                target.copy_(value)
            else:
                target[:rows].copy_(value[:rows])


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn the errors of a damaged or foreign file into one sentence."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        if "size mismatch" in str(error):
            found = re.search(
                r"size mismatch for (\S+): .*?torch.Size\((.*?)\).*?torch.Size\((.*?)\)", str(error), re.DOTALL
            )
            shapes = f"{found[1]} is {found[2]} there and {found[3]} in the model" if found else "shapes differ"
            raise ValueError(
                f"{path} was made with another architecture or vocabulary: {shapes}; build the model from the backbone folder "
                f"beside it (model.backbone.init_args.source {path.parent / BACKBONE}, weights random)"
            ) from error
        raise ValueError(
            f"{path} cannot be loaded: {' '.join(str(error).split())[:300]}; copy it from the run again"
        ) from error


def _faults(missing: Collection[str], unexpected: Collection[str]) -> str:
    return " and ".join(f"{len(keys)} {kind} keys such as {sorted(keys)[0]}" for kind, keys in
                        (("missing", missing), ("unexpected", unexpected)) if keys)  # fmt: skip
