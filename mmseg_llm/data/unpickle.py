"""Reading released pickles (`refs(*.p)`) without running what is in them.

A pickle is a program: a GLOBAL opcode can name any function and REDUCE calls it. The files of the RefCOCO family
hold only builtin containers, strings and numbers, for which no global is ever needed, so every lookup is refused.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, BinaryIO


class ForbiddenGlobalError(ValueError):
    """A pickle asked for a global; `module` and `name` say which."""

    def __init__(self, path: Path, module: str, name: str) -> None:
        super().__init__(
            f"{path} asks for the global '{module}.{name}', which plain data never needs; "
            "nothing was run, get the original file or its .json twin"
        )
        self.module, self.name = module, name


class _PlainUnpickler(pickle.Unpickler):
    """Builds dict, list, tuple, set, str, bytes, int, float, bool and None; refuses everything that has a name."""

    def __init__(self, file: BinaryIO, path: Path, encoding: str) -> None:
        super().__init__(file, fix_imports=False, encoding=encoding)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        """Refuse the global `module.name`."""
        raise ForbiddenGlobalError(self.path, module, name)


def load_plain_pickle(path: str | Path) -> Any:
    """Read a pickle that holds builtin values only; Python 2 byte strings become `str`.

    Byte strings are read as UTF-8, and as Latin-1 where the file holds anything else (as the oldest releases do).

    Raises:
        ValueError: if the file is missing, damaged, or asks for any global (nothing of it is run).
    """
    path = Path(path)
    try:
        return _load(path, "utf-8")
    except UnicodeDecodeError:
        return _load(path, "latin-1")


def _load(path: Path, encoding: str) -> Any:
    """One attempt to read `path` with a given encoding of Python 2 strings."""
    try:
        with path.open("rb") as file:
            return _PlainUnpickler(file, path, encoding).load()
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist; check the dataset folder and split_by") from error
    except (UnicodeDecodeError, ForbiddenGlobalError):
        raise
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        OverflowError,
    ) as error:
        raise ValueError(
            f"{path} is not a pickle of plain containers, strings and numbers ({error}); "
            "nothing of it was run, get the original file or its .json twin"
        ) from error
