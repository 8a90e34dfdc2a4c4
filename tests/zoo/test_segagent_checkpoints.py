"""Released SegAgent weights, in the layout they are published in, and the run folders that are made of them."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
import yaml
from backbones.qwen_vl_chat_folders import PROMPT, TINY, random_state, write_folder
from PIL import Image

from mmseg_llm.backbones.qwen_vl_chat_layout import official_state
from mmseg_llm.geometry import stretch
from mmseg_llm.heads.all_mask.head import AllMaskHead
from mmseg_llm.inference import Perceiver
from mmseg_llm.structures import Query, Sample
from mmseg_llm.training.checkpoint import load_model
from mmseg_llm.zoo import convert_segagent, load_segagent
from mmseg_llm.zoo.segagent import HEADS

LONG = TINY | {"seq_length": 2048}
SPEED = {"max_clicks": 2, "environment": {"class_path": "mmseg_llm.segmenters.GrabCutEnvironment"}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """As mirrors hold it: bfloat16, several files, one folder deep."""
    folder = tmp_path_factory.mktemp("mirror")
    write_folder(folder / "SegAgent-Model", state=random_state(dtype=torch.bfloat16), parts=2, config=LONG)
    return folder


@pytest.fixture(scope="module")
def converted(checkpoint, tmp_path_factory):
    return convert_segagent(checkpoint, tmp_path_factory.mktemp("run") / "out")


def heads(**settings) -> dict:
    """The heads of a converted folder, with other settings beside theirs."""
    (name, head), *_ = HEADS.items()
    return {name: {"class_path": head["class_path"], "init_args": head["init_args"] | settings}}


def sample() -> Sample:
    picture = np.random.default_rng(3).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    picture[10:30, 20:45] //= 4
    return Sample(Image.fromarray(picture), (40, 60), (Query("the dark box"), Query("noise")), id="box")


def test_run_folder(checkpoint, converted):
    """Every weight bit for bit, in its storage type, behind the ordinary door; the settings of the head are named."""
    model = load_model(converted)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.backbone.language_model.rotary_emb.inv_freq.dtype == torch.float32
    back = official_state(model.backbone.model.state_dict(), 4)
    state = random_state(dtype=torch.bfloat16)
    assert back.keys() == state.keys() and all(torch.equal(back[key], value) for key, value in state.items())
    settings = yaml.safe_load((converted / "config.yaml").read_text())["model"]
    assert settings["heads"] == HEADS
    arguments = {"source": str(checkpoint), "dtype": "bfloat16", "attention": "sdpa"}
    assert settings["backbone"] == {
        "class_path": "mmseg_llm.backbones.QwenVlChatBackbone",
        "init_args": arguments,
    }
    codec = model.backbone.codec
    assert codec.context == 2048 and codec.token_id("<imgpad>") == model.backbone.model.config.image_token_id
    assert not (converted / "backbone" / "qwen.tiktoken").exists()  # a fast tokenizer is there in its place


def test_head(converted):
    """The wording and the codec of the released weights: (row, column) of a thousand, IoU in percent."""
    model = load_model(converted)
    head = model.head("click_policy")
    assert list(model.heads) == ["click_policy"] and not list(head.parameters()) and model.num_added_tokens == 0
    assert (head.codec.axis_order, head.codec.scale, head.codec.decimals, head.codec.iou_scale) == (
        "row_col",
        1000,
        0,
        100,
    )
    codec = model.backbone.codec
    ids = codec.image_prefix() + head.question("the dark box", codec)
    text = PROMPT.replace("{IMAGE}", "<imgpad>" * 256).replace("{CAPTION}", "the dark box")
    assert codec.tokenizer.decode(ids, skip_special_tokens=False) == text


def test_the_folder_predicts_what_the_checkpoint_predicts(checkpoint, tmp_path):
    """Episodes of clicks, text by text and mask by mask, one query by one or together."""
    chosen = heads(**SPEED)
    before = load_segagent(checkpoint, dtype="float32", heads=chosen)
    out = convert_segagent(checkpoint, tmp_path / "out", dtype="float32", heads=chosen)
    found = Perceiver.from_pretrained(out, device="cpu").predict(sample().image, ["the dark box", "noise"])
    wanted = before.predict([sample()])
    assert len(found) == len(wanted) == 2
    for ours, theirs in zip(found, wanted, strict=True):
        assert [(s.text, s.click, s.estimate) for s in ours.trajectory] == [
            (s.text, s.click, s.estimate) for s in theirs.trajectory
        ]
        assert theirs.trajectory[0].text.startswith("Current IOU: ") and theirs.trajectory[1].click is not None
        assert np.array_equal(ours.mask.array, theirs.mask.array)


def test_other_heads(checkpoint, tmp_path):
    """The weights carry other heads, too, which then need training."""
    other = {"masks": {"class_path": "mmseg_llm.heads.AllMaskHead", "init_args": {"max_new_tokens": 4}}}
    out = convert_segagent(checkpoint, tmp_path / "out", heads=other)
    model = load_model(out)
    assert isinstance(model.head(), AllMaskHead) and model.num_added_tokens == 0
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    loaded = load_segagent(checkpoint, heads=other)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16} and not loaded.training
    rows = model.backbone.lm_head.weight.shape[0]
    assert rows == TINY["vocab_size"]  # the new tokens take spare rows
    before = random_state(dtype=torch.bfloat16)["lm_head.weight"]
    assert torch.equal(model.backbone.lm_head.weight, before)
    canvas = stretch(sample().image, model.backbone.codec.geometry.image_size)
    assert model.backbone.codec.pixels(canvas).shape == (3, 160, 160)


def test_faults(checkpoint, converted, tmp_path):
    """No folder is overwritten, and what is wrong with the checkpoint is said before anything is written."""
    with pytest.raises(ValueError, match=r"out already holds a config.yaml; choose another output folder"):
        convert_segagent(checkpoint, converted)
    shutil.copytree(checkpoint, tmp_path / "in")
    (tmp_path / "in" / "SegAgent-Model" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model-00002-of-00002.safetensors, which .* names; download all"):
        convert_segagent(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"no folder 'nowhere', and it is no hub id"):
        convert_segagent("nowhere", tmp_path / "out")
