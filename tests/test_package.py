"""What the wheel carries."""

import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_every_package_is_listed():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "mmseg_llm").rglob("__init__.py")}
    assert listed == found | {"mmseg_llm.configs"}


@pytest.mark.slow
def test_wheel_carries_configs_and_tokenizer(tmp_path):
    import shutil
    import subprocess
    import sys

    source = tmp_path / "source"  # building leaves files behind, so it works on a copy
    source.mkdir()
    for name in ("mmseg_llm", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(tmp_path), str(source)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    assert "mmseg_llm/assets/tiny_tokenizer/tokenizer.json" in names
    configs = {
        f"mmseg_llm/configs/{path.relative_to(ROOT / 'configs').as_posix()}"
        for path in (ROOT / "configs").rglob("*.yaml")
    }
    assert configs <= names
