"""Structure of the SimpleClick network; its numbers are checked by test_simple_click_goldens.py."""

from __future__ import annotations

import pytest
import torch

from mmseg_llm.segmenters.simple_click import SIZES, SimpleClick
from mmseg_llm.segmenters.simple_click.network import Backbone, click_disks, interpolate_positions

OFFICIAL = {"xtiny": (4.05, 166), "base": (98.03, 214), "large": (324.21, 358), "huge": (662.18, 454)}


def unused_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Tensors of official files that nothing reads."""
    width, head = SIZES[name].width, SIZES[name].head_channels
    shapes = {"backbone.cls_token": (1, 1, width), "backbone.head.weight": (1000, width), "backbone.head.bias": (1000,)}
    shapes |= {f"backbone.fc_norm.{kind}": (width,) for kind in ("weight", "bias")}
    for step, channels in (("up_conv1", head), ("up_conv2", head // 2)):
        half = channels // 2
        weights = ((channels, half, 2, 2), (half,), (half, half, 1, 1), (half,))
        for index, shape in enumerate(weights):
            shapes |= {f"head.{step}.{index}.weight": shape, f"head.{step}.{index}.bias": (half,)}
    return shapes


def tiny(seed: int = 0) -> SimpleClick:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SimpleClick("test").eval()


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_sizes(name: str):
    with torch.device("meta"):
        state = SimpleClick(name).state_dict()
        state |= {key: torch.empty(shape) for key, shape in unused_shapes(name).items()}
    millions, tensors = OFFICIAL[name]
    assert len(state) == tensors
    assert round(sum(value.numel() for value in state.values()) / 1e6, 2) == millions
    assert state["backbone.pos_embed"].shape[1] == (1025 if name == "huge" else 785)


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("xtiny", [1, 3, 5, 7]),
        ("base", [5, 11]),
        ("large", [5, 11, 17, 23]),
        ("huge", [7, 15, 23, 31]),
    ],
)
def test_global_blocks_and_windows(name: str, blocks: list[int]):
    size = SIZES[name]
    assert [index for index in range(size.depth) if (index + 1) % size.global_every == 0] == blocks
    with torch.device("meta"):
        backbone = Backbone(size)
    if size.patch == 16:
        assert [backbone.windows(side) for side in (448, 512, 672)] == [(2, 14), (2, 16), (3, 14)]
    else:
        assert backbone.windows(448) == (2, 16)
    with pytest.raises(ValueError, match="side 600 is not tiled"):
        backbone.windows(600)


def test_windows_do_not_see_each_other_and_global_blocks_do():
    network = tiny()
    inputs, points = torch.rand(1, 4, 448, 448), torch.full((1, 2, 3), -1.0)
    changed = inputs.clone()
    changed[..., :16, :16] = 1 - changed[..., :16, :16]  # in the first of four windows
    with torch.inference_mode():
        before, after = network.features(inputs, points), network.features(changed, points)
        assert (before != after)[0].any(0)[14:, 14:].any()
        for index, block in enumerate(network.backbone.blocks):
            if (index + 1) % SIZES["test"].global_every == 0:
                block.forward = lambda tokens: tokens
        before, after = network.features(inputs, points), network.features(changed, points)
        differs = (before != after)[0].any(0)
    assert differs[:14, :14].any()
    assert not differs[14:].any()
    assert not differs[:, 14:].any()


def test_strict_loading_forgives_only_the_unused():
    source, target = tiny(1), tiny(2)
    state = source.state_dict() | {key: torch.zeros(shape) for key, shape in unused_shapes("test").items()}
    known = set(state)
    target.load_state_dict(state, strict=True)
    assert set(state) == known  # the caller's dict is left alone
    assert all(torch.equal(source.state_dict()[key], value) for key, value in target.state_dict().items())
    with pytest.raises(RuntimeError, match=r"neck\.extra"):
        target.load_state_dict({**state, "neck.extra": torch.zeros(1)}, strict=True)
    del state["head.conv_seg.bias"]
    with pytest.raises(RuntimeError, match=r"head\.conv_seg\.bias"):
        target.load_state_dict(state, strict=True)


def test_positions():
    embedding = torch.randn(1, 1 + 16, 8)
    assert interpolate_positions(embedding, 4) is embedding
    first = interpolate_positions(embedding, 6)
    assert first.shape == (1, 37, 8)
    assert torch.equal(first[:, 0], embedding[:, 0])
    assert torch.equal(first, interpolate_positions(embedding, 6))


def test_disks():
    points = torch.tensor([[[10.0, 20, 0], [-1, -1, -1], [30, 3, 1], [2.5, -0.5, 2]]])
    positive, negative = click_disks(points, (40, 50))[0]
    assert positive.sum() == 81
    assert positive[5, 20] == positive[15, 20] == positive[10, 25] == 1
    assert positive[4, 20] == positive[14, 24] == 0
    rows, cols = torch.meshgrid(torch.arange(40.0), torch.arange(50.0), indexing="ij")
    near = ((rows - 30) ** 2 + (cols - 3) ** 2 <= 25) | ((rows - 2.5) ** 2 + (cols + 0.5) ** 2 <= 25)
    assert torch.equal(negative, near.float())


def test_previous_mask_and_both_signs_matter():
    network = tiny()
    inputs, points = torch.rand(1, 4, 64, 64), torch.tensor([[[20.0, 30, 0], [-1, -1, -1]]])
    with torch.inference_mode():
        logits = network(inputs, points)
        assert logits.shape == (1, 1, 64, 64)
        for other in (
            network(inputs * torch.tensor([1.0, 1, 1, 0])[:, None, None], points),
            network(inputs, points.flip(1)),
        ):
            assert not torch.allclose(logits, other)
        padded = torch.cat((points[:, :1], points[:, 1:].repeat(1, 3, 1)), 1)
        assert torch.equal(logits, network(inputs, padded))


def test_trains():
    network = tiny().train()
    network(torch.rand(2, 4, 64, 64), torch.full((2, 2, 3), -1.0)).mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_errors():
    network = tiny()
    points = torch.full((1, 2, 3), -1.0)
    with pytest.raises(ValueError, match="no size 'medium'"):
        SimpleClick("medium")
    with pytest.raises(ValueError, match=r"takes \(B, 4, S, S\)"):
        network(torch.rand(1, 4, 64, 48), points)
    with pytest.raises(ValueError, match=r"takes \(B, 4, S, S\)"):
        network(torch.rand(1, 3, 64, 64), points)
    with pytest.raises(ValueError, match="same P"):
        network(torch.rand(1, 4, 64, 64), points[:, :1])
    with pytest.raises(ValueError, match="side 70"):
        network(torch.rand(1, 4, 70, 70), points)
