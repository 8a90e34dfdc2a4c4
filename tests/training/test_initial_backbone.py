"""Starting from the backbone of a run with other heads, and the learning-rate schedules."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmseg_llm.backbones import InternVLBackbone, QwenVLBackbone
from mmseg_llm.heads import AllMaskHead, MaskDecoderHead
from mmseg_llm.model import PerceptionModel
from mmseg_llm.training.checkpoint import find_weights, load_backbone, load_weights, save_weights
from mmseg_llm.training.module import Optimization, PerceptionModule


@pytest.fixture(scope="module")
def donor(tmp_path_factory):
    """A run with a mask decoder."""
    torch.manual_seed(1)
    model = PerceptionModel(InternVLBackbone(), {"mask_decoder": MaskDecoderHead(heads=4)})
    folder = tmp_path_factory.mktemp("donor")
    save_weights(model, folder)
    return model, folder


def test_the_backbone_comes_over_and_control_tokens_stay_fresh(donor):
    source, folder = donor
    torch.manual_seed(2)
    model = PerceptionModel(InternVLBackbone(), {"all_mask": AllMaskHead()})
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    load_backbone(model, find_weights(str(folder)))
    base = model.backbone.base_vocabulary
    assert base == 1024 and len(fresh["backbone.model.lm_head.weight"]) == base + 4
    for name, value in model.state_dict().items():
        theirs = source.state_dict().get(name)
        if not name.startswith("backbone."):
            assert torch.equal(value, fresh[name])
        elif "embed_tokens" in name or "lm_head" in name:
            assert torch.equal(value[:base], theirs[:base]) and torch.equal(value[base:], fresh[name][base:])
        else:
            assert torch.equal(value, theirs), name


def test_the_shipped_checkpoint_fits():
    model = PerceptionModel(InternVLBackbone(template="plain"), {"all_mask": AllMaskHead()})
    before = model.backbone.vision_tower.embeddings.cls_token.clone()
    module = PerceptionModule(
        InternVLBackbone(template="plain"),
        {"all_mask": AllMaskHead()},
        initial_backbone="tiny_mask_decoder.safetensors",
    )
    assert not torch.equal(module.model.backbone.vision_tower.embeddings.cls_token, before)


def test_another_backbone_is_refused(donor, tmp_path):
    _, folder = donor
    path = find_weights(str(folder))
    other = PerceptionModel(QwenVLBackbone(), {"all_mask": AllMaskHead()})
    with pytest.raises(ValueError, match=r"holds another backbone: \d+ missing keys such as"):
        load_backbone(other, path)
    state = load_file(path)
    name = "backbone.model.lm_head.weight"
    save_file({**state, name: state[name][:1000].contiguous()}, tmp_path / "small.safetensors")
    model = PerceptionModel(InternVLBackbone(), {"all_mask": AllMaskHead()})
    with pytest.raises(ValueError, match=r"lm_head.weight is \(1000, 128\), the model has \(1028, 128\)"):
        load_backbone(model, tmp_path / "small.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"not a file of this kind")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_backbone(model, tmp_path / "bad.safetensors")


def test_another_vocabulary_is_named_with_the_way_out(tmp_path):
    """As when released weights, whose matrices were shrunk, meet the base model they were made from."""
    backbone = InternVLBackbone()
    backbone._grow(1024, 1040)  # spare rows, as the base model has them
    save_weights(PerceptionModel(backbone, {"all_mask": AllMaskHead()}), tmp_path)
    model = PerceptionModel(InternVLBackbone(), {"all_mask": AllMaskHead()})
    with pytest.raises(
        ValueError, match=r"another architecture or vocabulary: .* is \[1040, 128\] there and \[1028, 128\]"
    ):
        load_weights(model, find_weights(str(tmp_path)))
    backbone = InternVLBackbone(str(tmp_path / "backbone"), weights="random")  # what the message says to do
    again = PerceptionModule(backbone, {"all_mask": AllMaskHead()}, initial_weights=str(tmp_path))
    stored = load_file(tmp_path / "model.safetensors")["backbone.model.lm_head.weight"]
    assert torch.equal(again.model.backbone.lm_head.weight, stored)


@pytest.mark.parametrize(("schedule", "middle"), [("linear", 0.5), ("cosine", 0.5)])
def test_schedules(schedule, middle):
    """Both rise linearly, are at half in the middle of the decay, and end at the final share; a quarter in, they differ."""
    settings = Optimization(lr=1.0, warmup=0.2, final=0.1, schedule=schedule)
    module = PerceptionModule(InternVLBackbone(), {"all_mask": AllMaskHead()}, optimization=settings)
    module._trainer = SimpleNamespace(estimated_stepping_batches=100)
    factor = module.configure_optimizers()["lr_scheduler"]["scheduler"].lr_lambdas[0]
    assert factor(0) == pytest.approx(1 / 20) and factor(9) == pytest.approx(0.5) and factor(20) == pytest.approx(1.0)
    assert factor(60) == pytest.approx(0.1 + 0.9 * middle) and factor(100) == pytest.approx(0.1)
    assert factor(40) == pytest.approx(0.1 + 0.9 * {"linear": 0.75, "cosine": 0.8535534}[schedule])
