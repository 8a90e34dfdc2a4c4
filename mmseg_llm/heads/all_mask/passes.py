"""The mask pass: all mask tokens of many masks of many images in one forward pass behind the cached dialogue.

Every mask is a block of its own: it sees the image, its branch of the dialogue up to its trigger, and itself (STAMP specification
section 2.2 and 2.4). Afterwards the cache is rolled back, so that the dialogue can go on as if nothing had happened.

Legend: B images, J masks of an image, M mask tokens of a mask, L lead tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from mmseg_llm.backbones.base import Backbone
    from mmseg_llm.backbones.prefix import Prefix

TOKENS_PER_PASS = 16384
"""Mask tokens that run together, over all images and masks of a batch, which bounds memory; at least one mask per image."""


@dataclass(frozen=True)
class Trigger:
    """A place in a dialogue that a mask hangs off.

    Attributes:
        row: image.
        block: branch of the dialogue.
        place: of the trigger in the cache; None when it is the last of `lead`.
        lead: tokens of the branch that are not cached yet and run in the same pass: the trigger that ended a generation, or a
            whole forced prompt.
    """

    row: int
    block: int
    place: int | None = None
    lead: tuple[int, ...] = ()


def mask_pass(
    backbone: Backbone,
    prefix: Prefix,
    triggers: Sequence[Trigger],
    *,
    token_id: int,
    features: torch.Tensor,
    offsets: Sequence[np.ndarray],
    bidirectional: bool,
    read: Callable[[torch.Tensor, int], torch.Tensor],
) -> list[torch.Tensor]:
    """Run the mask tokens of all triggers.

    Args:
        backbone: of the prefix.
        prefix: with the dialogue branches kept; unchanged afterwards.
        triggers: in any order.
        token_id: of the mask token.
        features: `(B, M, D)` what is added to its embedding.
        offsets: per image, `(A, M)` rotary positions behind the trigger.
        bidirectional: whether mask tokens see each other in both directions.
        read: turns states `(1, M, D)` of one mask and its row into whatever the caller wants of them.

    Returns:
        `read` of each trigger, in order.
    """
    results: dict[Trigger, torch.Tensor] = {}
    by_row: dict[int, list[Trigger]] = {}
    for trigger in dict.fromkeys(triggers):
        by_row.setdefault(trigger.row, []).append(trigger)
    rounds = max((len(found) for found in by_row.values()), default=0)
    longest = max((offset.shape[1] for offset in offsets), default=1)
    size = max(1, TOKENS_PER_PASS // (longest * max(1, len(by_row))))  # masks of an image at a time
    for start in range(0, rounds, size):
        part = {row: found[start : start + size] for row, found in by_row.items() if found[start : start + size]}
        mark = prefix.mark()
        plan = _Plan(prefix, part, [offset.shape[1] for offset in offsets])
        states = plan.run(backbone, prefix, token_id, features, offsets, bidirectional)
        prefix.rollback(mark)
        for row, found in part.items():
            for index, trigger in enumerate(found):
                results[trigger] = read(states[row, index, : offsets[row].shape[1]][None], row)
    return [results[trigger] for trigger in triggers]


class _Plan:
    """Layout of one pass: per image the lead tokens of its triggers, then one block of mask tokens for each."""

    def __init__(self, prefix: Prefix, part: dict[int, list[Trigger]], counts: Sequence[int]) -> None:
        self.batch = len(prefix.positions)
        self.width = max(len(found) for found in part.values())  # J
        self.count = max(counts[row] for row in part)  # M
        leads = {row: [index for trigger in found for index in trigger.lead] for row, found in part.items()}
        self.num_lead = max(len(lead) for lead in leads.values())
        self.lead_ids = torch.zeros(self.batch, self.num_lead, dtype=torch.long)
        self.lead_block = torch.full((self.batch, self.num_lead), -1)
        self.parents = torch.zeros(self.batch, self.width, dtype=torch.long)
        self.seen = torch.zeros(self.batch, self.width, dtype=torch.long)
        self.starts = torch.zeros(self.batch, self.width, dtype=torch.long)
        self.mask_block = torch.full((self.batch, self.width, self.count), -1)
        positions, following = prefix.positions.tolist(), prefix.next_position.tolist()
        first = prefix.visibility.num_blocks
        for row, found in part.items():
            at = 0
            for index, trigger in enumerate(found):
                end = at + len(trigger.lead)
                self.lead_ids[row, at:end] = torch.tensor(trigger.lead, dtype=torch.long)
                self.lead_block[row, at:end] = trigger.block
                self.parents[row, index] = trigger.block
                if trigger.place is None:
                    self.seen[row, index] = prefix.length + end
                    self.starts[row, index] = following[row][trigger.block] + len(trigger.lead)
                else:
                    self.seen[row, index] = trigger.place + 1
                    self.starts[row, index] = positions[row][trigger.place] + 1
                self.mask_block[row, index, : counts[row]] = first + index
                at = end

    def run(
        self,
        backbone: Backbone,
        prefix: Prefix,
        token_id: int,
        features: torch.Tensor,
        offsets: Sequence[np.ndarray],
        bidirectional: bool,
    ) -> torch.Tensor:
        """States `(B, J, M, D)` of the mask tokens."""
        device = prefix.positions.device
        lead_block, mask_block = self.lead_block.to(device), self.mask_block.flatten(1).to(device)
        shift = torch.zeros(len(offsets[0]), self.batch, self.width, self.count, dtype=torch.long)
        for row, offset in enumerate(offsets):
            shown = min(self.count, offset.shape[1])
            counted = np.arange(shown)
            shift[:, row, :, :shown] = torch.from_numpy(offset[:, :shown] - counted)[:, None]
        shift = torch.nn.functional.pad(shift.flatten(2), (self.num_lead, 0)).to(device)  # (A, B, L + J M)
        prefix.open_blocks(
            self.parents.to(device), self.seen.to(device), self.starts.to(device), bidirectional=bidirectional
        )
        mask = backbone.embed(torch.tensor([[token_id]], device=device))  # (1, 1, D)
        shown_features = features[:, : self.count].to(mask.dtype)
        embeds = (mask + shown_features)[:, None].expand(-1, self.width, -1, -1).flatten(1, 2)  # (B, J M, D)
        states = backbone.extend(
            prefix,
            torch.cat([lead_block, mask_block], dim=1),
            embeds=torch.cat([backbone.embed(self.lead_ids.to(device)), embeds], dim=1),
            shift=shift if shift.any() else None,
        )
        return states[:, self.num_lead :].unflatten(1, (self.width, self.count))
