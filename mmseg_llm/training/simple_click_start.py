"""What the training of SimpleClick starts from: random weights, those of a SimpleClick, or a backbone of masked autoencoding.

Legend: D width, g tokens per side.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn

from mmseg_llm.segmenters.simple_click.network import SIZES, SimpleClick, interpolate_positions
from mmseg_llm.segmenters.simple_click.weights import load_simple_click

# Share of pixels that belong to the object at first, which is what a network that knows nothing should answer.
FIRST_CHANCE = 0.2


def initialise(network: SimpleClick) -> None:
    """Weights to train from scratch, in place: small linear layers, sine positions (as MAE's), and mostly background."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for embed in (network.backbone.patch_embed, network.patch_embed_coords):
        nn.init.xavier_uniform_(embed.proj.weight.view(embed.proj.out_channels, -1))
        assert embed.proj.bias is not None
        nn.init.zeros_(embed.proj.bias)
    grid, width = network.size.position_side // network.size.patch, network.size.width
    rates = 10000.0 ** -(torch.arange(width // 4) / (width // 4))
    places = torch.arange(grid)[:, None] * rates  # (g, D / 4)
    axis = torch.cat((places.sin(), places.cos()), 1)  # (g, D / 2)
    rows, cols = axis[:, None].expand(-1, grid, -1), axis[None].expand(grid, -1, -1)
    with torch.no_grad():
        network.backbone.pos_embed[:, 1:] = torch.cat((rows, cols), 2).reshape(1, grid * grid, -1)
        assert network.head.conv_seg.bias is not None
        network.head.conv_seg.bias.fill_(math.log(FIRST_CHANCE / (1 - FIRST_CHANCE)))


def load_initial(network: SimpleClick, path: str | Path) -> None:
    """Take weights over, in place: all of a SimpleClick file, or the backbone of an MAE file (`mae_pretrain_vit_large.pth`).

    Raises:
        ValueError: if the file is missing or damaged, or holds a network of another size.
    """
    path = Path(path).expanduser()
    state = _mae_backbone(path) if path.suffix in {".pth", ".pt"} else None
    if state is None:
        loaded = load_simple_click(path)
        if loaded.size != network.size:
            names = [next(name for name, size in SIZES.items() if size == net.size) for net in (loaded, network)]
            raise ValueError(
                f"{path} holds SimpleClick '{names[0]}', the model is '{names[1]}'; set model.size to match"
            )
        network.load_state_dict(loaded.state_dict())
        return
    grid = network.size.position_side // network.size.patch
    state["pos_embed"] = interpolate_positions(state["pos_embed"].float(), grid)
    wanted = network.backbone.state_dict()
    faults = [key for key in wanted if key not in state or state[key].shape != wanted[key].shape]
    if faults:
        raise ValueError(f"{path} does not fit the backbone of this size: {faults[0]}; take the ViT of the same size")
    network.backbone.load_state_dict({key: state[key] for key in wanted})


def _mae_backbone(path: Path) -> dict[str, torch.Tensor] | None:
    """The tensors of an MAE file; None where `path` holds something else, or what only `load_simple_click` can tell."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # whatever is wrong with the file, load_simple_click says it in a sentence
        return None
    state = content.get("model", content) if isinstance(content, dict) else {}
    is_mae = isinstance(state, dict) and "pos_embed" in state and "blocks.0.attn.qkv.weight" in state
    return dict(state) if is_mae else None
