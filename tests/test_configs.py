"""Every YAML that ships is understood by the parser that reads it, and every model in it can be built."""

from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser
from lightning import Trainer

from mmseg_llm.segmenters.simple_click import SimpleClick
from mmseg_llm.training import PerceptionDataModule, PerceptionModule
from mmseg_llm.training.checkpoint import build_model
from mmseg_llm.training.simple_click import SimpleClickModule
from mmseg_llm.training.simple_click_data import SimpleClickDataModule

ROOT = Path(__file__).parent.parent / "configs"
SEGMENTERS = sorted(ROOT.glob("simple_click_*.yaml"))  # of the door tools/train_segmenter.py
EXPERIMENTS = sorted(set(ROOT.glob("*.yaml")) - set(SEGMENTERS))
PARTS = {
    "data": PerceptionDataModule,
    "trainer": Trainer,
}


def experiment_parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--seed_everything", type=int)
    parser.add_argument("--output", type=str)
    parser.add_argument("--monitor", type=str)
    parser.add_class_arguments(PerceptionModule, "model", sub_configs=True)
    parser.add_class_arguments(PerceptionDataModule, "data", sub_configs=True)
    parser.add_class_arguments(Trainer, "trainer", sub_configs=True)
    return parser


def read(path: Path, *overrides: str):
    return experiment_parser().parse_args([f"--config={path}", *overrides])


def trains(path: Path):
    """The model of an experiment with random weights (full sizes without memory), and what trains in it by name."""
    settings = read(path, "--model.backbone.init_args.weights=random").model.as_dict()
    source = settings["backbone"]["init_args"].get("source") or ""  # compositions have none
    with torch.device("cpu" if "tiny" in source else "meta"):
        model = build_model({"backbone": settings["backbone"], "heads": settings["heads"]})
    return model, {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiment_builds_its_model(path):
    model, trainable = trains(path)
    num_trainable = sum(p.numel() for p in trainable.values())
    assert num_trainable > sum(p.numel() for p in model.heads.parameters())
    if path.stem.startswith("mllmseg_"):
        assert num_trainable < 0.5 * sum(p.numel() for p in model.parameters())
        rows = [name for name in trainable if "embed_tokens" in name or "lm_head" in name]
        assert len(rows) == 2, "the rows of [SEG] and [REJ] must train in both matrices"


@pytest.mark.parametrize("path", SEGMENTERS, ids=lambda path: path.stem)
def test_segmenter_training_builds_its_network(path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    for name, kind in (("output", str), ("seed_everything", int), ("checkpoint_every", int)):
        parser.add_argument(f"--{name}", type=kind)
    for name, part in (("model", SimpleClickModule), ("data", SimpleClickDataModule), ("trainer", Trainer)):
        parser.add_class_arguments(part, name)
    config = parser.parse_args([f"--config={path}"])
    settings = config.model.as_dict()
    with torch.device("meta"):
        network = SimpleClick(settings["size"])
    assert config.data.side % network.size.patch == 0 and network.backbone.windows(config.data.side)
    if path.stem == "simple_click_large":
        batch = config.trainer.devices * config.data.batch_size
        assert (batch, config.data.side, config.data.samples_per_epoch, config.trainer.max_epochs) == (
            32,
            448,
            30000,
            55,
        )
        optimization = config.model.optimization
        assert (optimization.lr, tuple(optimization.drop_epochs), optimization.weight_decay) == (5e-5, (50, 55), 0.0)


@pytest.mark.parametrize("name", ["stamp_2b", "stamp_2b_gref", "stamp_2b_uni"])
def test_stamp_2b_trains_in_full(name):
    model, trainable = trains(ROOT / f"{name}.yaml")
    assert trainable.keys() == dict(model.named_parameters()).keys(), "vision tower included"
    assert 2.1e9 < sum(p.numel() for p in trainable.values()) < 2.3e9
    assert model.backbone.lm_head.weight is model.backbone.model.get_input_embeddings().weight


def test_stamp_7b_trains_adapters_and_vocabulary():
    model, trainable = trains(ROOT / "stamp_7b_lora.yaml")
    rest = {name.removeprefix("backbone.model.") for name in trainable if "lora_" not in name}
    classifier = {"heads.all_mask.classifier.weight", "heads.all_mask.classifier.bias"}
    assert rest == {"model.language_model.embed_tokens.weight", "lm_head.weight"} | classifier
    adapters = [name for name in trainable if "lora_" in name]
    assert len(adapters) == 28 * 7 * 2 and all("language_model.layers" in name for name in adapters)
    scales = {m.scaling["default"] for m in model.modules() if hasattr(m, "scaling") and isinstance(m.scaling, dict)}
    assert scales == {16.0}


@pytest.mark.parametrize(
    ("name", "batch", "epochs"),
    [("stamp_2b", 384, 5), ("stamp_2b_gref", 384, 2), ("stamp_2b_uni", 256, 2), ("stamp_7b_lora", 256, 5)],
)
def test_stamp_recipe(name, batch, epochs):
    config = read(ROOT / f"{name}.yaml")
    trainer, optimization = config.trainer, config.model.optimization
    assert trainer.devices * config.data.batch_size * trainer.accumulate_grad_batches == batch
    assert (trainer.max_epochs, trainer.gradient_clip_val) == (epochs, 1.0)
    assert (optimization.schedule, optimization.lr, optimization.warmup) == ("linear", 3e-5, 0.03)
    assert optimization.weight_decay == 0.0
    train = config.data.train.init_args
    is_talk = ["DialogueDataset" in part.class_path for part in train.datasets]
    assert train.repeats == tuple(1 if talk else 6 if name.endswith("uni") else 2 for talk in is_talk)
    assert any(is_talk) == name.endswith("uni")


@pytest.mark.parametrize("path", sorted(ROOT.glob("backbones/qwen[23]*.yaml")), ids=lambda path: path.stem)
def test_qwen_backbone_takes_the_stamp_head(path):
    base = "stamp_tiny_qwen" if "tiny" in path.stem else "stamp_2b"
    settings = read(ROOT / f"{base}.yaml", f"--model.backbone={path}", "--model.backbone.init_args.weights=random")
    with torch.device("cpu" if "tiny" in path.stem else "meta"):
        model = build_model(
            {"backbone": settings.model.as_dict()["backbone"], "heads": settings.model.as_dict()["heads"]}
        )
    geometry = model.backbone.codec.geometry
    low, high = (bound // geometry.step**2 for bound in (geometry.min_pixels, geometry.max_pixels))
    assert (low, high) == ((28, 64) if "tiny" in path.stem else (1024, 1280)), "image tokens"


@pytest.mark.parametrize("path", sorted(ROOT.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_part_is_understood(path, tmp_path):
    kind, quick = path.parent.name, (ROOT / "quickstart.yaml").read_text()
    if kind in PARTS:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(PARTS[kind], "part", sub_configs=True)
        assert parser.parse_args([f"--part={path}"]).part
    elif kind == "backbones":
        assert read(ROOT / "quickstart.yaml", f"--model.backbone={path}")
    elif kind == "heads":
        changed = quick.replace("heads/mask_decoder_tiny.yaml", str(path))
        for folder in ("backbones", "data"):
            changed = changed.replace(f" {folder}/", f" {ROOT / folder}/")
        (tmp_path / "experiment.yaml").write_text(changed)
        assert read(tmp_path / "experiment.yaml").model.heads["mask_decoder"]
    else:
        assert path.read_text()


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.yaml")), ids=lambda path: path.stem)
def test_yaml_opens_with_a_comment_and_is_short(path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("#")
    assert len(lines) <= 40


def test_unknown_key_is_named():
    with pytest.raises(ArgumentError, match="learning_rate"):
        experiment_parser().parse_args([f"--config={ROOT / 'quickstart.yaml'}", "--model.optimization.learning_rate=1"])


def test_every_experiment_is_covered():
    assert {path.stem for path in EXPERIMENTS} >= {"quickstart", "custom", "mllmseg_internvl2_5_8b_res", "stamp_2b"}
