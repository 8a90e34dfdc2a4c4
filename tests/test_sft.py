"""Training files for other trainers: what they say parses back to the labels, and pictures are written once."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from mmseg_llm.cli import main
from mmseg_llm.clicks import ClickStep, Trajectory, write_trajectories
from mmseg_llm.data.trajectories import TrajectoryDataset
from mmseg_llm.heads.click_policy.codec import UNIT_DECIMAL, ClickCodec
from mmseg_llm.heads.click_policy.overlay import Overlay
from mmseg_llm.heads.click_policy.prompts import QWEN_PROMPT, ClickPrompts
from mmseg_llm.heads.click_policy.text import Status, parse, write
from mmseg_llm.sft import FILES, export_sft, read_policy
from mmseg_llm.structures import Click, Mask, NextClick, Query, Sample

SIZE = (48, 64)


def square(top, left, side=12):
    array = np.zeros(SIZE, bool)
    array[top : top + side, left : left + side] = True
    return Mask.from_array(array)


def photo(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8))


@pytest.fixture
def dataset(tmp_path):
    """Two objects on one image, with 2 steps and 1 step, and a finish each; the first has two captions."""
    folder = tmp_path / "source"
    folder.mkdir()
    photo().save(folder / "7.png")
    first = (
        ClickStep(Click(10, 20, True), square(5, 15), 0.61),
        ClickStep(Click(3, 40, False), square(6, 16), 0.985),
    )
    second = (ClickStep(Click(40, 63, True), square(30, 40), 0.99),)
    write_trajectories(
        tmp_path / "clicks.jsonl",
        [
            Trajectory(square(6, 16), first, image="7", object_id=1, caption=("left cup", "cup"), stop="iou"),
            Trajectory(square(30, 40), second, image="7", object_id=2, caption="right cup", stop="iou"),
        ],
    )
    return TrajectoryDataset(tmp_path / "clicks.jsonl", images=folder)


def read(folder, style):
    text = (folder / FILES[style]).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if style == "chat" else json.loads(text)


def turns(record):
    """Image, question and answer of any style."""
    if "messages" in record:
        (image,) = record["images"]
        asked, answered = (message["content"] for message in record["messages"])
        assert [message["role"] for message in record["messages"]] == ["user", "assistant"]
        assert asked.count("<image>") == 1
        return image, asked.removeprefix("<image>"), answered
    asked, answered = (turn["value"] for turn in record["conversations"])
    if "image" in record:
        assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt"]
        assert asked.startswith("<image>\n")
        return record["image"], asked.removeprefix("<image>\n"), answered
    assert [turn["from"] for turn in record["conversations"]] == ["user", "assistant"]
    image, question = asked.removeprefix("Picture 1: <img>").split("</img>\n")
    return image, question, answered


def labels(dataset):
    return [(sample, query) for sample in dataset for query in sample.queries]


@pytest.mark.parametrize("codec", [ClickCodec(), UNIT_DECIMAL, ClickCodec(axis_order="xy")])
@pytest.mark.parametrize("style", ["llava", "qwen", "chat"])
def test_answers_parse_back_to_the_labels(dataset, tmp_path, style, codec):
    counts = export_sft(dataset, tmp_path / "out", style, codec=codec)
    records, expected = read(tmp_path / "out", style), labels(dataset)
    assert counts["records"] == len(records) == len(expected) == 3 * 2 + 2
    kinds = []
    for record, (sample, query) in zip(records, expected, strict=True):
        image, question, answer = turns(record)
        action = parse(answer, sample.size, codec)
        assert action.click == query.next_click.click
        assert action.iou == pytest.approx(query.next_click.iou, abs=0.0051)
        assert action.status == (Status.FINISH if query.next_click.is_finished else Status.OK)
        assert query.text in question
        assert (tmp_path / "out" / image).is_file()
        kinds.append(action.status)
    assert kinds.count(Status.FINISH) == 3


def test_qwen_asks_as_the_released_weights_were_asked(dataset, tmp_path):
    export_sft(dataset, tmp_path, "qwen")
    asked = read(tmp_path, "qwen")[0]["conversations"][0]["value"]
    image = asked.split("<img>")[1].split("</img>")[0]
    prompt = QWEN_PROMPT.replace("{IMAGE}", image).replace("{CAPTION}", "left cup")
    assert prompt.split("<|im_start|>user\n")[1].split("<|im_end|>")[0] == asked


def test_pictures_are_written_once_per_image_and_mask_and_show_the_mask(dataset, tmp_path):
    counts = export_sft(dataset, tmp_path / "out", "chat", image_format="png")
    # the plain image, two masks of the first object and one of the second
    assert (counts["images"], counts["written"], counts["present"]) == (4, 4, 0)
    assert len(list((tmp_path / "out" / "images").iterdir())) == 4
    for record, (sample, query) in zip(read(tmp_path / "out", "chat"), labels(dataset), strict=True):
        shown = np.asarray(Image.open(tmp_path / "out" / turns(record)[0]))
        mask = np.zeros(SIZE, bool) if query.start is None else query.start.array
        assert np.array_equal(shown, np.asarray(Overlay()(sample.load_image(), mask)))


def test_a_stopped_export_goes_on_and_styles_share_pictures(dataset, tmp_path):
    export_sft(dataset, tmp_path / "out", "chat")
    images = sorted((tmp_path / "out" / "images").iterdir())
    images[0].unlink()
    stamp = images[1].stat().st_mtime_ns
    before = (tmp_path / "out" / "chat.jsonl").read_bytes()
    counts = export_sft(dataset, tmp_path / "out", "chat")
    assert (counts["written"], counts["present"]) == (1, 3)
    assert images[0].is_file() and images[1].stat().st_mtime_ns == stamp
    assert (tmp_path / "out" / "chat.jsonl").read_bytes() == before
    assert export_sft(dataset, tmp_path / "out", "llava")["written"] == 0
    assert export_sft(dataset, tmp_path / "out", "chat", overlay=Overlay("blue"))["written"] == 4


def test_a_crash_leaves_no_half_file(dataset, tmp_path):
    def broken():
        yield dataset[0]
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        export_sft(broken(), tmp_path / "out", "llava")
    left = [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(left) == 1 and left[0].endswith(".jpg")


def test_nothing_leaves_the_folder(tmp_path):
    outside = tmp_path / "a b" / "..evil .."
    outside.mkdir(parents=True)
    photo().save(outside / "..%2f..é.png")
    sample = Sample(
        outside / "..%2f..é.png",
        SIZE,
        (Query("../../cup", next_click=NextClick(Click(0, 0, True), 0.0), id="../../x"),),
        id="/etc/passwd",
    )
    out = tmp_path / "out"
    for style in FILES:
        export_sft([sample], out, style)
        image = Path(turns(read(out, style)[0])[0])
        assert not image.is_absolute() and image.parts[0] == "images" and len(image.parts) == 2
        assert image.name.isascii() and " " not in image.name
    assert {path.name for path in tmp_path.iterdir()} == {"a b", "out"}
    described = json.loads((out / "dataset_info.json").read_text())["click_policy"]
    assert (out / described["file_name"]).is_file()


def test_images_in_memory_are_told_apart_by_content(tmp_path):
    query = Query("cup", next_click=NextClick(Click(1, 2, True), 0.0))
    samples = [Sample(photo(seed), SIZE, (query,), id="same") for seed in (1, 2, 1)]
    counts = export_sft(samples, tmp_path, "chat", image_format="png")
    assert counts["images"] == 2
    names = [turns(record)[0] for record in read(tmp_path, "chat")]
    assert names[0] == names[2] != names[1]
    assert np.array_equal(np.asarray(Image.open(tmp_path / names[1])), np.asarray(photo(2)))


def test_what_is_left_out_is_counted(tmp_path):
    click = NextClick(Click(1, 2, True), 0.0)
    queries = (
        Query("cup", next_click=click),
        Query("cup"),
        Query(" . ", next_click=click),
        Query("an <image> of a cup", next_click=click),
        Query("estimate", next_click=NextClick(None, 0.5)),
    )
    sample = Sample(photo(), SIZE, queries, id="1")
    counts = export_sft([sample], tmp_path / "all", "llava")
    assert counts["records"] == 2
    assert counts["skipped"] == {
        "without next click": 1,
        "empty expression": 1,
        "control words in the expression": 1,
    }
    assert read(tmp_path / "all", "llava")[1]["conversations"][1]["value"] == "Current IOU: 50"
    fewer = export_sft([sample], tmp_path / "fewer", "llava", with_estimates=False)
    assert fewer["records"] == 1 and fewer["skipped"]["estimate only"] == 1
    silent = export_sft([sample], tmp_path / "silent", "llava", with_iou=False)
    assert silent["records"] == 1
    assert read(tmp_path / "silent", "llava")[0]["conversations"][1]["value"].startswith("Positive point: (")


def test_templates_vary_by_record_and_the_settings_hold_the_codec(dataset, tmp_path):
    prompts = ClickPrompts()
    export_sft(dataset, tmp_path, "llava", codec=UNIT_DECIMAL, seed=3)
    asked = [turns(record)[1] for record in read(tmp_path, "llava")]
    assert len({question.split(query.text)[0] for question, (_, query) in zip(asked, labels(dataset))}) > 1
    settings = json.loads((tmp_path / "llava.settings.json").read_text())
    assert ClickCodec.from_metadata(settings["codec"]) == UNIT_DECIMAL
    assert tuple(settings["prompts"]["questions"]) == prompts.questions
    assert settings["counts"]["records"] == len(asked)


def test_refusals_say_what_to_change(dataset, tmp_path):
    with pytest.raises(ValueError, match="style is 'alpaca'; choose from llava, qwen, chat"):
        export_sft(dataset, tmp_path, "alpaca")
    with pytest.raises(ValueError, match="image_format is 'gif'"):
        export_sft(dataset, tmp_path, "chat", image_format="gif")
    with pytest.raises(ValueError, match="calls the mask green"):
        export_sft(dataset, tmp_path, "qwen", overlay=Overlay("red"))
    with pytest.raises(ValueError, match=r"no query .*'without next click': 1"):
        export_sft([Sample(photo(), SIZE, (Query("cup"),))], tmp_path, "chat")
    assert not (tmp_path / "chat.jsonl").exists()
    missing = replace(dataset[0], image=tmp_path / "gone.jpg")
    with pytest.raises(ValueError, match=r"gone\.jpg cannot be read"):
        export_sft([missing], tmp_path, "chat")


def run(folder, **arguments):
    """A run folder with a policy, as training leaves its configuration; no weights are needed."""
    environment = {"class_path": "mmseg_llm.segmenters.SamEnvironment", "init_args": {"source": "/nowhere"}}
    policy = {
        "class_path": "mmseg_llm.heads.ClickPolicyHead",
        "init_args": {"environment": environment, **arguments},
    }
    heads = {"clicks": policy, "masks": {"class_path": "mmseg_llm.heads.AllMaskHead"}}
    backbone = {"class_path": "mmseg_llm.backbones.InternVLBackbone", "init_args": {"source": "/nowhere"}}
    folder.mkdir()
    content = {"model": {"backbone": backbone, "heads": heads}}
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return folder


def test_an_export_fits_the_policy_of_a_run(dataset, tmp_path):
    path = run(
        tmp_path / "run",
        codec={"scale": 10, "axis_order": "xy"},
        overlay={"colour": "blue", "alpha": 0.25},
        prompts={"questions": ["Improve {x} ({colour})."]},
        with_iou=False,
    )
    words = ["--trajectories", str(tmp_path / "clicks.jsonl"), "--images", str(tmp_path / "source")]
    output = tmp_path / "out"
    assert (
        main(["data", "sft", *words, "--checkpoint", str(path), "--output", str(output), "--image_format", "png"]) == 0
    )
    codec, records = ClickCodec(scale=10, axis_order="xy"), read(output, "chat")
    for record, (sample, query) in zip(records, labels(dataset), strict=True):
        image, question, answer = turns(record)
        assert question == f"Improve {query.text} (blue)."
        assert answer == write(query.next_click.click, SIZE, codec, None, query.next_click.is_finished)
        mask = np.zeros(SIZE, bool) if query.start is None else query.start.array
        expected = np.asarray(Overlay("blue", 0.25)(sample.load_image(), mask))
        assert np.array_equal(np.asarray(Image.open(output / image)), expected)
    settings = json.loads((output / "chat.settings.json").read_text())
    assert ClickCodec.from_metadata(settings["codec"]) == codec and not settings["with_iou"]
    words += ["--checkpoint", str(path), "--output", str(output), "--with_iou", "true"]
    assert main(["data", "sft", *words]) == 0
    assert read(output, "chat")[0]["messages"][1]["content"].startswith("Current IOU: ")
    defaults = ["--trajectories", str(tmp_path / "clicks.jsonl"), "--images", str(tmp_path / "source")]
    assert main(["data", "sft", *defaults, "--output", str(tmp_path / "plain")]) == 0
    settings = json.loads((tmp_path / "plain" / "chat.settings.json").read_text())
    assert settings["with_iou"] and ClickCodec.from_metadata(settings["codec"]) == ClickCodec()


def test_runs_that_fit_no_export_are_refused(dataset, tmp_path, capsys):
    path, released = run(tmp_path / "run"), run(tmp_path / "released", prompt_style="qwen")
    assert read_policy(path, "llava").name == "" and read_policy(released, "qwen").prompt_style == "qwen"
    assert read_policy(path, "chat", "clicks").environment is None
    with pytest.raises(ValueError, match=r"'masks' of .* is no click policy"):
        read_policy(path, "chat", "masks")
    with pytest.raises(ValueError, match=r"has no head 'x'; it has clicks, masks"):
        read_policy(path, "chat", "x")
    with pytest.raises(ValueError, match="in its own words; use --style chat or llava"):
        read_policy(path, "qwen")
    with pytest.raises(ValueError, match="in the released words; use --style qwen"):
        read_policy(released, "chat")
    with pytest.raises(ValueError, match=r"has no config\.yaml"):
        read_policy(tmp_path, "chat")
    broken = run(tmp_path / "broken", with_iou="perhaps")
    with pytest.raises(ValueError, match=r"config\.yaml, head 'clicks': .*with_iou"):
        read_policy(broken, "chat")
    words = ["--trajectories", str(tmp_path / "clicks.jsonl"), "--output", str(tmp_path / "out"), "--head", "clicks"]
    assert main(["data", "sft", *words, "--images", str(tmp_path / "source")]) == 2
    assert "give its folder as --checkpoint" in capsys.readouterr().err


def test_masks_of_the_dataset_keep_no_pixels(tmp_path):
    start = square(1, 2)
    query = Query("cup", start=start, next_click=NextClick(Click(1, 2, True), 0.0))
    export_sft([Sample(photo(), SIZE, (query,), id="1")], tmp_path, "chat")
    assert "array" not in vars(start)


def test_a_policy_without_estimates_is_not_asked_for_any(dataset, tmp_path):
    """Question and answer agree on whether there is an IoU."""
    for with_iou in (True, False):
        folder = tmp_path / str(with_iou)
        export_sft(dataset, folder, "llava", with_iou=with_iou)
        for record in json.loads((folder / "llava.json").read_text()):
            question, answer = (turn["value"] for turn in record["conversations"])
            assert ("IoU" in question) == ("Current IOU" in question) == with_iou
            assert answer.startswith("Current IOU") == with_iou
