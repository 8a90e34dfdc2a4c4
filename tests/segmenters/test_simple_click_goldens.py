"""Parity of SimpleClick with the official network and predictor (goldens README, "simpleclick", "simpleclick_predictor")."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_files import golden_files, read_golden, unpack_bits, weights, z
from PIL import Image

from mmseg_llm.segmenters.simple_click import SimpleClick, SimpleClickEnvironment, SimpleClickSize
from mmseg_llm.segmenters.simple_click.network import click_disks, interpolate_positions
from mmseg_llm.structures import Click

pytestmark = pytest.mark.golden

FILES = golden_files("simpleclick*")
PREDICTOR = golden_files("simpleclick_predictor*")
NETWORK = [path for path in FILES if path not in PREDICTOR]


def error_of(actual: torch.Tensor, expected: torch.Tensor, index: torch.Tensor | None = None) -> float:
    values = actual.flatten()[index] if index is not None else actual
    assert values.shape == expected.shape
    return float((values.double() - expected.double()).abs().max())


def inputs_of(meta: dict) -> torch.Tensor:
    """The `(2, 4, S, S)` input that the README describes."""
    side = meta["config"]["image_size"]
    colours = np.float32(0.5) + np.float32(0.25) * z("input.rgb", (2, 3, side, side), meta["seed"])
    y, x = np.mgrid[:side, :side]
    previous = np.zeros((2, 1, side, side), np.float32)
    previous[0, 0] = 1 / (1 + np.exp((np.hypot(y - 0.45 * side, x - 0.55 * side) - 0.2 * side) / 6))
    return torch.from_numpy(np.concatenate((np.clip(colours, 0, 1), previous), 1))


@pytest.mark.parametrize("path", NETWORK, ids=lambda path: path.stem)
def test_network(path: Path):
    tensors, meta = read_golden(path)
    config, state = meta["config"], weights(meta)
    assert config["upsample"] == "x1"
    levels = tuple(config["out_dims"])
    size = SimpleClickSize(
        config["embed_dim"],
        config["depth"],
        config["heads"],
        config["patch"],
        levels,
        config["head_channels"],
        config["pos_embed_base"],
    )
    network = SimpleClick(size).eval()
    network.load_state_dict(state, strict=True)
    inputs = inputs_of(meta)
    with torch.inference_mode():
        tokens = network.features(inputs, tensors["points"])
        head = network.head(network.neck(tokens))
        logits = network(inputs, tensors["points"])
    disks = click_disks(tensors["points"], (inputs.shape[-2], inputs.shape[-1]))
    sums = torch.cat((inputs[:, 3:], disks), 1).double().sum((2, 3))
    embedding = interpolate_positions(
        state["backbone.pos_embed"], config["pos_embed_interpolated_to"] // config["patch"]
    )
    prob = logits.sigmoid()
    errors = {
        "tokens": error_of(tokens, tensors["tokens"], tensors["tokens_index"]),
        "head": error_of(head, tensors["head"], tensors["head_index"]),
        "logit": error_of(logits, tensors["logit"], tensors["prob_index"]),
        "prob": error_of(prob, tensors["prob"], tensors["prob_index"]),
        "pos_embed_interpolated": error_of(embedding, tensors["pos_embed_interpolated"], tensors["pos_embed_index"]),
    }
    print(path.stem, {key: f"{error:.1e}" for key, error in errors.items()})
    for key, error in errors.items():
        assert error <= float(meta["tolerance"][key]), (key, error)
    assert torch.allclose(sums, tensors["coord_sums"], rtol=1e-6, atol=0)
    flat = prob.double().flatten(1)
    assert torch.allclose(flat.mean(1), tensors["prob_mean"].flatten(), atol=1e-5)
    assert torch.allclose(flat.std(1), tensors["prob_std"].flatten(), atol=1e-5)


class FormulaNetwork(torch.nn.Module):
    """The stand-in network of the predictor files (`meta["network_formula"]`); remembers its last call."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, inputs: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        self.inputs, self.points = inputs, points
        y, x = torch.arange(inputs.shape[-2]).float()[:, None], torch.arange(inputs.shape[-1]).float()
        rows, cols = points[..., 0, None, None], points[..., 1, None, None]
        near = 1 / (1 + ((y - rows) ** 2 + (x - cols) ** 2) / self.sigma**2)  # (B, 2P, H, W)
        near = near * (points[..., :2].amax(-1) >= 0)[..., None, None]
        positive, negative = (sign.amax(1, keepdim=True) for sign in near.chunk(2, 1))
        colours = inputs[:, :3].mean(1, keepdim=True)
        return 8 * positive - 6 * negative - 3.2 + 1.5 * (colours - 0.5) + 1.0 * inputs[:, 3:]


def image_of(case: dict) -> Image.Image:
    """The picture of `meta["image_formula"]`."""
    height, width = case["size"]
    y, x = np.mgrid[:height, :width]
    base = np.stack(((255 * x) // (width - 1), (255 * y) // (height - 1), (3 * (x + 2 * y)) % 256), -1)
    noise = np.rint(np.float32(20) * z("input.image", (height, width, 3), case["image_seed"]))
    return Image.fromarray(np.clip(base + noise, 0, 255).astype(np.uint8))


@pytest.mark.parametrize("path", PREDICTOR, ids=lambda path: path.stem)
def test_predictor(path: Path):
    tensors, meta = read_golden(path)
    config, tolerance = meta["config"], meta["tolerance"]
    worst = {"prob": 0.0, "net_points": 0.0, "mask": 0.0, "mean": 0.0, "net_input_mean": 0.0}
    for number, case in enumerate(meta["cases"]):
        network = FormulaNetwork(case["sigma"])
        environment = SimpleClickEnvironment(
            network,
            flip_tta=config["flip"],
            size=config["target_size"],
            threshold=config["mask_threshold"],
            min_crop=config["min_crop_size"],
            expand=config["expansion_ratio"],
            device="cpu",
        )
        environment.reset(image_of(case))
        for step, (row, col, sign) in enumerate(tensors[f"case{number}.clicks"].tolist()):
            shown = environment.step(Click(row, col, is_positive=bool(sign)))
            stored = {
                key: tensors[f"case{number}.step{step}.{key}"]
                for key in ("index", "prob", "mean", "mask_bits", "net_points", "net_input_mean")
            }
            region = environment.snapshot().region
            assert region == tuple(tensors[f"case{number}.roi"][step].tolist()), (number, step)
            chances = torch.from_numpy(shown.chances)
            mask = unpack_bits(stored["mask_bits"], shown.mask.shape)
            errors = {
                "prob": error_of(chances, stored["prob"], stored["index"]),
                "net_points": error_of(network.points, stored["net_points"]),
                "mask": float((mask ^ shown.mask).sum()),
                "mean": abs(float(chances.double().mean()) - float(stored["mean"])),
                "net_input_mean": error_of(network.inputs.double().mean((2, 3)), stored["net_input_mean"]),
            }
            worst = {key: max(worst[key], error) for key, error in errors.items()}
    print(path.stem, {key: f"{error:.1e}" for key, error in worst.items()})
    assert worst["prob"] <= float(tolerance["prob"])
    assert worst["net_points"] <= float(tolerance["net_points"])
    assert worst["mask"] <= int(re.findall(r"\d+", tolerance["mask"])[0])  # "up to 2 pixels of difference"
    assert worst["mean"] <= float(tolerance["prob"])
    assert worst["net_input_mean"] <= 1e-6
