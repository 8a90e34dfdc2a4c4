"""DepthLM checkpoints in the layouts they are published in, the run folders made of them, and folders for plain transformers."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from mmseg_llm.backbones.adapters import Lora, Trainable
from mmseg_llm.backbones.pixtral import PixtralBackbone
from mmseg_llm.cameras import Camera
from mmseg_llm.heads import DepthTextHead
from mmseg_llm.heads.depth_text.prompts import DepthPrompts
from mmseg_llm.inference import Perceiver
from mmseg_llm.model import PerceptionModel
from mmseg_llm.quantities import DepthPoint
from mmseg_llm.structures import Query, Sample
from mmseg_llm.training.checkpoint import build_model, load_model, save_run
from mmseg_llm.verbs import convert
from mmseg_llm.zoo.depthlm import (
    DEPTHLM_FILE,
    PRESETS,
    DepthLMSettings,
    convert_depthlm,
    export_depthlm,
    load_depthlm,
)
from zoo.depthlm_folders import write_json, write_pixtral, write_qwen, write_qwen3

MARKED = (
    "Given this image, how far is the point pointed by the red arrow from the camera? Output the thinking process in <think> "
    "</think> and final answer (the meter number only, without the unit) in <answer> </answer> tags."
)
LOCATED = (
    "Given this image, how far is the point at coordinates ({}, {}) from the camera? The coordinates are in normalised [0, 2000] "
    "format relative to image width and height. Output the thinking process in <think> </think> and final answer (the meter "
    "number only, without the unit) in <answer> </answer> tags."
)
ANSWER = "<think> The point is around 2.50 meters away from the camera. </think>\n\n<answer> 2.50 </answer>"
LONG = {"max_new_tokens": 80}  # the tiny tokenizer cuts words into more pieces than those of the released models
QWEN = {"reference": "marker", "focal": 1000.0}  # of the 3B and 7B, which are not released
KINDS = {
    "pixtral": (write_pixtral, PRESETS["facebook/DepthLM"], "facebook/DepthLM"),
    "qwen2_5_vl": (write_qwen, DepthLMSettings.from_json(QWEN), None),
    "qwen3_vl": (write_qwen3, PRESETS["facebook/VLM3-depth"], "facebook/VLM3-depth"),
}


def sample(focal: float, size=(70, 90)) -> Sample:
    """A picture that hardly changes at the unified focal length, with two labelled points."""
    picture = np.random.default_rng(3).integers(0, 256, (*size, 3), dtype=np.uint8)
    camera = Camera(focal, focal, 44.0, 36.0, distance="ray")
    queries = tuple(
        Query("", points=(DepthPoint(x, y, 2.5),), task="depth", id=f"{x}-{y}") for x, y in ((30, 20), (71, 55))
    )
    return Sample(Image.fromarray(picture), size, queries, camera=camera, id="noise", source="test")


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def checkpoint(kind, tmp_path_factory):
    """A folder as others write it, and the model it was written from; with settings where no preset has them."""
    write, _, preset = KINDS[kind]
    folder = tmp_path_factory.mktemp(kind)
    written = write(folder, "bfloat16")
    if preset is None:
        write_json(folder, depthlm_config=QWEN)
    return folder, written


@pytest.fixture(scope="module")
def run(kind, checkpoint, tmp_path_factory):
    return convert_depthlm(checkpoint[0], tmp_path_factory.mktemp("run") / "out", preset=KINDS[kind][2], **LONG)


def test_run_folder(kind, checkpoint, run):
    """Every weight bit for bit, in its storage type, behind the ordinary door; the settings of the head are named."""
    folder, written = checkpoint
    model, expected = load_model(run), KINDS[kind][1]
    state = model.backbone.state_dict()
    assert state.keys() == written.state_dict().keys() and model.num_added_tokens == 0
    assert all(torch.equal(state[name], value) for name, value in written.state_dict().items())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16} and not model.training
    assert model.backbone.language_model.rotary_emb.inv_freq.dtype == torch.float32
    settings = yaml.safe_load((run / "config.yaml").read_text())["model"]
    bounds = {"max_side": 192} if kind == "pixtral" else {"min_pixels": 4096, "max_pixels": 9216}
    bounds = {"min_pixels": 144, "max_pixels": 57600} if kind == "qwen3_vl" else bounds
    assert settings["backbone"] == {
        "class_path": f"mmseg_llm.backbones.{'PixtralBackbone' if kind == 'pixtral' else 'QwenVLBackbone'}",
        "init_args": {"source": str(folder), "dtype": "bfloat16", "attention": "sdpa", **bounds},
    }
    assert list(settings["heads"]) == ["depth_text"]
    assert settings["heads"]["depth_text"]["class_path"] == "mmseg_llm.heads.DepthTextHead"
    arguments = settings["heads"]["depth_text"]["init_args"]
    assert arguments == expected.arguments() | LONG
    assert (arguments["geometry"], arguments["distance"]) == ("legacy", "unspecified")
    assert arguments["prompts"] == {"wording": "full", "thinking": True, "decimals": 2, "digits": 3}
    assert DepthLMSettings.of(model.head("depth_text")) == expected and not list(model.heads.parameters())


def test_words(kind, run):
    """Question and answer to the letter (specification C.1, C.2, C.4), in the turns of the family (C.3)."""
    model, focal = load_model(run), KINDS[kind][1].focal
    example = model.head().build(sample(focal), model.backbone.codec, np.random.default_rng(0))
    codec = model.backbone.codec
    text = codec.tokenizer.decode([*example.prefix, *example.suffixes[0].ids])
    point = np.array([(30, 20), (71, 55)][example.suffixes[0].query_ids[0]]) / (90, 70) * 2000
    question = MARKED if kind != "qwen3_vl" else LOCATED.format(*point.astype(int))
    if kind == "pixtral":
        image = (("[IMG]" * 8 + "[IMG_BREAK]") * 6).removesuffix("[IMG_BREAK]") + "[IMG_END]"
        assert text == f"<s>[INST]{image}{question}[/INST]{ANSWER}</s>"
        return
    image = f"<|vision_start|>{'<|image_pad|>' * 48}<|vision_end|>"
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" if kind == "qwen2_5_vl" else ""
    turns = f"<|im_start|>user\n{image}{question}<|im_end|>\n<|im_start|>assistant\n{ANSWER}<|im_end|>\n"
    assert text == system + turns


def test_the_folder_predicts_what_the_checkpoint_predicts(kind, checkpoint, tmp_path):
    """Numbers of two points, by either door."""
    preset, item = KINDS[kind][2], sample(KINDS[kind][1].focal)
    before = load_depthlm(checkpoint[0], preset=preset, dtype="float32", **LONG).predict([item])
    out = convert_depthlm(checkpoint[0], tmp_path / "out", preset=preset, dtype="float32", **LONG)
    found = Perceiver.from_pretrained(out, device="cpu").model.predict([item])
    assert len(found) == 2
    for ours, theirs in zip(found, before, strict=True):
        assert ours.measurement == theirs.measurement and ours.text == theirs.text
        assert ours.measurement.value > 0 and ours.measurement.distance == "unspecified"


@torch.no_grad()
def test_answers_are_those_of_the_stock_pipeline(tmp_path):
    """By hand, stage by stage (specification L.1): geometry, arrow, processor, token ids, greedy text."""
    from transformers import LlavaForConditionalGeneration

    write_pixtral(tmp_path)
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    model = load_depthlm(tmp_path, preset="facebook/DepthLM", dtype="float32", **LONG)
    codec, item = model.backbone.codec, sample(650.0)
    model.head().max_new_tokens = 12
    found = model.predict([item], protocol="official")
    processor = PixtralImageProcessorPil(patch_size={"height": 12, "width": 12}, size={"longest_edge": 192})
    scale = 750.0 / 650.0
    for prediction, (x, y) in zip(found, ((30, 20), (71, 55)), strict=True):
        unified = item.image.resize((int(90 * scale), int(70 * scale)))
        at = (int(x * scale), int(y * scale))
        for dx, dy in [(-k, 0) for k in range(1, 6)] + [(-2, -1), (-2, 1), (-3, -2), (-3, 2)]:
            unified.putpixel((at[0] + dx, at[1] + dy), (255, 0, 0))
        inputs = processor(unified, return_tensors="np")
        assert inputs["pixel_values"].shape == (1, 3, 84, 108)
        rows = ("[IMG]" * 9 + "[IMG_BREAK]") * 7
        prompt = f"<s>[INST]{rows.removesuffix('[IMG_BREAK]')}[IMG_END]{MARKED}[/INST]"
        ids = torch.tensor([codec.tokenizer.encode(prompt, add_special_tokens=False)])
        said = stock.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=torch.from_numpy(inputs["pixel_values"]),
            image_sizes=torch.tensor([[84, 108]]),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=codec.end_id,
            pad_token_id=codec.pad_id,
        )[0, ids.shape[1] :]
        assert prediction.text == codec.decode(said.tolist()) and len(said) == 12


# ---- back to plain transformers ---------------------------------------------------------------------------------------


def test_round_trip(kind, checkpoint, run, tmp_path):
    """Plain transformers loads what comes back, bit for bit under the names it had, and so does this library without a preset."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    folder, written = checkpoint
    out = export_depthlm(run, tmp_path / "out")
    files = [
        {name: value for file in sorted(path.glob("*.safetensors")) for name, value in load_file(file).items()}
        for path in (folder, out)
    ]
    assert files[0].keys() == files[1].keys() and not any("backbone" in name for name in files[1])
    assert all(torch.equal(files[1][name], value) and value.dtype == torch.bfloat16 for name, value in files[0].items())
    model, info = AutoModelForImageTextToText.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.dtype == torch.bfloat16
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in written.model.state_dict().items())
    assert AutoTokenizer.from_pretrained(out).get_vocab() == written.codec.tokenizer.get_vocab()
    assert DepthLMSettings.from_json(json.loads((out / DEPTHLM_FILE).read_text())) == KINDS[kind][1]
    again = load_depthlm(out, **LONG)
    assert DepthLMSettings.of(again.head()) == KINDS[kind][1]
    geometry = load_model(run).backbone.codec.geometry
    assert again.backbone.codec.geometry == geometry
    ours = again.backbone.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in written.state_dict().items())


def test_exported_processor_sees_what_we_see(tmp_path):
    """The one processor that transformers builds of an exported Pixtral folder, pixels aside its backend's rounding."""
    from transformers import AutoProcessor

    write_pixtral(tmp_path / "in")
    run = convert_depthlm(tmp_path / "in", tmp_path / "run", preset="facebook/DepthLM", **LONG)
    out = export_depthlm(run, tmp_path / "out")
    processor = AutoProcessor.from_pretrained(out)
    backbone = PixtralBackbone(str(out))
    image = sample(750).image.resize((260, 120))
    found = processor(text="<s>[INST][IMG]how far?[/INST]", images=image, return_tensors="np")
    canvas = backbone.codec.geometry.canvas_size((120, 260))
    ids = backbone.codec.image_prefix(canvas) + backbone.codec.question("how far?")
    assert max(canvas) == 192 and tuple(found["input_ids"][0]) == ids
    assert found["pixel_values"].shape == (1, 3, *canvas)


def test_adapters_are_merged(tmp_path):
    """A run that trained LoRA and the rows of a new token leaves as plain weights that answer the same."""
    from transformers import AutoModelForImageTextToText

    frozen = Trainable(vision=False, projector=False, language=False, embeddings=False)
    settings = DepthLMSettings("text", 700.0, geometry="clean", distance="planar", wording="short", thinking=False)
    arguments = {"source": "pixtral-tiny", "max_side": 120}
    trained = {
        "lora": {"rank": 2, "alpha": 4},
        "trainable": asdict(frozen),
    }
    torch.manual_seed(0)
    backbone = PixtralBackbone(**arguments, lora=Lora(rank=2, alpha=4), trainable=frozen)
    model = PerceptionModel(backbone, {"metres": settings.build()}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    head = {"class_path": "mmseg_llm.heads.DepthTextHead", "init_args": settings.arguments()}
    described = {"class_path": "mmseg_llm.backbones.PixtralBackbone", "init_args": arguments | trained}
    run = save_run(model, tmp_path / "run", {"backbone": described, "heads": {"metres": head}})
    out = export_depthlm(run, tmp_path / "out")
    _, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    again = load_depthlm(out, dtype="float32")
    assert DepthLMSettings.of(again.head()) == settings and not any("lora" in n for n, _ in again.named_parameters())
    ids = torch.arange(60)[None]
    with torch.no_grad():
        plain = PixtralBackbone(**arguments).model(input_ids=ids).logits
        logits = [m.backbone.model(input_ids=ids).logits for m in (model, again)]
    assert (logits[0] - logits[1]).abs().max() < 2e-5 and (logits[0] - plain).abs().max() > 0.1


# ---- settings ---------------------------------------------------------------------------------------------------------


def test_presets():
    """Specification A, B.1, C and J.6."""
    assert PRESETS.keys() == {"facebook/DepthLM", "facebook/VLM3-depth"}
    pixtral, qwen = PRESETS.values()
    assert (pixtral.reference, pixtral.focal, pixtral.marker_size) == ("marker", 750, 5)
    assert (qwen.reference, qwen.focal, qwen.cells) == ("text", 1000, 2000)
    for preset in PRESETS.values():
        assert (preset.geometry, preset.distance, preset.decimals) == ("legacy", "unspecified", 2)
        assert preset.thinking and preset.wording == "full"
        assert DepthLMSettings.of(preset.build()) == preset


def test_settings_keep_what_a_head_has():
    head = DepthTextHead(
        reference="marker",
        focal=600,
        geometry="clean",
        distance="ray",
        marker_size=7,
        prompts=DepthPrompts("short", thinking=False, decimals=1, digits=2),
    )
    settings = DepthLMSettings.of(head)
    assert settings == DepthLMSettings("marker", 600, "clean", "ray", "short", False, 1, 2, 7)
    assert DepthLMSettings.of(DepthTextHead(cells=100)).cells == 100
    assert DepthLMSettings.of(settings.build()) == settings


def test_which_settings_count(tmp_path, monkeypatch):
    """A named preset before the file, the file before the name of the source."""
    write_pixtral(tmp_path / "in")
    shutil.copytree(tmp_path / "in", tmp_path / "named")
    write_json(tmp_path / "named", depthlm_config={"reference": "text", "focal": 500, "cells": 100})
    assert DepthLMSettings.of(load_depthlm(tmp_path / "named", **LONG).head()) == DepthLMSettings(
        "text", 500, cells=100
    )
    named = load_depthlm(tmp_path / "named", preset="facebook/VLM3-depth", **LONG).head()
    assert DepthLMSettings.of(named) == PRESETS["facebook/VLM3-depth"]
    for folder, focal in (("in", 750), ("named", 500)):  # as the hub would be asked
        monkeypatch.setattr("mmseg_llm.zoo.depthlm.fetch", lambda source, at=folder: tmp_path / at)
        assert load_depthlm("facebook/DepthLM", **LONG).head().focal == focal


def test_bounds_without_an_image_processor(tmp_path):
    """Those of the released processors, so that no picture is enlarged or shrunk."""
    write_qwen(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    write_json(tmp_path, depthlm_config=QWEN)
    geometry = load_depthlm(tmp_path, dtype="float32", **LONG).backbone.codec.geometry
    assert (geometry.min_pixels, geometry.max_pixels) == (4 * 144, 16384 * 144)
    assert geometry.canvas_size((70, 94)) == (72, 96)


SETTING_FAULTS = {
    "no_focal": ({"reference": "text"}, "has no focal; write down how the weights were trained"),
    "no_reference": ({"focal": 750}, "has no reference; write down"),
    "unknown": (QWEN | {"f_uni": 750}, "has a setting 'f_uni'; the ones that are known are reference, focal, geometry"),
    "choice": (QWEN | {"reference": "arrow"}, r"has reference = 'arrow'; it must be one of text, marker"),
    "wording": (QWEN | {"wording": "long"}, r"has wording = 'long'; it must be one of full, short"),
    "text": (QWEN | {"focal": "750"}, r"has focal = '750'; it must be of type float"),
    "truth": (QWEN | {"focal": True}, r"has focal = True; it must be of type float"),
    "fraction": (QWEN | {"decimals": 1.5}, r"has decimals = 1.5; it must be of type int"),
    "flag": (QWEN | {"thinking": 1}, r"has thinking = 1; it must be of type bool"),
    "range": (QWEN | {"focal": 0}, "focal is 0; it must be at least 1"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    write_pixtral(folder)
    return folder


@pytest.mark.parametrize("fault", SETTING_FAULTS)
def test_setting_faults(plain, tmp_path, fault):
    content, message = SETTING_FAULTS[fault]
    shutil.copytree(plain, tmp_path / "in")
    write_json(tmp_path / "in", depthlm_config=content)
    with pytest.raises(ValueError, match=message):
        convert_depthlm(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_faults(plain, run, tmp_path):
    """What is wrong is said before anything is written, and nothing is overwritten."""
    with pytest.raises(
        ValueError, match=r"nothing says how the weights in .* name a preset \(facebook/DepthLM, facebook"
    ):
        convert_depthlm(plain, tmp_path / "out")
    with pytest.raises(ValueError, match=r"unknown preset 'DepthLM'; use one of facebook/DepthLM, facebook/VLM3-depth"):
        convert_depthlm(plain, tmp_path / "out", preset="DepthLM")
    with pytest.raises(ValueError, match=r"no folder 'nowhere', and it is no hub id"):
        convert_depthlm("nowhere", tmp_path / "out")
    shutil.copytree(plain, tmp_path / "qwen2_5_vl-DepthLM")  # names of folders say nothing
    write_json(tmp_path / "qwen2_5_vl-DepthLM", config={"model_type": "qwen2_vl"})
    with pytest.raises(ValueError, match=r"of type 'qwen2_vl'; this backbone reads llava, qwen2_5_vl, qwen3_vl"):
        convert_depthlm(tmp_path / "qwen2_5_vl-DepthLM", tmp_path / "out", preset="facebook/DepthLM")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"out already holds a config.yaml; choose another output folder"):
        convert_depthlm(plain, run, preset="facebook/DepthLM")
    with pytest.raises(ValueError, match=r"already holds a config.json; choose another output folder"):
        export_depthlm(run, plain)


@pytest.mark.parametrize(
    ("source", "name", "settings", "message"),
    [
        (
            "qwen3_vl-tiny",
            "AllMaskHead",
            {},
            "has the heads other on a QwenVLBackbone of type 'qwen3_vl'; DepthLM is a depth",
        ),
        (
            "qwen2_vl-tiny",
            "DepthTextHead",
            {"max_new_tokens": 80},
            "on a QwenVLBackbone of type 'qwen2_vl'; DepthLM is",
        ),
    ],
)
def test_other_runs_are_not_exported(source, name, settings, message, tmp_path):
    head = {"class_path": f"mmseg_llm.heads.{name}", "init_args": settings}
    described = {"class_path": "mmseg_llm.backbones.QwenVLBackbone", "init_args": {"source": source}}
    settings = {"backbone": described, "heads": {"other": head}}
    run = save_run(build_model(settings), tmp_path / "run", settings)
    with pytest.raises(ValueError, match=message):
        export_depthlm(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_verb(plain, tmp_path, capsys):
    convert.depthlm(source=str(plain), output=tmp_path / "out", preset="facebook/DepthLM", dtype="float32", **LONG)
    assert capsys.readouterr().out.endswith(f"written: {tmp_path / 'out'}\n")
    assert load_model(tmp_path / "out").head().focal == 750
