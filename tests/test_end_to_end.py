"""The main job as the README tells it: make data, train, score, predict - and it must have learned."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmseg_llm import Perceiver
from mmseg_llm.cli import main
from mmseg_llm.configuration import read_data
from mmseg_llm.evaluation import evaluate, score_file
from mmseg_llm.training.checkpoint import build_model, read_model_settings

ROOT = Path(__file__).parent.parent
STEPS = 140
OVERRIDES = {
    "data synthetic": ["--train", "8", "--val", "2", "--test", "8"],
    "train fit": [
        *("--model.initial_weights", "null"),  # from scratch: the test asks whether training works
        *("--trainer.max_steps", str(STEPS), "--trainer.val_check_interval", str(STEPS)),
        *("--trainer.log_every_n_steps", "5", "--data.batch_size", "8", "--data.num_workers", "0"),
        *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
    ],
    "evaluate": ["--split", "train"],
}


def readme_commands() -> list[list[str]]:
    """Arguments of the shell commands in the README that run this package, in order."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = []
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:1] == ["mmseg-llm"]:
            commands.append(words[1:])
        elif words[:1] == ["python"] and words[1].startswith("tools/"):
            commands.append([Path(words[1]).stem, *words[2:]])
    return commands


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder in which the README's commands were run, in order, on tiny settings."""
    folder = tmp_path_factory.mktemp("work")
    before = Path.cwd()
    os.chdir(folder)
    try:
        for command in readme_commands():
            name = " ".join(command[:2])
            extra = OVERRIDES.get(name, OVERRIDES.get(command[0], []))
            assert main([*command, *extra]) == 0, command
        yield folder
    finally:
        os.chdir(before)


@pytest.mark.slow
def test_loss_falls_and_masks_fit(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    run = workplace / "runs/quickstart"
    rows = (run / "logs/metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("train/loss")
    losses = [float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]]
    assert losses[-1] < 0.3 * losses[0]
    torch.manual_seed(0)
    untrained = build_model(read_model_settings(run / "config.yaml")).eval()
    dataset = read_data(ROOT / "configs/data/synthetic_flat96.yaml").dataset("train")
    before = evaluate(untrained, dataset, workplace / "untrained.json")["scores"]["cIoU"]
    assert before < 0.1
    assert score_file(run / "scores.json")["scores"]["cIoU"] > before + 0.35


@pytest.mark.slow
def test_run_folder_is_complete(workplace):
    run = workplace / "runs/quickstart"
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "model.safetensors", "backbone", "report.json", "curves.png", "overlays", "logs"} <= names
    report = json.loads((run / "report.json").read_text())
    assert report["steps"] == STEPS
    assert report["protocol"]["predict"] == "generate"
    for picture in [run / "curves.png", *sorted((run / "overlays").iterdir())]:
        assert np.asarray(Image.open(picture)).std() > 10, f"{picture} is blank"


@pytest.mark.slow
def test_scores_can_be_recomputed_and_carry_their_protocol(workplace):
    path = workplace / "runs/quickstart/scores.json"
    content = json.loads(path.read_text())
    assert content["protocol"]["predict"] == "generate"
    again = score_file(path)["scores"]
    expected = {k: v for k, v in content["scores"].items() if v is not None}  # nan of what there is none of, in JSON
    assert {k: v for k, v in again.items() if v == v} == expected


@pytest.mark.slow
def test_perceiver_agrees_with_the_predictions_file(workplace):
    records = json.loads((workplace / "runs/quickstart/scores.json").read_text())["predictions"]
    images = {str(i["id"]): i["file_name"] for i in json.loads(
        (workplace / "data/synthetic/flat-96/instances.json").read_text())["images"]}  # fmt: skip
    perceiver = Perceiver.from_pretrained(workplace / "runs/quickstart", device="cpu")
    record = next(record for record in records if record["exists"])
    image = workplace / "data/synthetic/flat-96/images" / images[record["sample_id"]]
    alone = perceiver.predict(image, [record["query"]])[0]
    assert alone.exists
    assert alone.mask.to_coco() == record["mask"]


@pytest.mark.slow
def test_predict_writes_overlay_masks_and_coco(workplace):
    folder = workplace / "runs/quickstart/predictions"
    coco = json.loads((folder / "predictions.json").read_text())
    assert [entry["caption"] for entry in coco["annotations"]] == ["the red circle", "the leftmost shape"]
    assert len(list(folder.glob("*_mask.png"))) == 2
    assert len(list(folder.glob("*_overlay.jpg"))) == 1


@pytest.mark.slow
def test_training_refuses_to_overwrite_a_run(workplace, capsys):
    os.chdir(workplace)
    assert main(["train", "fit", "--config", "configs/quickstart.yaml"]) == 2
    assert "already holds a trained model" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_score_like_one(workplace):
    arguments = "--checkpoint runs/quickstart --data configs/data/synthetic_flat96.yaml --split train --output two.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*launcher, str(ROOT / "tools/evaluate.py"), *arguments.split()]
    done = subprocess.run(
        command, cwd=workplace, env=environment, check=False, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one = json.loads((workplace / "runs/quickstart/scores.json").read_text())
    two = json.loads((workplace / "two.json").read_text())
    masks = [[(r["query_id"], r["mask"]) for r in content["predictions"]] for content in (one, two)]
    assert masks[0] == masks[1]
    assert two["scores"]["cIoU"] == one["scores"]["cIoU"]
