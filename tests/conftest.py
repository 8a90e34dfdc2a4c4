"""Shared fixtures: golden helpers on the path, real data where it is present."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_sessionstart() -> None:
    """Two threads, so that a run shares a small machine and sums stay reproducible."""
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the small real data sets (`MMSEG_SHARED_DATA`, else `../shared/data`); skips where it is absent."""
    folder = Path(os.environ.get("MMSEG_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"real data is absent: {folder} does not exist (set MMSEG_SHARED_DATA)")
    return folder
