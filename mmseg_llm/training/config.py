"""Read parts of a configuration outside of a training, with the parser that training uses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmseg_llm.training.data import PerceptionDataModule


def read_data(path: Path) -> PerceptionDataModule:
    """Instantiate a data config.

    Raises:
        ValueError: if the file is missing, or a key or value is wrong.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    from mmseg_llm.training.data import PerceptionDataModule

    if not Path(path).is_file():
        raise ValueError(f"no data config '{path}'; give a file such as configs/data/synthetic_flat96.yaml")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(PerceptionDataModule, "data", sub_configs=True)
    try:
        config = parser.parse_args([f"--data={path}"])
    except ArgumentError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    return parser.instantiate_classes(config).data
