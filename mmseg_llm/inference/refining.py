"""Refiners by config, for the tools."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmseg_llm.segmenters.base import Refiner


def read_refiner(path: Path) -> Refiner:
    """Instantiate a refiner config (`configs/segmenters/*.yaml`).

    Raises:
        ValueError: if the file is missing, or a key or value is wrong.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    from mmseg_llm.segmenters.base import Refiner

    if not Path(path).is_file():
        raise ValueError(f"no refiner config '{path}'; give a file such as configs/segmenters/grabcut.yaml")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Refiner, "refiner")
    try:
        config = parser.parse_args([f"--refiner={path}"])
        return parser.instantiate_classes(config).refiner
    except ArgumentError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
