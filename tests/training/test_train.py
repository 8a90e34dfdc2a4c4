"""The train door: resumable checkpoints and early stopping."""

import json

import pytest

from mmseg_llm.cli import main

TINY = [
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
    *("--data.num_workers", "0", "--data.batch_size", "2"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a small dataset where the quick start's configs look for it."""
    path = tmp_path_factory.mktemp("train")
    out = str(path / "data/synthetic/flat-96")
    assert main(["data", "synthetic", "--output", out, "--train", "6", "--val", "2", "--test", "2"]) == 0
    return path


def fit(*arguments: str) -> int:
    return main(["train", "fit", "--config", "configs/quickstart.yaml", *TINY, *arguments])


def test_a_run_resumes_from_its_checkpoint(folder, monkeypatch):
    monkeypatch.chdir(folder)
    steps = ["--trainer.val_check_interval", "2", "--checkpoint_every", "2", "--output", "runs/a"]
    assert fit(*steps, "--trainer.max_steps", "2") == 0
    last = folder / "runs/a/checkpoints/last.ckpt"
    assert last.exists()
    assert fit(*steps, "--trainer.max_steps", "4", "--ckpt_path", str(last)) == 0
    report = json.loads((folder / "runs/a/report.json").read_text())
    assert report["steps"] == 4


def test_early_stop(folder, monkeypatch):
    monkeypatch.chdir(folder)
    rate = ["--model.optimization.lr", "0.0", "--model.optimization.weight_decay", "0.0"]
    steps = ["--trainer.val_check_interval", "1", "--trainer.max_steps", "9", "--early_stop", "1", "--output", "runs/b"]
    assert fit(*rate, *steps) == 0
    assert json.loads((folder / "runs/b/report.json").read_text())["steps"] < 9
