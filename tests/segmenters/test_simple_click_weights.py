"""Reading official SimpleClick files without running what is in them."""

from __future__ import annotations

import os
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mmseg_llm.segmenters.simple_click import SIZES, convert_simple_click, load_simple_click
from mmseg_llm.segmenters.simple_click.weights import build_simple_click, size_of
from segmenters.test_simple_click_network import tiny, unused_shapes


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of the official layout: tensors, leftovers, and a config with a loss module of the training code."""
    home = ModuleType("isegm.model.losses")
    for name in ("isegm", "isegm.model"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, home.__name__, home)
    scope: dict = {"torch": torch, "__name__": home.__name__}
    exec("def cross_entropy(x): return x\nclass CrossEntropyLoss(torch.nn.Module):\n  pass", scope)
    home.cross_entropy, home.CrossEntropyLoss = scope["cross_entropy"], scope["CrossEntropyLoss"]
    loss = home.CrossEntropyLoss()
    loss.criterion = home.cross_entropy
    state = tiny(3).state_dict() | {key: torch.zeros(shape) for key, shape in unused_shapes("test").items()}
    config = {"class": "isegm.model.is_plainvit_model.PlainVitModel", "params": {"loss_decode": {"value": loss}}}
    path = tmp_path / "official.pth"
    torch.save({"state_dict": state, "config": config}, path)
    for name in ("isegm", "isegm.model", home.__name__):
        monkeypatch.delitem(sys.modules, name)
    return path


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    theirs = other.state_dict()
    mine = one.state_dict()
    return set(mine) == set(theirs) and all(torch.equal(value, theirs[key]) for key, value in mine.items())


def test_official_file_is_refused_then_converted(official: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"more than tensors.*convert_simple_click"):
        load_simple_click(official)
    written = convert_simple_click(official, tmp_path / "new" / "weights.safetensors")
    assert written == tmp_path / "new" / "weights.safetensors"
    assert [path.name for path in written.parent.iterdir()] == ["weights.safetensors"]
    network = load_simple_click(written)
    assert same(network, tiny(3))
    assert not network.training
    assert not any(name.split(".")[0] == "isegm" for name in sys.modules)
    with torch.inference_mode():
        assert network(torch.rand(1, 4, 64, 64), torch.full((1, 2, 3), -1.0)).isfinite().all()


@pytest.mark.parametrize("wrapped", [True, False])
def test_plain_tensors_load_directly(wrapped: bool, tmp_path: Path):
    state = {key: value.half() for key, value in tiny(4).state_dict().items()}
    torch.save({"state_dict": state, "config": {"a": 1}} if wrapped else state, tmp_path / "plain.pth")
    network = load_simple_click(str(tmp_path / "plain.pth"))
    assert same(network, tiny(4).half().float())
    assert same(load_simple_click(convert_simple_click(tmp_path / "plain.pth", tmp_path / "p.safetensors")), network)


class Evil:
    """A pickle that would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_other_globals_stop_the_conversion(tmp_path: Path):
    torch.save({"state_dict": tiny().state_dict(), "config": Evil(tmp_path / "made")}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"asks for 'posix.mkdir'|asks for 'nt.mkdir'"):
        convert_simple_click(tmp_path / "evil.pth", tmp_path / "evil.safetensors")
    with pytest.raises(ValueError, match="more than tensors"):
        load_simple_click(tmp_path / "evil.pth")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.pth"]


def test_damaged_files(tmp_path: Path):
    with pytest.raises(ValueError, match="do not exist; get cocolvis"):
        load_simple_click(tmp_path / "none.pth")
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("not weights")
        with pytest.raises(ValueError, match="is not a "):
            load_simple_click(tmp_path / name)
    with pytest.raises(ValueError, match=r"not a file of torch\.save"):
        convert_simple_click(tmp_path / "text.pth", tmp_path / "x.safetensors")
    torch.save(tiny().state_dict(), tmp_path / "good.pth")
    content = (tmp_path / "good.pth").read_bytes()
    (tmp_path / "short.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"not a file of torch\.save"):
        load_simple_click(tmp_path / "short.pth")
    with zipfile.ZipFile(tmp_path / "script.pth", "w") as archive:  # what TorchScript calls its parts
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"script/{name}", b"")
    with pytest.raises(ValueError, match=r"something else than torch\.save"):
        convert_simple_click(tmp_path / "script.pth", tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"ends in \.safetensors"):
        convert_simple_click(tmp_path / "good.pth", tmp_path / "x.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="no state dict"):
        load_simple_click(tmp_path / "list.pth")


def test_other_tensors():
    state = tiny().state_dict()
    assert size_of(state) == "test"
    with pytest.raises(ValueError, match=r"patch_embed\.proj\.weight is missing"):
        build_simple_click({"a": torch.zeros(1)})
    wide = {**state, "backbone.patch_embed.proj.weight": torch.zeros(24, 3, 16, 16)}
    with pytest.raises(ValueError, match=r"\(24, 8, 16\), which is no SimpleClick; known are .*large \(1024, 24, 16\)"):
        build_simple_click(wide)
    for broken in (
        {key: value for key, value in state.items() if key != "head.conv_seg.bias"},
        {**state, "neck.extra": torch.zeros(1)},
        {**state, "head.conv_seg.weight": torch.zeros(1, 4, 1, 1)},
    ):
        with pytest.raises(ValueError, match="does not hold SimpleClick 'test'"):
            build_simple_click(broken, "file")
    assert len({(size.width, size.depth, size.patch) for size in SIZES.values()}) == len(SIZES)
