"""Every YAML that ships is understood by the parser that reads it, and every model in it can be built."""

from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser
from lightning import Trainer

from mmseg_llm.training import PerceptionDataModule, PerceptionModule
from mmseg_llm.training.checkpoint import build_model

ROOT = Path(__file__).parent.parent / "configs"
EXPERIMENTS = sorted(ROOT.glob("*.yaml"))
PARTS = {
    "data": PerceptionDataModule,
    "trainer": Trainer,
}


def experiment_parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--seed_everything", type=int)
    parser.add_argument("--output", type=str)
    parser.add_class_arguments(PerceptionModule, "model", sub_configs=True)
    parser.add_class_arguments(PerceptionDataModule, "data", sub_configs=True)
    parser.add_class_arguments(Trainer, "trainer", sub_configs=True)
    return parser


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiment_builds_its_model(path):
    config = experiment_parser().parse_args([f"--config={path}", "--model.backbone.init_args.weights=random"])
    settings = config.model.as_dict()
    is_full_size = "OpenGVLab" in settings["backbone"]["init_args"]["source"]
    with torch.device("meta" if is_full_size else "cpu"):
        model = build_model({"backbone": settings["backbone"], "heads": settings["heads"]})
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable > sum(p.numel() for p in model.heads.parameters())
    if is_full_size:
        assert trainable < 0.5 * sum(p.numel() for p in model.parameters())
        rows = [
            name
            for name, p in model.named_parameters()
            if p.requires_grad and ("embed_tokens" in name or "lm_head" in name)
        ]
        assert len(rows) == 2, "the rows of [SEG] and [REJ] must train in both matrices"


@pytest.mark.parametrize("path", sorted(ROOT.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_part_is_understood(path):
    if path.parent.name in PARTS:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(PARTS[path.parent.name], "part", sub_configs=True)
        assert parser.parse_args([f"--part={path}"]).part
    else:
        parser = experiment_parser()
        name = "backbone" if path.parent.name == "backbones" else "heads.mask_decoder"
        quick = f"--config={ROOT / 'quickstart.yaml'}"
        assert parser.parse_args([quick, f"--model.{name}={path}"]) if name == "backbone" else path.read_text()


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.yaml")), ids=lambda path: path.stem)
def test_yaml_opens_with_a_comment_and_is_short(path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("#")
    assert len(lines) <= 40


def test_unknown_key_is_named():
    with pytest.raises(ArgumentError, match="learning_rate"):
        experiment_parser().parse_args([f"--config={ROOT / 'quickstart.yaml'}", "--model.optimization.learning_rate=1"])


def test_every_experiment_is_covered():
    assert {path.stem for path in EXPERIMENTS} >= {"quickstart", "custom", "mllmseg_internvl2_5_8b_res"}
