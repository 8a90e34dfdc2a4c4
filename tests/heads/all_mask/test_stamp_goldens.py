"""STAMP's reference numbers (`goldens/README.md`), through the library's own loading, packing, generation and mask pass."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from golden_files import generated, golden_files, read_golden, unpack_bits, weights
from PIL import Image
from safetensors.torch import save_file

from mmseg_llm.backbones import qwen_vl
from mmseg_llm.backbones.collate import collate
from mmseg_llm.backbones.features import gather
from mmseg_llm.backbones.qwen_vl import QwenVLBackbone
from mmseg_llm.heads.all_mask.answering import find_triggers
from mmseg_llm.heads.all_mask.head import AllMaskHead
from mmseg_llm.heads.all_mask.labels import cell_labels
from mmseg_llm.heads.all_mask.losses import binary_loss
from mmseg_llm.heads.all_mask.passes import Trigger
from mmseg_llm.masks import Mask
from mmseg_llm.structures import Canvas, DenseBlock, Example, Sample, Suffix

pytestmark = pytest.mark.golden


def write_folder(folder, meta, state) -> None:
    """The released layout on disk: flat keys, the classifier among them, a tokenizer with the special tokens."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    config, ids = meta["config"], meta["config"]["token_ids"]
    text = dict(config["text"])
    rope = {"type": "mrope", "mrope_section": text.pop("mrope_section"), "rope_theta": text.pop("rope_theta")}
    settings = {"model_type": "qwen2_vl", "architectures": ["SegQwenVL"], "vision_config": config["vision"]}
    settings |= {"text_config": {**text, "rope_scaling": rope}, "tie_word_embeddings": text["tie_word_embeddings"]}
    settings |= {f"{key}_token_id": ids[key] for key in ("image", "video")}
    settings |= {"vision_start_token_id": ids["vision_start"], "vision_end_token_id": ids["vision_end"]}
    (folder / "config.json").write_text(json.dumps(settings))
    flat = {}
    for key, value in state.items():
        key = key.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        flat[key] = value.contiguous()
    save_file(flat, folder / "model.safetensors")
    names = {
        ids["image"]: "<|image_pad|>",
        ids["vision_start"]: "<|vision_start|>",
        ids["vision_end"]: "<|vision_end|>",
    }
    names |= {ids["seg"]: "<|seg|>", ids["mask"]: "<|mask|>", ids["eos"]: "<|im_end|>", ids["pad"]: "<|endoftext|>"}
    spare = (i for i in range(text["vocab_size"]) if i not in names.values() and i not in names)
    for name in ("<|im_start|>", "<|yes|>", "<|no|>"):
        names[next(i for i in spare if i not in names)] = name
    vocabulary = {names.get(i, f"word{i}"): i for i in range(text["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=names[ids["pad"]]))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    fast.save_pretrained(folder)


class Golden:
    """A file with the model it describes."""

    def __init__(self, path, folder) -> None:
        self.tensors, self.meta = read_golden(path)
        state = weights(self.meta)
        write_folder(folder, self.meta, state)
        vision = self.meta["config"]["vision"]
        self.merge = vision["spatial_merge_size"]
        self.step = vision["patch_size"] * self.merge
        self.backbone = QwenVLBackbone(str(folder), min_pixels=self.step**2, max_pixels=10**7).eval()
        self.head = AllMaskHead(
            label_rule="centre_strict",
            label_mode="official_all_tokens",
            upsampling="nearest",
            max_new_tokens=self.meta["max_new_tokens"],
        )
        self.head.bind(self.backbone)
        self.head.classifier.load_state_dict({key: state[f"classifier.{key}"] for key in ("weight", "bias")})
        self.head.name = "all_mask"
        self.patches = [generated(self.meta, key) for key in sorted(self.meta["inputs"])]
        self.tolerance = self.meta["tolerance"]

    def grids(self, key: str) -> list[tuple[int, int]]:
        """Image tokens, rows and columns."""
        return [(h // self.merge, w // self.merge) for _, h, w in self.tensors[f"{key}.image_grid_thw"].tolist()]

    def canvas(self, grid, size) -> Canvas:
        """An image of `size` stretched over the tokens of a grid."""
        height, width = grid[0] * self.step, grid[1] * self.step
        return Canvas(Image.new("RGB", (width, height)), size, (width / size[1], height / size[0]))

    def features(self, monkeypatch, images, grids):
        """Vision features of stored patches, which no image has: their two frames differ."""
        monkeypatch.setattr(qwen_vl, "patchify", lambda *_: torch.cat([self.patches[i] for i in images]))
        sizes = [(h * self.step, w * self.step) for h, w in grids]
        return self.backbone.encode_images(torch.zeros(len(images), 3, 1, 1), sizes)

    def close(self, ours, key: str, bound: str) -> float:
        """The largest difference, which must be within the file's tolerance."""
        error = (ours.detach().double() - self.tensors[key].double().reshape(ours.shape)).abs().max().item()
        print(f"{key}: {error:.1e} (tolerance {self.tolerance[bound]})")
        assert error <= self.tolerance[bound]
        return error


@pytest.fixture(scope="module", params=golden_files("stamp_model*"), ids=lambda path: path.stem)
def golden(request, tmp_path_factory):
    return Golden(request.param, tmp_path_factory.mktemp("stamp"))


def split(golden, ids, grid):
    """Prefix up to the end of the image, and what follows."""
    end = ids.index(golden.meta["config"]["token_ids"]["vision_end"]) + 1
    assert ids[:end].count(golden.meta["config"]["token_ids"]["image"]) == grid[0] * grid[1]
    return tuple(ids[:end]), tuple(ids[end:])


def training_batch(golden):
    """The two conversations as this library packs them: one row each, mask blocks behind their triggers."""
    head, tensors = golden.head, golden.tensors
    examples, patch_labels = [], []
    grids = golden.grids("train")
    for row, grid in enumerate(grids):
        real = tensors["train.attention_mask"][row].bool()
        ids, labels = (tensors[f"train.{key}"][row][real].tolist() for key in ("input_ids", "labels"))
        prefix, rest = split(golden, ids, grid)
        slots = tuple(i for i, index in enumerate(rest) if index == head.seg_id)
        masks = [tensors[f"train.mask_{row}_{i}"].numpy() for i in range(len(slots))]
        size = masks[0].shape
        canvas = golden.canvas(grid, size)
        targets = [cell_labels(Mask.from_array(mask), canvas, grid, "centre_strict") for mask in masks]
        patch_labels += [(tensors[f"train.patch_labels_{row}_{i}"].numpy(), t) for i, t in enumerate(targets)]
        block = DenseBlock(head.mask_id, head.grid.offsets(grid, 3))
        suffix = Suffix(rest, tuple(labels[len(prefix) :]), (0,) * len(slots), slots, block, tuple(range(len(slots))))
        example = Example(
            *("all_mask", Sample("", size), canvas, np.zeros((3, 1, 1), np.float32)),
            prefix=prefix,
            suffixes=(suffix,),
            targets=tuple(targets),
            prefix_labels=tuple(labels[: len(prefix)]),  # the reference supervises the prefix too
        )
        examples.append(example)
    return collate(examples, golden.backbone.codec), grids, patch_labels


def test_stamp_model_training(golden, monkeypatch):
    """One forward pass gives the losses, features and positions that the reference computes in two."""
    batch, grids, patch_labels = training_batch(golden)
    for stored, ours in patch_labels:
        assert np.array_equal(stored, ours)
    features = golden.features(monkeypatch, range(len(grids)), grids)
    for row, grid in enumerate(grids):
        golden.close(features.tokens[row, : grid[0] * grid[1]], f"train.image_features_{row}", "image_features")
    for row in range(len(grids)):
        real = golden.tensors["train.attention_mask"][row].bool()
        stored = golden.tensors["train.position_ids"][:, row, real]
        assert torch.equal(batch.positions[:, row, : stored.shape[1]], stored)
    monkeypatch.setattr(golden.backbone, "encode_images", lambda *_: features)
    with torch.no_grad():
        losses = golden.head.loss(golden.backbone, batch)
        states = golden.backbone(batch, features, golden.head.dense_features(features)).states
    golden.close(losses["ce"], "train.loss_lm", "losses")
    golden.close(losses["bce"] + losses["dice"], "train.loss_seg", "losses")
    golden.close(losses["ce"] + losses["bce"] + losses["dice"], "train.total", "losses")
    predicting = golden.backbone.logits(states[batch.slot_rows, batch.slot_positions - 1])
    golden.close(predicting, "train.seg_predicting_logits", "step_logits")


def official_rows(golden, batch):
    """For each row of the reference's mask pass: row of the packed batch, and places of its tokens there."""
    places = []
    for row, slot, start in zip(batch.slot_rows.tolist(), batch.slot_positions.tolist(), batch.dense_starts.tolist()):
        grid = golden.grids("train")[row]
        dense = batch.dense_positions[row, start : start + grid[0] * grid[1]].tolist()
        places.append((row, [*range(slot + 1), *dense]))
    return places


def test_stamp_model_mask_rows(golden, monkeypatch):
    """Logits, positions and attention of the packed mask blocks are those of the reference's separate rows."""
    batch, grids, _ = training_batch(golden)
    features = golden.features(monkeypatch, range(len(grids)), grids)
    with torch.no_grad():
        states = golden.backbone(batch, features, golden.head.dense_features(features)).states
    allowed, tensors = batch.visibility.allowed(), golden.tensors
    logits = []
    for index, (row, places) in enumerate(official_rows(golden, batch)):
        real = tensors["full.attention_mask"][index].bool()
        assert tensors["full.row_image"][index] == row and int(real.sum()) == len(places)
        assert torch.equal(batch.ids[row, places], tensors["full.input_ids"][index, real])
        assert torch.equal(batch.positions[:, row, places], tensors["full.position_ids"][:, index, real])
        stored = tensors["full.attention_allowed"][index].bool()[real][:, real]
        assert torch.equal(allowed[row][places][:, places], stored)
        is_mask = tensors["full.mask_token_map"][index, real].bool()
        logits.append(golden.head.classifier(states[row, places])[is_mask, 0])
    golden.close(torch.cat(logits), "full.bi_logits", "bi_logits")


def start_dialogue(golden, monkeypatch):
    prompt = golden.tensors["cached.prompt_ids"].tolist()
    grid = golden.grids("cached")[0]
    image = next(i for i, g in enumerate(golden.grids("train")) if g == grid)
    features = golden.features(monkeypatch, [image], [grid])
    prefix_ids, rest = split(golden, prompt, grid)
    prefix = golden.backbone.prefill(features, [prefix_ids])
    generated = golden.backbone.generate(prefix, [[rest]], max_new_tokens=golden.head.max_new_tokens, keep=True)
    ids, places = generated.ids[0][0], generated.places[0][0]
    triggers = [
        Trigger(0, generated.first, place=len(prefix_ids) + i)
        for i, index in enumerate(rest)
        if index == golden.head.seg_id
    ]
    triggers += find_triggers(golden.head, 0, generated.first, ids, places)
    return prompt, prefix, generated, triggers, grid


def test_stamp_model_cached(golden, monkeypatch):
    """Dialogue, then all masks in one pass on its cache: the reference's tokens, logits, positions and masks."""
    prompt, prefix, generated, triggers, grid = start_dialogue(golden, monkeypatch)
    assert prompt + generated.ids[0][0] == golden.tensors["cached.sequence"].tolist()
    golden.close(golden.backbone.logits(generated.states[0][0]), "cached.step_logits", "step_logits")
    mark = prefix.mark()
    logits = golden.head.cell_logits(golden.backbone, prefix, triggers)
    assert prefix.length == mark.length and prefix.cache.get_seq_length() == mark.length
    assert len(triggers) == len(golden.tensors["cached.seg_index"])
    for q, cells in enumerate(logits):
        golden.close(cells.flatten(), f"cached.bi_logits_{q}", "bi_logits")
        golden.close(cells.flatten(), f"cached.full_pass_logits_{q}", "bi_logits")
        assert torch.equal((cells[0] > 0).to(torch.uint8), golden.tensors[f"cached.mask_{q}"])
    alone = [golden.head.cell_logits(golden.backbone, prefix, [trigger])[0] for trigger in triggers]
    for together, single in zip(logits, alone):  # K blocks in one pass = K passes
        assert (together - single).abs().max() <= golden.tolerance["bi_logits"]
    assert prefix.features.grids == (grid,)


def test_stamp_model_positions(golden, monkeypatch):
    """Rotary positions of mask tokens: they go on counting behind their trigger, on all axes."""
    _, prefix, _, triggers, _ = start_dialogue(golden, monkeypatch)
    seen = []
    run = golden.backbone._run

    def spy(embeds, visibility, positions, *args, **kwargs):
        seen.append(positions)
        return run(embeds, visibility, positions, *args, **kwargs)

    monkeypatch.setattr(golden.backbone, "_run", spy)
    for q, trigger in enumerate(triggers):
        golden.head.cell_logits(golden.backbone, prefix, [trigger])
        ours = seen[-1].reshape(-1, seen[-1].shape[-1])[0, len(trigger.lead) :]
        stored = golden.tensors[f"cached.mask_position_ids_{q}"]
        assert torch.equal(ours.expand(3, -1), stored)


def test_stamp_model_canary(golden, monkeypatch):
    """A causal mask pass, 2-D positions or a missing visual feature give other numbers: none can hide behind tolerances."""
    _, prefix, _, triggers, grid = start_dialogue(golden, monkeypatch)
    right = golden.head.cell_logits(golden.backbone, prefix, triggers)
    changes = []
    golden.head.is_bidirectional = False
    changes.append(golden.head.cell_logits(golden.backbone, prefix, triggers))
    golden.head.is_bidirectional = True
    blind = torch.zeros(1, grid[0] * grid[1], golden.backbone.text_width)
    changes.append(golden.head.cell_logits(golden.backbone, prefix, triggers, blind))
    monkeypatch.setattr(golden.head, "grid", type(golden.head.grid)(position="grid"))
    changes.append(golden.head.cell_logits(golden.backbone, prefix, triggers))
    for wrong in changes:
        assert (torch.stack(wrong) - torch.stack(right)).abs().mean() > 0.1


@pytest.mark.parametrize("path", golden_files("stamp_labels_sam*"), ids=lambda path: path.stem)
def test_stamp_labels(path):
    """Labels of the reference's rule, and its loss."""
    tensors, meta = read_golden(path)
    for j, case in enumerate(meta["label_cases"]):
        size, grid = tuple(case["mask_size"]), tuple(case["grid"])
        mask = Mask.from_array(unpack_bits(tensors[f"label{j}.mask_bits"], size))
        canvas = Canvas(
            Image.new("RGB", (grid[1] * 28, grid[0] * 28)), size, (grid[1] * 28 / size[1], grid[0] * 28 / size[0])
        )
        ours = cell_labels(mask, canvas, grid, "centre_strict")
        assert np.array_equal(ours, tensors[f"label{j}.labels_tolerant"].numpy()), case
        labels = tensors[f"label{j}.labels"]
        losses = binary_loss(tensors[f"label{j}.logits"].reshape(1, -1), labels.reshape(1, -1))
        total = float(0.3 * losses["bce"] + 0.7 * losses["dice"])
        assert abs(total - float(tensors[f"label{j}.loss"])) <= meta["tolerance"]["loss"], case


def test_stamp_gather_helper():
    """The padded gather that the head reads mask tokens with."""
    states = torch.arange(12.0).view(2, 3, 2)
    picked = gather(states, torch.tensor([[2, -1], [0, 1]]))
    assert picked.tolist() == [[[4, 5], [0, 0]], [[6, 7], [8, 9]]]
