"""Packing: the dialogue branches of an image lie behind its prefix in one sequence, isolated from each other, and the dense
queries of a head hang off their answer slots.

Legend: A rotary axes, B rows (one image each), N tokens, T image tokens, Q answer slots, M dense queries of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from mmseg_llm.backbones.codec import IGNORE_INDEX, Codec
from mmseg_llm.backbones.visibility import Visibility
from mmseg_llm.structures import Batch, Example


@dataclass
class _Row:
    """One packed image."""

    ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    block: np.ndarray
    image_positions: np.ndarray
    slots: list[int] = field(default_factory=list)
    queries: list[int] = field(default_factory=list)
    dense_positions: list[np.ndarray] = field(default_factory=list)
    dense_starts: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)


def _pack(example: Example, codec: Codec) -> _Row:
    count, start = example.num_tokens, len(example.prefix)
    row = _Row(
        ids=np.full(count, codec.pad_id, np.int64),
        labels=np.full(count, IGNORE_INDEX, np.int64),
        positions=np.zeros((codec.rope_axes, count), np.int64),
        block=np.zeros(count, np.int64),
        image_positions=np.flatnonzero(np.asarray(example.prefix) == codec.token_id(codec.template.image_context)),
    )
    row.ids[:start] = example.prefix
    if example.prefix_labels:
        row.labels[:start] = example.prefix_labels
    row.positions[:, :start], following = codec.positions(example.prefix, example.canvas.size)
    num_dense = 0
    for index, suffix in enumerate(example.suffixes, 1):
        stop = start + len(suffix.ids)
        row.ids[start:stop] = suffix.ids
        row.labels[start:stop] = suffix.labels
        row.positions[:, start:stop] = following + np.arange(len(suffix.ids))
        row.block[start:stop] = index
        row.slots += [start + slot for slot in suffix.slots]
        row.queries += suffix.query_ids
        starts: dict[int, int] = {}  # of the block behind each place; slots at one place share a block
        for slot in suffix.dense_slots:
            assert suffix.dense is not None
            place = suffix.slots[slot]
            row.parents.append(index)
            row.seen.append(start + place + 1)
            end = stop + suffix.dense.length
            row.ids[stop:end] = suffix.dense.token_id
            row.positions[:, stop:end] = following + place + 1 + suffix.dense.offsets
            row.block[stop:end] = len(example.suffixes) + len(row.parents)
            row.dense_positions.append(np.arange(stop, end))
            starts[place] = num_dense
            num_dense += suffix.dense.length
            stop = end
        row.dense_starts += [starts.get(place, -1) for place in suffix.slots]
        start = stop
    return row


def _pad(arrays: Sequence[np.ndarray], fill: int) -> torch.Tensor:
    """Arrays `(..., n)` of different n as one `(B, ..., max n)`."""
    longest = max(array.shape[-1] for array in arrays)
    out = np.full((len(arrays), *arrays[0].shape[:-1], longest), fill, np.int64)
    for row, array in enumerate(arrays):
        out[row, ..., : array.shape[-1]] = array
    return torch.from_numpy(out)


def _pixels(examples: Sequence[Example]) -> np.ndarray:
    """Canvases as `(B, 3, H, W)`, in the upper left corners where their sizes differ."""
    if len({example.pixels.shape for example in examples}) == 1:
        return np.stack([example.pixels for example in examples])
    height, width = (max(example.canvas.size[axis] for example in examples) for axis in (0, 1))
    out = np.zeros((len(examples), 3, height, width), np.float32)
    for row, example in enumerate(examples):
        out[row, :, : example.pixels.shape[1], : example.pixels.shape[2]] = example.pixels
    return out


def collate(examples: Sequence[Example], codec: Codec, label_padding: int = IGNORE_INDEX) -> Batch:
    """Collate examples of one head.

    Args:
        examples: not empty.
        codec: of the backbone they were built for.
        label_padding: label at padding (the reference used 0, MLLMSeg specification section 4).

    Returns:
        The batch; each row holds prefix + suffixes with their dense blocks, padded on the right.
    """
    assert examples and len({example.head for example in examples}) == 1
    rows = [_pack(example, codec) for example in examples]
    num_branches = 1 + max(len(example.suffixes) for example in examples)
    for row, example in zip(
        rows, examples, strict=True
    ):  # dense blocks are numbered behind the branches of the whole batch
        is_dense = row.block > len(example.suffixes)
        row.block[is_dense] += num_branches - 1 - len(example.suffixes)
    visibility = Visibility.branches(_pad([row.block for row in rows], -1), num_branches)
    if any(row.parents for row in rows):
        parents = _pad([np.asarray(row.parents, np.int64) for row in rows], 0)
        seen = _pad([np.asarray(row.seen, np.int64) for row in rows], 0)
        blocks = [suffix.dense for example in examples for suffix in example.suffixes if suffix.dense is not None]
        assert len({block.is_bidirectional for block in blocks}) == 1
        visibility = visibility.open_blocks(parents, seen, bidirectional=blocks[0].is_bidirectional)
    empty = np.zeros(0, np.int64)
    dense = [np.concatenate([empty, *row.dense_positions]) for row in rows]
    ranks = [np.concatenate([empty, *(np.arange(len(block)) for block in row.dense_positions)]) for row in rows]
    slots = [(i, slot, query) for i, row in enumerate(rows) for slot, query in zip(row.slots, row.queries, strict=True)]
    slot_rows, slot_positions, slot_queries = torch.tensor(slots, dtype=torch.long).reshape(-1, 3).unbind(1)
    return Batch(
        head=examples[0].head,
        ids=_pad([row.ids for row in rows], codec.pad_id),
        labels=_pad([row.labels for row in rows], label_padding),
        positions=_pad([row.positions for row in rows], 0).transpose(0, 1).contiguous(),
        visibility=visibility,
        pixels=torch.from_numpy(_pixels(examples)),
        canvas_sizes=[example.canvas.size for example in examples],
        image_positions=_pad([row.image_positions for row in rows], -1),
        slot_rows=slot_rows.contiguous(),
        slot_positions=slot_positions.contiguous(),
        slot_queries=slot_queries.contiguous(),
        dense_positions=_pad(dense, -1),
        dense_index=_pad(ranks, -1),
        dense_starts=torch.tensor([start for row in rows for start in row.dense_starts], dtype=torch.long),
        targets=[target for example in examples for target in example.targets],
        samples=[example.sample for example in examples],
    )
