"""The command line: fast help, one-sentence errors, exit codes."""

import json
import subprocess
import sys
import time

import pytest
from PIL import Image

from mmseg_llm import bench_flows as bench
from mmseg_llm.cli import find_configs, main
from mmseg_llm.inference.perceiver import Perceiver
from mmseg_llm.training.checkpoint import CONFIG, WEIGHTS, load_model, save_weights


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run folder with an untrained tiny model."""
    import yaml

    folder = tmp_path_factory.mktemp("run")
    model = bench.untrained_model()
    save_weights(model, folder)
    heads = {
        "mask_decoder": {
            "class_path": "mmseg_llm.heads.MaskDecoderHead",
            "init_args": {"heads": 4, "max_new_tokens": 8},
        }
    }
    backbone = {"class_path": "mmseg_llm.backbones.InternVLBackbone", "init_args": {"source": "internvl-tiny"}}
    (folder / CONFIG).write_text(yaml.safe_dump({"model": {"backbone": backbone, "heads": heads}}))
    return folder


def seconds(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - start


def test_import_and_help_are_instant():
    base = min(seconds(["-c", "pass"]) for _ in range(3))
    assert min(seconds(["-c", "import mmseg_llm"]) for _ in range(3)) - base < 0.3
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "mmseg_llm.cli", "--help"], check=True, capture_output=True)
    assert time.perf_counter() - start < 1.5


def test_import_loads_no_torch():
    code = "import sys, mmseg_llm; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "no verb 'nonsense'"),
        (["evaluate", "--checkpoint", "nowhere", "--data", "configs/data/synthetic_flat96.yaml", "--output", "o"], "nowhere"),
        (["train", "fit", "--config", "configs/quickstart.yaml", "--model.optimization.lrr", "1"], "lrr"),
        (["score", "--predictions", "nothing.json"], "nothing.json"),
    ],
)  # fmt: skip
def test_errors_are_one_sentence(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert list(tmp_path.iterdir()) == []


def test_empty_query_and_corrupt_image(run_folder, tmp_path, capsys):
    image = tmp_path / "a.png"
    Image.new("RGB", (40, 30)).save(image)
    out = tmp_path / "out"
    command = ["predict", "--checkpoint", str(run_folder), "--output", str(out)]
    assert main([*command, "--image", str(image), "--query", " . "]) == 2
    assert "is empty" in capsys.readouterr().err
    broken = tmp_path / "b.png"
    broken.write_bytes(image.read_bytes()[:40])
    assert main([*command, "--image", str(broken), "--query", "the red cube"]) == 2
    error = capsys.readouterr().err
    assert "b.png" in error
    assert "replace or remove" in error


def test_a_bad_image_loses_nothing_that_was_written(run_folder, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (40, 30), "red").save(folder / "a.png")
    (folder / "b.png").write_bytes(b"no image")
    command = ["predict", "--checkpoint", str(run_folder), "--output", str(tmp_path / "out"), "--batch_size", "1"]
    assert main([*command, "--image", str(folder), "--query", "the red cube"]) == 2
    assert (tmp_path / "out/a_0_mask.png").exists()


def test_weights_that_do_not_fit(run_folder, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    copy = tmp_path / "copy"
    shutil.copytree(run_folder, copy)
    state = load_file(copy / WEIGHTS)
    state.pop("heads.mask_decoder.decoder.conv2.bias")
    save_file(state | {"heads.extra": state["heads.mask_decoder.decoder.conv2.weight"].clone()}, copy / WEIGHTS)
    with pytest.raises(
        ValueError, match=r"missing keys such as heads\.mask_decoder\.decoder\.conv2\.bias and .*unexpected"
    ):
        load_model(copy)
    (copy / WEIGHTS).write_bytes(b"\0" * 30)
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(copy)
    (copy / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        load_model(copy)


def test_tokenizer_without_seg(run_folder, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run_folder, copy)
    path = copy / "backbone/tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "[SEG]"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"\[SEG\]"):
        load_model(copy)


def test_batches_and_single_images_give_the_same_masks(run_folder):
    samples = bench.scenes("flat-96", 3, 2)
    perceiver = Perceiver.from_pretrained(run_folder, device="cpu")
    requests = [(sample.image, [query.text for query in sample.queries]) for sample in samples]
    together = list(perceiver.predict_many(requests, batch_size=3))
    alone = list(perceiver.predict_many(requests, batch_size=1))
    assert [[item.mask for item in row] for row in together] == [[item.mask for item in row] for row in alone]


def test_bench_reports_and_masks_agree(tmp_path, capsys):
    assert main(["bench", "--images", "2", "--queries", "3", "--output", str(tmp_path / "bench.json")]) == 0
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["lowest_iou"] > 0.9999
    assert report["speedups"]["one expression at a time"]["batch 8"] > 1.0
    assert report["masks_drawn"] > 0


def test_bench_of_the_reference_flow(tmp_path, capsys):
    arguments = ["--head", "all_mask", "--images", "4", "--queries", "4", "--output", str(tmp_path / "bench.json")]
    assert main(["bench", *arguments]) == 0
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["lowest_iou"] > 0.9999 and report["masks_drawn"] > 0
    (published,) = (name for name in report["speedups"] if "published" in name)
    (uncached,) = (name for name in report["speedups"] if "without cache" in name)
    assert report["speedups"][published]["batch 8"] > 2.0  # 6 on a quiet machine
    assert report["speedups"][uncached]["batch 8"] > 3.0  # 7 and more
    for option in ("--images", "--queries"):
        assert main(["bench", option, "0"]) == 2
        assert f"{option[2:]} is 0; measure at least one" in capsys.readouterr().err
    assert main(["bench", "--backbone", "nonsense"]) == 2
    assert "no tiny model 'mask_decoder' on 'nonsense'" in capsys.readouterr().err


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    assert "transformers" in capsys.readouterr().out


def test_shipped_configs_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = find_configs(["--config", "configs/quickstart.yaml", "--data=configs/data/refer_mini.yaml", "--x=y"])
    assert found[1].endswith("/configs/quickstart.yaml")
    assert found[1] != "configs/quickstart.yaml"
    assert found[2].startswith("--data=/")
    assert found[3] == "--x=y"
