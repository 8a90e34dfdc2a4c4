"""The tools that are no verbs of the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from mmseg_llm import bench_flows as bench
from mmseg_llm.cli import main
from mmseg_llm.training.checkpoint import CONFIG, save_weights

ROOT = Path(__file__).parent.parent


def run(tool: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / tool), *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two runs and a small dataset."""
    path = tmp_path_factory.mktemp("tools")
    data = path / "scenes"
    assert main(["data", "synthetic", "--output", str(data), "--train", "1", "--val", "3", "--test", "1"]) == 0
    reader = {"root": str(data), "split_by": "synthetic", "split": "val", "grefs": True}
    config = {"val": {"class_path": "mmseg_llm.data.ReferDataset", "init_args": reader}}
    (path / "data.yaml").write_text(yaml.safe_dump(config))
    classes = {
        "mask_decoder": {
            "class_path": "mmseg_llm.heads.MaskDecoderHead",
            "init_args": {"heads": 4, "max_new_tokens": 8},
        },
        "all_mask": {"class_path": "mmseg_llm.heads.AllMaskHead"},
    }
    for name, head in classes.items():
        save_weights(bench.untrained_model("internvl-tiny", name), path / name)
        backbone = {"class_path": "mmseg_llm.backbones.InternVLBackbone", "init_args": {"source": "internvl-tiny"}}
        (path / name / CONFIG).write_text(yaml.safe_dump({"model": {"backbone": backbone, "heads": {name: head}}}))
    return path


def test_compare_runs(folder, tmp_path):
    runs = [word for name in ("mask_decoder", "all_mask") for word in ("--checkpoint", str(folder / name))]
    data = ["--data", str(folder / "data.yaml"), "--split", "val", "--images", "3", "--output", str(tmp_path / "o.jpg")]
    done = run("compare_runs.py", *runs, *data, "--refiner", "configs/segmenters/grabcut.yaml")
    assert done.returncode == 0, done.stderr
    width, height = Image.open(tmp_path / "o.jpg").size
    done = run("compare_runs.py", *runs[:2], *data)
    assert done.returncode == 0, done.stderr
    narrow = Image.open(tmp_path / "o.jpg").size
    assert narrow[1] == height and 2.5 < width / narrow[0] < 3.1  # two runs and the refined one, against one


def test_measure_refiner(folder):
    grabcut = ["--refiner", "configs/segmenters/grabcut.yaml"]
    done = run("measure_refiner.py", *grabcut, "--level", "flat-128", "--masks", "6")
    assert done.returncode == 0, done.stderr
    before, after = (float(word) for word in done.stdout.split("mean IoU ")[1].split(";")[0].split(" -> "))
    assert "6 masks on 16 x 16 cells" in done.stdout and after > before + 0.1
    done = run("measure_refiner.py", *grabcut, "--data", str(folder / "data.yaml"), "--split", "train")
    assert done.returncode == 2 and done.stderr.startswith("error: the data config has no 'train' dataset")
