"""Every refiner that ships can be built from its YAML, without weights and without the network."""

from __future__ import annotations

from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from mmseg_llm.segmenters import Refiner, SamRefiner

FILES = sorted((Path(__file__).parents[2] / "configs" / "segmenters").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config_builds_its_refiner(path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--refiner", type=Refiner, enable_path=True)
    parsed = parser.parse_args([f"--refiner={path}"])
    refiner = parser.instantiate_classes(parsed).refiner
    assert isinstance(refiner, Refiner)
    if isinstance(refiner, SamRefiner):
        assert refiner.engine.module is None, "weights are read at the first image"
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# python tools/predict.py --checkpoint RUN")
    assert f"--refiner configs/segmenters/{path.name}" in lines[0]
    assert len(lines) <= 40


def test_all_four_ship():
    assert {path.stem for path in FILES} >= {"sam_vit_h", "sam_vit_b", "sam2_1_tiny", "grabcut"}
