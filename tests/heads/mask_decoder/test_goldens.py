"""Parity with the reference MLLMSeg: its head, its upsampler and complete tiny models (goldens README, "MLLMSeg")."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from golden_files import generated, golden_files, read_golden, weights

from mmseg_llm.backbones.internvl import InternVLBackbone
from mmseg_llm.backbones.internvl_layout import convert_config, convert_state_dict
from mmseg_llm.backbones.visibility import Visibility
from mmseg_llm.heads.mask_decoder.decoder import MaskDecoder
from mmseg_llm.heads.mask_decoder.dysample import DySample
from mmseg_llm.heads.mask_decoder.head import MaskDecoderHead, gather
from mmseg_llm.structures import Batch

pytestmark = pytest.mark.golden


def parametrize(pattern: str):
    """One case per golden file, named after it."""
    return pytest.mark.parametrize("path", golden_files(pattern), ids=lambda path: path.stem)


class Check:
    """Compares with the tolerances of a file and keeps the largest error of each kind."""

    def __init__(self, meta: dict[str, Any]) -> None:
        self.tolerance = meta["tolerance"]
        self.errors: dict[str, float] = {}

    def __call__(self, kind: str, actual: Any, expected: torch.Tensor, label: str = "") -> None:
        actual, expected = torch.as_tensor(actual).double().cpu(), expected.double()
        assert actual.shape == expected.shape, (kind, label, actual.shape, expected.shape)
        assert torch.isfinite(actual).all(), (kind, label)
        error = float((actual - expected).abs().max()) if actual.numel() else 0.0
        self.errors[kind] = max(self.errors.get(kind, 0.0), error)
        assert error <= self.tolerance[kind], f"{kind} {label}: error {error:.2e} > {self.tolerance[kind]}"


@pytest.fixture
def check_of(request):
    """A `Check` whose errors are printed (pytest -s)."""
    made = []

    def make(meta: dict[str, Any]) -> Check:
        made.append(Check(meta))
        return made[-1]

    yield make
    for check in made:
        print(request.node.name, {kind: f"{error:.1e}" for kind, error in check.errors.items()})


def load_decoder(decoder: MaskDecoder, state: dict[str, torch.Tensor]) -> MaskDecoder:
    """Strict load of official weights; only what the constructor sets and nobody generates is taken from it."""
    constants = {k: v for k, v in decoder.state_dict().items() if k.endswith(("init_pos", "num_batches_tracked"))}
    decoder.load_state_dict({**constants, **state}, strict=True)
    return decoder.eval()


def grid_of(features: torch.Tensor) -> torch.Tensor:
    """`(Q, P, C)` as the reference returns it, `(Q, C, p, p)`."""
    side = round(features.shape[1] ** 0.5)
    return features.transpose(1, 2).unflatten(2, (side, side))


@parametrize("mllmseg_head*")
@torch.no_grad()
def test_golden_mllmseg_head(path: Path, check_of):
    tensors, meta = read_golden(path)
    check = check_of(meta)
    vit, llm, txt = (generated(meta, f"input.{name}") for name in ("vit", "llm", "txt"))
    torch.testing.assert_close(txt, tensors["txt"], rtol=0, atol=0)
    decoder = MaskDecoder(vision_width=vit.shape[-1], text_width=meta["config"]["txt_dim"])
    assert set(decoder.state_dict()) == set(meta["weights"])
    assert len(meta["weights"]) == 58
    load_decoder(decoder, weights(meta))
    queries = meta["config"]["queries"]

    _, aware = decoder.fuse(vit, llm)
    check("A", grid_of(aware)[0].flatten()[tensors["A_index"]], tensors["A"])
    cache = decoder.encode_image(vit, llm).expand(queries, -1, -1)
    features = decoder.decode_features(cache, txt[:, 0])
    check("Z", grid_of(features).flatten()[tensors["Z_index"]], tensors["Z"])
    mask = decoder.decode(cache, txt[:, 0]).sigmoid()
    check("mask", mask.flatten()[tensors["mask_index"]], tensors["mask"])
    flat = mask.double().flatten(1)
    check("mask_mean", flat.mean(1), tensors["mask_mean"])
    check("mask_std", flat.std(1), tensors["mask_std"])
    check("mask", flat.amin(1), tensors["mask_min"], "min")
    check("mask", flat.amax(1), tensors["mask_max"], "max")

    # the whole reference block on F, uncached
    fused, _ = decoder.fuse(vit, llm)
    whole = decoder.ca_layer_vl(fused.expand(queries, -1, -1), decoder.text_down(txt))
    check("Z", grid_of(whole).flatten()[tensors["Z_index"]], tensors["Z"], "uncached")


@parametrize("mllmseg_dysample*")
@torch.no_grad()
def test_golden_mllmseg_dysample(path: Path, check_of):
    tensors, meta = read_golden(path)
    check, config = check_of(meta), meta["config"]
    module = DySample(config["in_channels"], config["scale"], config["groups"])
    torch.testing.assert_close(module.init_pos, tensors["init_pos"], rtol=0, atol=0)
    names = ("init_pos", "offset.weight", "offset.bias")
    module.load_state_dict({name: tensors[name] for name in names}, strict=True)
    torch.testing.assert_close(generated(meta, "input.x"), tensors["x"], rtol=0, atol=0)
    check("y", module(tensors["x"]), tensors["y"])
    module.offset.weight.zero_()
    module.offset.bias.zero_()
    check("y_zero_offset", module(tensors["x"]), tensors["y_zero_offset"])


def chat_config(meta: dict[str, Any]) -> dict[str, Any]:
    """The `config.json` that a checkpoint of these sizes has."""
    llm, vision = dict(meta["config"]["llm"]), meta["config"]["vision"]
    llm.pop("attention_bias")  # implied by the architecture
    name = {"qwen2": "Qwen2ForCausalLM", "internlm2": "InternLM2ForCausalLM"}[meta["kind"]]
    return {
        "model_type": "internvl_chat",
        "llm_config": {"architectures": [name], **llm},
        "vision_config": {
            **{
                key: vision[key] for key in ("hidden_size", "image_size", "intermediate_size", "patch_size", "qkv_bias")
            },
            "num_attention_heads": vision["num_attention_heads"],
            "num_hidden_layers": vision["num_hidden_layers"],
            "qk_normalization": vision["qk_norm"],
            "norm_type": vision["norm"],
            "layer_norm_eps": vision["eps"],
        },
        "force_image_size": vision["image_size"],
        "downsample_ratio": meta["config"]["downsample_ratio"],
    }


def build_backbone(meta: dict[str, Any]) -> tuple[InternVLBackbone, dict[str, torch.Tensor]]:
    """The adapter around a model with converted official weights, without a tokenizer; and the head's weights."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    from mmseg_llm.backbones.adapters import Trainable

    arguments = convert_config(chat_config(meta))
    config = InternVLConfig(**arguments, image_token_id=meta["config"]["token_ids"]["img_context"])
    for part in (config, config.text_config, config.vision_config):
        part._attn_implementation = "sdpa"
    model = InternVLForConditionalGeneration(config)
    state, rest = convert_state_dict(weights(meta), config)
    result = model.load_state_dict(state, strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    backbone = InternVLBackbone.__new__(InternVLBackbone)
    torch.nn.Module.__init__(backbone)
    backbone.model, backbone.trainable = model.eval(), Trainable()
    backbone.vision_width, backbone.text_width = config.vision_config.hidden_size, config.text_config.hidden_size
    assert all(key.startswith("res_decoder.") for key in rest)
    return backbone, {key.removeprefix("res_decoder."): value for key, value in rest.items()}


def build_head(meta: dict[str, Any], backbone: InternVLBackbone, state: dict[str, torch.Tensor]) -> MaskDecoderHead:
    """The head with the official weights and loss."""
    vision = meta["config"]["vision"]
    head = MaskDecoderHead(loss_rule="official")
    head.decoder = load_decoder(
        MaskDecoder(
            vision_width=backbone.vision_width, text_width=backbone.text_width, patch=vision["patch_size"], merge=2
        ),
        state,
    )
    ids = meta["config"]["token_ids"]
    head.seg_id, head.rej_id = ids["seg"], ids["rej"]
    return head.eval()


def make_batch(meta, ids, labels, positions, attention, pixels, masks=()) -> Batch:
    """A batch of ready-made rows; slots are the answer tokens of each row, in order."""
    tokens = meta["config"]["token_ids"]
    context = ids == tokens["img_context"]
    slots = (((ids == tokens["seg"]) | (ids == tokens["rej"])) & attention.bool()).nonzero()
    targets = []
    for (row, position), mask in zip(slots.tolist(), masks):
        targets.append(mask.numpy().astype(bool) if ids[row, position] == tokens["seg"] else None)
    return Batch(
        head="golden",
        ids=ids,
        labels=labels,
        positions=positions[None],
        visibility=Visibility.causal(attention.bool()),
        pixels=pixels,
        canvas_sizes=[tuple(pixels.shape[-2:])] * len(pixels),
        image_positions=context.nonzero()[:, 1].view(len(ids), -1),
        slot_rows=slots[:, 0],
        slot_positions=slots[:, 1],
        slot_queries=torch.zeros(len(slots), dtype=torch.long),
        dense_positions=torch.full((len(ids), 0), -1),
        dense_index=torch.full((len(ids), 0), -1),
        dense_starts=torch.full((len(slots),), -1),
        targets=targets,
        samples=[],
    )


@parametrize("mllmseg_model_*")
@torch.no_grad()
def test_golden_mllmseg_model(path: Path, check_of):
    tensors, meta = read_golden(path)
    check = check_of(meta)
    backbone, head_state = build_backbone(meta)
    head = build_head(meta, backbone, head_state)
    check_training(tensors, meta, backbone, head, check)
    for name, settings in meta["infer"].items():
        check_inference(tensors, meta, backbone, head, check, name, settings)


def check_training(tensors, meta, backbone, head, check):
    ids, attention = tensors["input_ids"], tensors["attention_mask"]
    masks = [mask for i in range(len(ids)) for mask in tensors[f"gt_masks_{i}"]]
    pixels = generated(meta, "input.pixel_values")

    def batch_of(labels: torch.Tensor) -> Batch:
        return make_batch(meta, ids, labels, tensors["position_ids"], attention, pixels, masks)

    batch = batch_of(tensors["labels_pad0"])
    assert len(batch.targets) == len(masks)
    for mask, target in zip(masks, batch.targets, strict=True):
        assert (target is None) == (int(mask.sum()) == 0)  # [REJ] rows are the empty ones
    output = backbone(batch)
    image_states = gather(output.states, batch.image_positions - 1)
    is_seg = ids[batch.slot_rows, batch.slot_positions] == head.seg_id
    for i in range(len(ids)):
        check("vit", output.features.patches[i].flatten()[tensors[f"train.vit_index_{i}"]], tensors[f"train.vit_{i}"])
        rows = image_states[i, meta["image_state_rows"]]
        check("states", rows, tensors[f"train.image_states_{i}"], f"image {i}")
        slots = batch.slot_positions[batch.slot_rows == i]
        assert slots.tolist() == tensors[f"train.slot_positions_{i}"].tolist()
        states = output.states[i, slots - 1]
        check("states", states[is_seg[batch.slot_rows == i]], tensors[f"train.seg_states_{i}"], f"slots {i}")
        check("logits", backbone.logits(states), tensors[f"train.slot_logits_{i}"], f"train {i}")

    for labels, ce_name, total_name in (
        ("labels_pad0", "train.ce_loss", "train.loss"),
        ("labels_ignore", "train.ce_loss_ignore", "train.loss_ignore"),
    ):
        losses = head.loss(backbone, batch_of(tensors[labels]))
        check("losses", losses["ce"], tensors[ce_name], ce_name)
        check("losses", losses["focal"], tensors["train.mask_focal_loss"], "focal")
        check("losses", losses["dice"], tensors["train.mask_dice_loss"], "dice")
        check("losses", losses["focal"] + losses["dice"], tensors["train.mask_loss"], "mask")
        total = sum(value for name, value in losses.items() if not name.startswith("_"))
        check("losses", total, tensors[total_name], total_name)


def check_inference(tensors, meta, backbone, head, check, name, settings):
    image = settings["image"]
    pixels = generated(meta, "input.pixel_values_infer")[image : image + 1]
    ids = tensors[f"{name}.input_ids"][None]
    features = backbone.encode_images(pixels)

    def run(ids: torch.Tensor):
        ones = torch.ones_like(ids)
        batch = make_batch(meta, ids, ones, torch.arange(ids.shape[1])[None], ones, pixels)
        return batch, backbone(batch, features).states

    batch, states = run(ids)
    assert batch.slot_positions.tolist() == tensors[f"{name}.slot_positions"].tolist()
    logits = backbone.logits(states[batch.slot_rows, batch.slot_positions - 1])
    check("logits", logits, tensors[f"{name}.slot_logits_pass1"], name)
    decisions = torch.where(logits.argmax(-1) == head.rej_id, head.rej_id, head.seg_id)
    assert decisions.tolist() == tensors[f"{name}.slot_decisions"].tolist()
    if settings["reeval"]:
        batch, states = run(torch.where(ids == head.rej_id, head.seg_id, ids))
    drawn = batch.ids[batch.slot_rows, batch.slot_positions] == head.seg_id
    assert int(drawn.sum()) == int(tensors[f"{name}.n_masks"])
    if not drawn.any():
        return
    cache = head.decoder.encode_image(features.patches, gather(states, batch.image_positions - 1))
    slot_states = states[batch.slot_rows, batch.slot_positions - 1][drawn]
    mask = head.decoder.decode(cache.expand(len(slot_states), -1, -1), slot_states).sigmoid()
    check("mask", mask.flatten()[tensors[f"{name}.mask_index"]], tensors[f"{name}.mask"], name)
    flat = mask.double().flatten(1)
    check("mask", flat.mean(1), tensors[f"{name}.mask_mean"], f"{name} mean")
    check("mask", flat.std(1), tensors[f"{name}.mask_std"], f"{name} std")
    # a pixel may lie within the tolerance of the threshold: the fraction is bounded by the pixels around it
    tolerance = check.tolerance["mask"]
    low, high = ((flat >= 0.5 + side * tolerance).double().mean(1) for side in (1, -1))
    fraction = tensors[f"{name}.positive_fraction"].double()
    assert ((low - 1e-9 <= fraction) & (fraction <= high + 1e-9)).all()
