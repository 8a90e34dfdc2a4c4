"""Run folders: what training leaves and everything else reads.

config.yaml         resolved configuration of the run
model.safetensors   weights of backbone and heads
backbone/           architecture, tokenizer and codec, so that the base checkpoint is not needed again
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

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
    return model.to(model.backbone.model.dtype).eval()


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
    from safetensors import SafetensorError
    from safetensors.torch import load_model as load_into

    try:
        missing, unexpected = load_into(model, str(path), strict=False)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{path} cannot be loaded: {' '.join(str(error).split())[:300]}; copy it from the run again"
        ) from error
    faults = [f"{len(keys)} {kind} keys such as {sorted(keys)[0]}" for kind, keys in
              (("missing", missing), ("unexpected", unexpected)) if keys]  # fmt: skip
    if faults:
        raise ValueError(f"{path} does not fit the model: {' and '.join(faults)}; use the file of this run")
