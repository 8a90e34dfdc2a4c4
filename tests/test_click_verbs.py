"""From trajectories to a trained policy, its evaluation, search, rollouts, ratings and exports, by the command line alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from PIL import Image

from mmseg_llm.cli import main
from mmseg_llm.clicks import read_trajectories
from mmseg_llm.inference.perceiver import Perceiver
from mmseg_llm.masks import Mask

ENVIRONMENT = {
    "class_path": "mmseg_llm.segmenters.fakes.DisksEnvironment",
    "init_args": {"positive_radius": 12, "negative_radius": 6},
}
BACKBONE = {"class_path": "mmseg_llm.backbones.InternVLBackbone", "init_args": {"source": "internvl-tiny"}}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Scenes, trajectories and a policy trained on them for a few steps."""
    path = tmp_path_factory.mktemp("clicks")
    scenes = path / "scenes"
    assert main(["data", "synthetic", "--output", str(scenes), "--train", "6", "--val", "2", "--test", "2"]) == 0

    def reader(split: str) -> dict:
        arguments = {"root": str(scenes), "split_by": "synthetic", "split": split, "grefs": True}
        return {"class_path": "mmseg_llm.data.ReferDataset", "init_args": arguments}

    write(path / "data.yaml", {split: reader(split) for split in ("train", "val", "test")})
    write(path / "environment.yaml", ENVIRONMENT)
    words = ["--data", str(path / "data.yaml"), "--environment", str(path / "environment.yaml"), "--max_clicks", "3"]
    assert main(["data", "trajectories", *words, "--output", str(path / "a.jsonl")]) == 0
    assert main(["data", "trajectories", *words, "--output", str(path / "b.jsonl"), "--random_starts", "2"]) == 0
    files = [str(path / "a.jsonl"), str(path / "b.jsonl")]
    material = {
        "class_path": "mmseg_llm.data.TrajectoryDataset",
        "init_args": {"trajectories": files, "source": reader("train")},
    }
    head = {
        "environment": ENVIRONMENT,
        "max_clicks": 2,
        "prompts": {"questions": ["Click {x}."]},
        "codec": {"scale": 10},
    }
    config = {
        "output": str(path / "run"),
        "monitor": "val/gIoU",
        "model": {
            "backbone": BACKBONE,
            "heads": {"click_policy": {"class_path": "mmseg_llm.heads.ClickPolicyHead", "init_args": head}},
        },
        "data": {"train": material, "val": reader("val"), "batch_size": 4, "num_workers": 0},
        "trainer": {"accelerator": "cpu", "max_steps": 3, "val_check_interval": 3, "check_val_every_n_epoch": None},
    }
    write(path / "config.yaml", config)
    assert main(["train", "fit", "--config", str(path / "config.yaml")]) == 0
    return path


def write(path, content):
    path.write_text(yaml.safe_dump(content))


def given(work, *names):
    known = {"checkpoint": work / "run", "data": work / "data.yaml"}
    return [word for name in names for word in (f"--{name}", str(known[name]))]


def test_random_starts_are_in_the_file(work):
    starts = list(read_trajectories(work / "b.jsonl"))
    assert len(starts) == 2 * len(list(read_trajectories(work / "a.jsonl")))
    assert all(trajectory.given and trajectory.start is not None for trajectory in starts)
    assert len({trajectory.given for trajectory in starts}) > len(starts) / 2


def test_evaluate_in_every_protocol_and_score_again(work, tmp_path, capsys):
    for protocol in ("generate", "reward_selected", "search", "oracle_best", "official"):
        output = tmp_path / f"{protocol}.json"
        words = ["--protocol", protocol, "--output", str(output), "--candidates", "2"]
        assert main(["evaluate", *given(work, "checkpoint", "data"), *words]) == 0
        first = capsys.readouterr().out
        assert main(["score", "--predictions", str(output)]) == 0
        again = capsys.readouterr().out
        for text in ("mIoU@1", "NoC@90", "endings:", "answers:", "DisksEnvironment"):
            assert text in first and text in again
    clicks = json.loads((tmp_path / "generate.json").read_text())["predictions"][0]["trajectory"]
    assert len(clicks) <= 3
    words = ["--output", str(tmp_path / "more.json"), "--start", str(tmp_path / "generate.json"), "--max_clicks", "1"]
    assert main(["evaluate", *given(work, "checkpoint", "data"), *words]) == 0
    assert "max_clicks: 1" in capsys.readouterr().out
    assert main(["evaluate", *given(work, "checkpoint", "data"), *words[:4], "--max_clicks", "0"]) == 2
    assert "max_clicks is 0" in capsys.readouterr().err


def test_predict_writes_what_annotation_tools_read(work, tmp_path):
    image = next((work / "scenes" / "images").glob("*"))
    words = ["--image", str(image), "--query", "the red circle", "--query", "the square", "--output", str(tmp_path)]
    assert main(["predict", *given(work, "checkpoint"), *words, "--label_studio", "https://host/"]) == 0
    content = json.loads((tmp_path / "predictions.json").read_text())
    assert [len(entry["clicks"]) for entry in content["annotations"]] and content["images"][0][
        "file_name"
    ] == image.name
    tasks = json.loads((tmp_path / "label_studio.json").read_text())
    assert tasks[0]["data"]["image"] == f"https://host/{image.name}" and (tmp_path / "label_studio.xml").is_file()
    gifs = sorted(tmp_path.glob("*_clicks.gif"))
    assert len(gifs) == 2 and Image.open(gifs[0]).n_frames >= 1 and len(list(tmp_path.glob("*_clicks.jpg"))) == 2


def test_rollouts_ratings_and_exports(work, tmp_path, capsys):
    words = given(work, "checkpoint", "data")
    assert main(["data", "rollouts", *words, "--output", str(tmp_path / "r.jsonl"), "--max_samples", "3"]) == 0
    assert "actions corrected" in capsys.readouterr().out and list(read_trajectories(tmp_path / "r.jsonl"))
    files = ["--trajectories", str(tmp_path / "r.jsonl"), "--trajectories", str(work / "a.jsonl")]
    assert main(["data", "sft", *files, *given(work, "data"), "--output", str(tmp_path / "sft")]) == 0
    records = [json.loads(line) for line in (tmp_path / "sft" / "chat.jsonl").read_text().splitlines()]
    assert records and all((tmp_path / "sft" / record["images"][0]).is_file() for record in records)
    assert main(["clicks", "rate", *words, "--output", str(tmp_path / "m.json"), "--benchmark", "true"]) == 0
    assert "MAE" in capsys.readouterr().out
    assert main(["clicks", "rate", *words, "--output", str(tmp_path / "m.json"), "--keep", "0.2"]) == 0
    assert "masks, 0 without estimate" in capsys.readouterr().out


def test_perceiver_goes_on_from_masks(work):
    perceiver = Perceiver.from_pretrained(work / "run", device="cpu")
    image = Image.open(next((work / "scenes" / "images").glob("*"))).convert("RGB")
    start = Mask.from_array(np.ones((96, 96), bool))
    (found,) = perceiver.predict(image, "the square", start=start)
    assert found.trajectory[0].mask == start
    with pytest.raises(ValueError, match="1 start masks for 2 queries"):
        perceiver.predict(image, ["a", "b"], start=start)
    perceiver.click_on(max_clicks=1)
    assert len(perceiver.predict(image, "the square")[0].trajectory) <= 2


def test_other_heads_do_not_click(tmp_path, capsys):
    from mmseg_llm.bench_flows import untrained_model

    perceiver = Perceiver(untrained_model("internvl-tiny", "mask_decoder"))
    with pytest.raises(ValueError, match=r"'mask_decoder' does not click; leave out"):
        perceiver.click_on(max_clicks=3)


def test_bench_of_a_policy(work, tmp_path, capsys):
    output = tmp_path / "bench.json"
    words = [*given(work, "checkpoint"), "--images", "2", "--output", str(output)]
    assert main(["bench", *words]) == 0
    report = json.loads(output.read_text())
    assert "search: K=3 to K=1, batch 1" in capsys.readouterr().out and len(report["ratios"]) == 10
    assert all(ratio > 0 for ratio in report["ratios"].values())
