"""Read a part of a configuration outside of a training, with the parser that training uses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmseg_llm.data.base import SampleDataset
    from mmseg_llm.segmenters.base import Refiner
    from mmseg_llm.segmenters.environment import Environment
    from mmseg_llm.training.data import PerceptionDataModule


def read_part(path: Path, name: str, example: str, kind: type, is_subclass: bool) -> Any:
    """Instantiate what a YAML describes.

    Args:
        path: of the YAML.
        name: what it describes, for messages.
        example: a file of this kind, for messages.
        kind: class of the part.
        is_subclass: whether the file names a subclass by `class_path`; otherwise it holds the arguments of `kind`.

    Raises:
        ValueError: if the file is missing, or a key or value is wrong.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    if not Path(path).is_file():
        raise ValueError(f"no {name} config '{path}'; give a file such as {example}")
    parser = ArgumentParser(exit_on_error=False)
    if is_subclass:
        parser.add_subclass_arguments(kind, "part")
    else:
        parser.add_class_arguments(kind, "part", sub_configs=True)
    try:
        config = parser.parse_args([f"--part={path}"])
    except ArgumentError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    return parser.instantiate_classes(config).part


def read_data(path: Path) -> PerceptionDataModule:
    """A data config (`configs/data/*.yaml`); see `read_part`."""
    from mmseg_llm.training.data import PerceptionDataModule

    return read_part(path, "data", "configs/data/synthetic_flat96.yaml", PerceptionDataModule, is_subclass=False)


def read_split(path: Path, split: str, max_samples: int | None = None) -> SampleDataset:
    """A dataset of a data config, or its first samples."""
    from mmseg_llm.data.base import Subset

    dataset = read_data(path).dataset(split)
    return dataset if max_samples is None else Subset(dataset, max_samples)


def read_refiner(path: Path) -> Refiner:
    """A refiner config (`configs/segmenters/*.yaml`); see `read_part`."""
    from mmseg_llm.segmenters.base import Refiner

    return read_part(path, "refiner", "configs/segmenters/grabcut.yaml", Refiner, is_subclass=True)


def read_environment(path: Path) -> Environment:
    """A click environment config (`configs/environments/*.yaml`); see `read_part`."""
    from mmseg_llm.segmenters.environment import Environment

    return read_part(path, "environment", "configs/environments/grabcut.yaml", Environment, is_subclass=True)
