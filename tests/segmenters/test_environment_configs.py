"""Every shipped environment config is understood, without its weights."""

from pathlib import Path

import pytest

from mmseg_llm.configuration import read_environment
from mmseg_llm.segmenters import Environment
from mmseg_llm.structures import Click

CONFIGS = sorted((Path(__file__).parents[2] / "configs/environments").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_builds_its_environment(path):
    environment = read_environment(path)
    assert isinstance(environment, Environment)
    with pytest.raises(ValueError, match="reset"):
        environment.step(Click(0, 0, True))


def test_there_are_configs():
    assert len(CONFIGS) >= 3
