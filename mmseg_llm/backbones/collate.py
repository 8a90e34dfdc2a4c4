"""Packing: the dialogue branches of an image lie behind its prefix in one sequence, isolated from each other.

Legend: B rows (one image each), N tokens, Q answer slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mmseg_llm.backbones.codec import IGNORE_INDEX, Codec
from mmseg_llm.backbones.visibility import Visibility
from mmseg_llm.structures import Batch, Example


def collate(examples: Sequence[Example], codec: Codec, label_padding: int = IGNORE_INDEX) -> Batch:
    """Collate examples of one head.

    Args:
        examples: not empty.
        codec: of the backbone they were built for.
        label_padding: label at padding (the reference used 0, MLLMSeg specification section 4).

    Returns:
        The batch; each row holds prefix + suffixes, padded on the right.
    """
    assert examples and len({example.head for example in examples}) == 1
    shape = (len(examples), max(example.num_tokens for example in examples))
    ids = np.full(shape, codec.pad_id, np.int64)
    labels = np.full(shape, label_padding, np.int64)
    positions = np.zeros(shape, np.int64)
    block = np.full(shape, -1, np.int64)
    rows: list[int] = []
    slots: list[int] = []
    queries: list[int] = []
    for row, example in enumerate(examples):
        start = len(example.prefix)
        ids[row, :start] = example.prefix
        labels[row, :start] = IGNORE_INDEX
        positions[row, :start] = np.arange(start)
        block[row, :start] = 0
        for index, suffix in enumerate(example.suffixes, 1):
            stop = start + len(suffix.ids)
            ids[row, start:stop] = suffix.ids
            labels[row, start:stop] = suffix.labels
            positions[row, start:stop] = len(example.prefix) + np.arange(len(suffix.ids))
            block[row, start:stop] = index
            rows += [row] * len(suffix.slots)
            slots += [start + slot for slot in suffix.slots]
            queries += suffix.query_ids
            start = stop
    context = codec.token_id(codec.template.image_context)
    image_positions = np.stack([np.flatnonzero(np.asarray(example.prefix) == context) for example in examples])
    num_blocks = 1 + max(len(example.suffixes) for example in examples)
    return Batch(
        head=examples[0].head,
        ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        positions=torch.from_numpy(positions),
        visibility=Visibility.branches(torch.from_numpy(block), num_blocks),
        pixels=torch.from_numpy(np.stack([example.pixels for example in examples])),
        image_positions=torch.from_numpy(image_positions),
        slot_rows=torch.tensor(rows, dtype=torch.long),
        slot_positions=torch.tensor(slots, dtype=torch.long),
        slot_queries=torch.tensor(queries, dtype=torch.long),
        targets=[target for example in examples for target in example.targets],
        samples=[example.sample for example in examples],
    )
