"""Released STAMP layouts, written with the stock class and with peft itself, against what this library makes of them."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mmseg_llm.backbones.adapters import Lora, Trainable
from mmseg_llm.backbones.qwen_vl import QwenVLBackbone
from mmseg_llm.heads import AllMaskHead, MaskDecoderHead
from mmseg_llm.heads.all_mask.answering import open_images
from mmseg_llm.heads.all_mask.prompts import MASK
from mmseg_llm.inference import Perceiver
from mmseg_llm.model import PerceptionModel
from mmseg_llm.zoo import convert_stamp, load_stamp, state_dict_stamp
from zoo.stamp_folders import (
    BASE_TOKENS,
    PIXELS,
    ROWS,
    TOKENS,
    WIDTH,
    compare,
    edit,
    sample,
    save_config,
    save_tokenizer,
    stock_model,
    write_adapter,
    write_full,
)

# ---- full models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_model(tmp_path, tied, dtype, sharded):
    """Every weight arrives, bit for bit, gives what the stock class gives, and goes back under its official name."""
    kind = getattr(torch, dtype)
    stock, state = write_full(tmp_path, tied=tied, dtype=kind, sharded=sharded)
    ours = load_stamp(tmp_path, dtype=dtype, **PIXELS)
    assert not ours.training and list(ours.heads) == ["all_mask"]
    assert {p.dtype for p in ours.parameters()} == {kind} and ours.num_added_tokens == 0
    assert (ours.backbone.lm_head.weight is ours.backbone.model.get_input_embeddings().weight) == tied
    back = state_dict_stamp(ours)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) and back[name].dtype == value.dtype for name, value in state.items())
    z = (state["classifier.weight"], state["classifier.bias"])
    if dtype == "bfloat16":  # rotary frequencies of a stock model that was loaded in this type stay float32
        stock = type(stock).from_pretrained(tmp_path, dtype=kind).eval()
        assert ours.backbone.language_model.rotary_emb.inv_freq.dtype == torch.float32
    errors = compare(ours, stock, z)
    assert max(errors) < (2e-5 if dtype == "float32" else 0.1)


def test_full_model_defaults(tmp_path):
    """STAMP's own pixel bounds, its rule for labels, and ids of the tokens behind the base vocabulary."""
    write_full(tmp_path)
    ours = load_stamp(str(tmp_path), mask_attention="causal", upsampling="nearest")
    geometry, head = ours.backbone.codec.geometry, ours.head()
    assert (geometry.min_pixels, geometry.max_pixels) == (802816, 1003520)
    assert (head.label_rule, head.upsampling, head.is_bidirectional) == ("centre_strict", "nearest", False)
    assert (head.seg_id, head.mask_id) == (BASE_TOKENS, BASE_TOKENS + 1)
    assert ours.backbone.codec.token_id(MASK) == BASE_TOKENS + 1
    assert load_stamp(tmp_path).head().upsampling == "bilinear"


def test_full_model_lm_head_apart_from_tied_embeddings(tmp_path):
    """A config that says tied over weights that differ: both are kept, and the run folder keeps them too."""
    stock = stock_model(ROWS, False)
    write_full(tmp_path / "in", tied=False, model=stock)
    save_config(tmp_path / "in", stock, True)
    ours = load_stamp(tmp_path / "in", **PIXELS)
    assert torch.equal(ours.backbone.lm_head.weight, stock.lm_head.weight)
    again = Perceiver.from_pretrained(convert_stamp(tmp_path / "in", tmp_path / "out", **PIXELS), device="cpu").model
    assert torch.equal(again.backbone.lm_head.weight, stock.lm_head.weight)
    assert torch.equal(again.backbone.model.get_input_embeddings().weight, stock.get_input_embeddings().weight)


def test_round_trip_of_a_model_made_here(tmp_path):
    """Official names of a model of this library, written to a file, are a full checkpoint again."""
    write_full(tmp_path / "one", tied=False)
    ours = load_stamp(tmp_path / "one", **PIXELS)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.01)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    save_file(state_dict_stamp(ours), tmp_path / "two" / "model.safetensors", metadata={"format": "pt"})
    again = load_stamp(tmp_path / "two", **PIXELS)
    wanted = ours.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_round_trip_of_adapters_made_here(tmp_path, tied):
    """LoRA and the rows of new tokens, as the 7B recipe trains them here, are merged on the way out."""
    write_full(tmp_path, tied=tied)
    frozen = Trainable(vision=False, projector=False, language=False, embeddings=False)
    backbone = QwenVLBackbone(
        str(tmp_path),
        min_pixels=PIXELS["min_pixels"],
        max_pixels=PIXELS["max_pixels"],
        lora=Lora(rank=4, alpha=8, rank_stabilized=True),
        trainable=frozen,
    )
    ours = PerceptionModel(backbone, {"all_mask": AllMaskHead()}).eval()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lora_" in name or "delta" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    before = load_stamp(tmp_path, **PIXELS)
    save_file(state_dict_stamp(ours), tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = load_stamp(tmp_path, **PIXELS)
    a, b, c = (model.predict([sample()], protocol="force_segment")[0].mask_logits for model in (ours, again, before))
    assert np.abs(a - b).max() < 2e-5 and np.abs(a - c).max() > 0.1
    ids = torch.arange(ROWS)[None]
    outs = [model.backbone.model(input_ids=ids).logits for model in (ours, again)]
    assert (outs[0] - outs[1]).abs().max() < 2e-5


# ---- adapters ---------------------------------------------------------------------------------------------------------


def check_adapter(ours, wrapped) -> None:
    inner = wrapped.base_model.model
    z = (inner.classifier.modules_to_save["default"].weight, inner.classifier.modules_to_save["default"].bias)
    ours_z = ours.head().classifier
    assert torch.equal(ours_z.weight, z[0]) and torch.equal(ours_z.bias, z[1])
    assert ours.backbone.model.get_input_embeddings().weight.shape == (ROWS, WIDTH)
    assert not any("lora" in name for name, _ in ours.named_parameters())
    errors = compare(ours, inner, [value.detach() for value in z])
    assert max(errors) < 2e-5


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("tokenizer", [True, False], ids=["own_tokenizer", "base_tokenizer"])
def test_adapter(tmp_path, tied, tokenizer):
    """The merged model computes what peft computes with the adapter attached."""
    wrapped = write_adapter(tmp_path / "lora", tmp_path / "base", tied=tied, tokenizer=tokenizer)
    keys = load_file(tmp_path / "lora" / "adapter_model.safetensors").keys()
    assert "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight" in keys
    assert "base_model.model.classifier.bias" in keys
    ours = load_stamp(tmp_path / "lora", **PIXELS)
    check_adapter(ours, wrapped)
    again = Perceiver.from_pretrained(convert_stamp(tmp_path / "lora", tmp_path / "out", **PIXELS), device="cpu").model
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in ours.state_dict().items())


def test_adapter_without_rslora_and_with_another_base(tmp_path):
    """The scale is that of the config, the base that of the caller."""
    wrapped = write_adapter(tmp_path / "lora", tmp_path / "base", rslora=False)
    shutil.move(tmp_path / "base", tmp_path / "moved")
    with pytest.raises(ValueError, match=r"the base that .* names is not there .*; give it as `base`"):
        load_stamp(tmp_path / "lora", **PIXELS)
    check_adapter(load_stamp(tmp_path / "lora", base=tmp_path / "moved", **PIXELS), wrapped)


@pytest.mark.parametrize("plain", [True, False], ids=["beside_plain", "alone"])
def test_adapter_with_copies(tmp_path, plain):
    """PEFT's second copies give way to the plain names; `original_module` is never taken."""
    wrapped = write_adapter(tmp_path / "lora", tmp_path / "base")

    def copies(state):
        for part in ("model.language_model.embed_tokens.", "lm_head.", "classifier."):
            stem = f"base_model.model.{part}"
            for key in [key for key in state if key.startswith(stem)]:
                leaf = key.removeprefix(stem)
                state[f"{stem}original_module.{leaf}"] = torch.full_like(state[key], 7)
                state[f"{stem}modules_to_save.{leaf}"] = torch.full_like(state[key], 9) if plain else state.pop(key)

    edit(tmp_path / "lora", copies, "adapter_model.safetensors")
    check_adapter(load_stamp(tmp_path / "lora", **PIXELS), wrapped)


def test_adapter_in_bfloat16(tmp_path):
    """Updates are added in float32 and rounded once."""
    write_adapter(tmp_path / "lora", tmp_path / "base")
    ours = load_stamp(tmp_path / "lora", dtype="bfloat16", **PIXELS)
    base = load_file(tmp_path / "base" / "model.safetensors")["model.layers.1.mlp.up_proj.weight"].bfloat16()
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    up, down = (
        stored[f"base_model.model.model.language_model.layers.1.mlp.up_proj.lora_{part}.weight"] for part in "BA"
    )
    wanted = (base.float() + 8 / math.sqrt(4) * up @ down).bfloat16()
    assert torch.equal(ours.backbone.language_model.layers[1].mlp.up_proj.weight, wanted)
    assert ours.head().classifier.weight.dtype == torch.bfloat16


# ---- run folders and the hub ------------------------------------------------------------------------------------------


def make_responsive(folder) -> None:
    """Change weights of a full model so that it answers with the trigger and its masks are neither empty nor full."""
    model, item = load_stamp(folder, **PIXELS), sample()
    codec, head = model.backbone.codec, model.head("all_mask")
    with torch.no_grad():
        prefix, _ = open_images(head, model.backbone, [item])
        suffixes = [[codec.question(head.prompts.questions[0].replace("{x}", query.text)) for query in item.queries]]
        states = model.backbone.generate(prefix, suffixes, max_new_tokens=1).states[0]
        model.backbone.lm_head.weight[head.seg_id] = torch.stack([state[0] for state in states]).mean(0)
        logits = model.predict([item])[0].mask_logits
        head.classifier.bias -= float(np.median(logits))
    save_file(state_dict_stamp(model), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_convert(tmp_path, tied):
    """A converted folder predicts what the checkpoint predicts, by the ordinary door."""
    write_full(tmp_path / "in", tied=tied)
    make_responsive(tmp_path / "in")
    before = load_stamp(tmp_path / "in", **PIXELS)
    out = convert_stamp(tmp_path / "in", tmp_path / "out", **PIXELS)
    perceiver = Perceiver.from_pretrained(str(out), device="cpu")
    after = perceiver.model
    state = load_file(tmp_path / "in" / "model.safetensors")
    assert all(torch.equal(value, state_dict_stamp(after)[name]) for name, value in state.items())
    assert after.backbone.codec.geometry == before.backbone.codec.geometry
    assert after.head().max_new_tokens == 4 and after.head().label_rule == "centre_strict"
    found = perceiver.predict(sample().image, ["word3", "word7"])
    for a, b in zip(before.predict([sample()]), found, strict=True):
        assert a.text == b.text == "<|seg|>" and 0 < a.mask.area < 60 * 88
        assert np.array_equal(a.mask.array, b.mask.array) and np.array_equal(a.mask_logits, b.mask_logits)
    with pytest.raises(ValueError, match=r"already holds a config.yaml; choose another output"):
        convert_stamp(tmp_path / "in", out)


def test_hub_ids(tmp_path, monkeypatch):
    """Adapter and base are fetched by id; what cannot be fetched is said in one sentence."""
    import huggingface_hub

    wrapped = write_adapter(tmp_path / "lora", tmp_path / "base")
    asked = []

    def snapshot(name, allow_patterns):
        asked.append(name)
        if not (tmp_path / name.split("/")[1]).is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError("offline")
        return str(tmp_path / name.split("/")[1])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    check_adapter(load_stamp("JiaZL/lora", base="Qwen/base", **PIXELS), wrapped)
    assert asked == ["JiaZL/lora", "Qwen/base"]
    with pytest.raises(ValueError, match=r"'JiaZL/other' cannot be fetched from the hub \(LocalEntryNotFoundError\)"):
        load_stamp("JiaZL/other")
    with pytest.raises(ValueError, match=r"no folder './nowhere', and it is no hub id"):
        load_stamp("./nowhere")


# ---- what is refused --------------------------------------------------------------------------------------------------


def drop(*names):
    return lambda state: [state.pop(name) for name in names]


def put(**values):
    return lambda state: state.update({name.replace("__", "."): value for name, value in values.items()})


FULL_FAULTS = {
    "no_classifier": (
        drop("classifier.weight", "classifier.bias"),
        "lack classifier.weight, classifier.bias; give a folder",
    ),
    "no_bias": (drop("classifier.bias"), "lack classifier.bias; give a folder with all files"),
    "missing": (
        drop("model.layers.1.mlp.up_proj.weight"),
        r"1 missing keys \(model.language_model.layers.1.mlp.up_proj",
    ),
    "no_norm_in_tower": (drop("visual.merger.ln_q.bias"), r"1 missing keys \(model.visual.merger.ln_q.bias"),
    "unexpected": (
        put(model__extra__weight=torch.ones(1)),
        "hold model.extra.weight, which this model has no place for",
    ),
    "width": (
        put(classifier__weight=torch.ones(1, 48)),
        r"has the shapes \(1, 48\) and \(1,\) where .* of width 64 needs",
    ),
    "classes": (put(classifier__weight=torch.ones(3, WIDTH)), r"has the shapes \(3, 64\) and"),
    "rows": (put(model__embed_tokens__weight=torch.ones(120, WIDTH)), "do not fit the model"),
}


@pytest.mark.parametrize("fault", FULL_FAULTS)
def test_full_model_faults(tmp_path, fault):
    """Weights that are missing, too many or of another shape."""
    change, message = FULL_FAULTS[fault]
    write_full(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        load_stamp(tmp_path, **PIXELS)


def test_folder_faults(tmp_path):
    """Folders that are no checkpoint, or not all of one."""
    with pytest.raises(
        ValueError, match=r"is no STAMP checkpoint: it has neither config.json .* nor adapter_config.json"
    ):
        load_stamp(tmp_path)
    _, state = write_full(tmp_path, sharded=True)
    with pytest.raises(ValueError, match="is a full model, which needs no base; leave `base` out"):
        load_stamp(tmp_path, base=tmp_path)
    shard = tmp_path / "model-00002-of-00003.safetensors"
    shard.unlink()
    with pytest.raises(ValueError, match=r"has no model-00002-of-00003.safetensors; download all weight files"):
        load_stamp(tmp_path)
    shard.write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match=r"model-00002-of-00003.safetensors is damaged \(.*\); download it again"):
        load_stamp(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"has no model.safetensors and no model.safetensors.index.json; download"):
        load_stamp(tmp_path)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="holds a model of type 'llama'"):
        load_stamp(tmp_path)


def test_vocabulary_faults(tmp_path):
    """Tokenizers that are not the checkpoint's."""
    write_full(tmp_path)
    save_tokenizer(tmp_path, added=TOKENS[1:])
    with pytest.raises(
        ValueError, match=r"the tokenizer of .* has no <\|seg\|>; use the tokenizer that was saved with"
    ):
        load_stamp(tmp_path, **PIXELS)
    save_tokenizer(tmp_path, added=("a", "b", "c", *TOKENS))
    with pytest.raises(
        ValueError, match="has 134 tokens and control tokens up to id 133, the embeddings have 131 rows"
    ):
        load_stamp(tmp_path, **PIXELS)
    save_tokenizer(tmp_path, added=(*TOKENS, "a"))
    with pytest.raises(
        ValueError, match="has 132 tokens and control tokens up to id 130, the embeddings have 131 rows"
    ):
        load_stamp(tmp_path, **PIXELS)


LORA = "base_model.model.model.language_model.layers.1.self_attn.k_proj.lora_"
ADAPTER_FAULTS = {
    "missing": (drop(f"{LORA}A.weight"), "lack model.layers.1.self_attn.k_proj.lora_A.weight; give a folder"),
    "no_classifier": (drop("base_model.model.classifier.bias"), "lack classifier.bias; give a folder"),
    "no_lm_head": (drop("base_model.model.lm_head.weight"), "lack lm_head.weight; give a folder"),
    "no_embeddings": (
        drop("base_model.model.model.language_model.embed_tokens.weight"),
        "lack model.embed_tokens.weight; give a folder",
    ),
    "unexpected": (
        put(base_model__model__model__visual__merger__mlp__0__lora_A__weight=torch.ones(1)),
        "hold visual.merger.mlp.0.lora_A.weight, which this model has no place for; use the config and the base",
    ),
    "width": (
        put(base_model__model__classifier__weight=torch.ones(1, 48)),
        r"the classifier in .* has the shapes \(1, 48\)",
    ),
    "rank": (
        lambda state: state.update({f"{LORA}A.weight": torch.ones(3, WIDTH)}),
        r"k_proj in .* has the shapes \(3, 64\) and \(32, 4\) where the base and rank 4 give \(4, 64\) and \(32, 4\)",
    ),
    "rows": (
        put(base_model__model__lm_head__weight=torch.ones(130, WIDTH)),
        r"lm_head.weight of the adapter in .* has the shape \(130, 64\) .* with 131 tokens .* gives \(131, 64\); give the base",
    ),
}


@pytest.fixture(scope="module")
def adapter_folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    write_adapter(folder / "lora", folder / "base")
    return folder


@pytest.fixture
def adapter(adapter_folders, tmp_path):
    """A copy to spoil."""
    shutil.copytree(adapter_folders / "lora", tmp_path / "lora")
    return tmp_path / "lora"


@pytest.mark.parametrize("fault", ADAPTER_FAULTS)
def test_adapter_faults(adapter, fault):
    """Weights of an adapter that are missing, too many or of another shape."""
    change, message = ADAPTER_FAULTS[fault]
    edit(adapter, change, "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_stamp(adapter, **PIXELS)


CONFIG_FAULTS = {
    "r": (None, "adapter_config.json has no r; download"),
    "peft_type": ("IA3", "has peft_type = 'IA3', which is not merged here; merge it with peft"),
    "use_dora": (True, "has use_dora = True, which is not merged here"),
    "rank_pattern": ({"q_proj": 2}, "has rank_pattern = .* which is not merged here"),
    "init_lora_weights": ("pissa", "has init_lora_weights = 'pissa'"),
    "target_modules": (["other"], r"the targets \('other',\) of .* match no layer of the base"),
    "base_model_name_or_path": (None, "names no base; give it as `base`"),
}


@pytest.mark.parametrize("name", CONFIG_FAULTS)
def test_adapter_config_faults(adapter, name):
    """Settings that are missing or mean something else than plain LoRA."""
    value, message = CONFIG_FAULTS[name]
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(ValueError, match=message):
        load_stamp(adapter, **PIXELS)


def test_adapter_targets_as_pattern(adapter, adapter_folders):
    """PEFT also takes a pattern over full names."""
    path = adapter / "adapter_config.json"
    pattern = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": pattern}))
    one, two = (load_stamp(folder, **PIXELS).state_dict() for folder in (adapter, adapter_folders / "lora"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_adapter_vocabulary_faults(adapter):
    """The tokenizer of an adapter must be that of its base with the four tokens, one row each."""
    save_tokenizer(adapter, count=BASE_TOKENS - 1)
    with pytest.raises(ValueError, match=r"gives 'word120' another id than that of the base; give the base"):
        load_stamp(adapter, **PIXELS)
    save_tokenizer(adapter, added=(*TOKENS, "a"))
    with pytest.raises(
        ValueError, match=r"model.embed_tokens.weight of .* \(131, 64\) .* with 132 tokens .* \(132, 64\)"
    ):
        load_stamp(adapter, **PIXELS)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"has no adapter_model.safetensors; download it, or save the adapter as safetensors"
    ):
        load_stamp(adapter, **PIXELS)


def test_state_dict_faults(tmp_path):
    """What the official code has no place for."""

    def build(head):
        return PerceptionModel(QwenVLBackbone("qwen2_vl-tiny", weights="random"), {"all_mask": head})

    with pytest.raises(ValueError, match="STAMP's classifier has one output per image token"):
        state_dict_stamp(build(AllMaskHead(num_classes=3)))
    with pytest.raises(ValueError, match="a model of type 'qwen2_vl' with the heads all_mask is no STAMP"):
        state_dict_stamp(build(MaskDecoderHead(width=32)))
