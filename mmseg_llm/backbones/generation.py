"""Greedy decoding of many branches of many images at once, behind their cached prefixes.

Legend: B images, K branches, T steps, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from mmseg_llm.backbones.base import Backbone
    from mmseg_llm.backbones.prefix import Prefix

Constraint = Callable[[torch.Tensor, list[list[int]]], torch.Tensor]


@dataclass
class Generated:
    """What `Backbone.generate` returns.

    Attributes:
        ids: `ids[row][branch]` generated token ids, the end token included when it was reached.
        states: `states[row][branch]` `(T, D)`: the state that emitted each of these tokens.
        places: `places[row][branch]` where each of these tokens lies in the cache; -1 for the last one, which nothing has been
            computed from yet. Meaningful as long as the branches are kept.
        first: block of the first branch.
    """

    ids: list[list[list[int]]]
    states: list[list[torch.Tensor]] = field(default_factory=list)
    places: list[list[list[int]]] = field(default_factory=list)
    first: int = 0


@torch.no_grad()
def generate(
    backbone: Backbone,
    prefix: Prefix,
    suffixes: Sequence[Sequence[Sequence[int]]],
    *,
    max_new_tokens: int,
    stop: Sequence[int] = (),
    constraint: Constraint | None = None,
    keep: bool = False,
    first: int | None = None,
) -> Generated:
    """See `Backbone.generate`."""
    mark = prefix.mark()
    if first is None:
        first = prefix.open_branches(max(len(row) for row in suffixes))
    last = _prompt_branches(backbone, prefix, suffixes, first)  # (B, K, D)
    alive = torch.tensor(
        [[k < len(row) for k in range(last.shape[1])] for row in suffixes], device=last.device
    )  # (B, K)
    ends = torch.tensor([backbone.codec.end_id, *stop], device=last.device)
    tokens: list[torch.Tensor] = []
    states: list[torch.Tensor] = []
    places: list[torch.Tensor] = []
    lives: list[torch.Tensor] = []
    for step in range(max_new_tokens):
        logits = backbone.logits(last[alive])  # (n, vocabulary)
        if constraint is not None:
            logits = constraint(logits, _collect(tokens, alive))
        token = torch.full(alive.shape, backbone.codec.pad_id, device=last.device)
        token[alive] = logits.argmax(-1)
        tokens.append(token)
        states.append(last)
        places.append(torch.full_like(token, -1))
        lives.append(alive)
        alive = alive & ~torch.isin(token, ends)
        if step + 1 == max_new_tokens or not alive.any():
            break
        columns = alive.any(0).nonzero()[:, 0]  # branches still running in some row
        block = torch.where(alive[:, columns], columns + first, -1)
        places[-1][:, columns] = torch.where(
            block >= 0, prefix.length + torch.arange(len(columns), device=block.device), -1
        )
        last = last.clone()
        last[:, columns] = backbone.extend(prefix, block, ids=token[:, columns])
    if not keep:
        prefix.rollback(mark)
    return _unpack(tokens, states, places, lives, [len(row) for row in suffixes], first)


def _prompt_branches(
    backbone: Backbone, prefix: Prefix, suffixes: Sequence[Sequence[Sequence[int]]], first: int
) -> torch.Tensor:
    """Run the prompts of all branches; the state of the last token of each, `(B, K, D)`."""
    lengths = [sum(len(branch) for branch in row) for row in suffixes]
    shape = (len(suffixes), max(lengths))
    ids = torch.full(shape, backbone.codec.pad_id)
    block = torch.full(shape, -1)
    ends = torch.zeros(len(suffixes), max(len(row) for row in suffixes), dtype=torch.long)
    for i, row in enumerate(suffixes):
        start = 0
        for k, branch in enumerate(row):
            ids[i, start : start + len(branch)] = torch.tensor(branch)
            block[i, start : start + len(branch)] = first + k
            start += len(branch)
            ends[i, k] = start - 1
    device = prefix.states.device
    states = backbone.extend(prefix, block.to(device), ids=ids.to(device))
    return states.gather(1, ends.to(device)[..., None].expand(-1, -1, states.shape[-1]))


def _collect(tokens: list[torch.Tensor], alive: torch.Tensor) -> list[list[int]]:
    """Ids generated so far of the branches in `alive`, in row-major order."""
    return torch.stack(tokens, -1)[alive].tolist() if tokens else [[] for _ in range(int(alive.sum()))]


def _unpack(
    tokens: list[torch.Tensor],
    states: list[torch.Tensor],
    places: list[torch.Tensor],
    lives: list[torch.Tensor],
    counts: list[int],
    first: int,
) -> Generated:
    """Cut the padded steps down to what each branch really generated."""
    ids = torch.stack(tokens, -1).tolist()  # (B, K, T)
    where = torch.stack(places, -1).tolist()
    lengths = torch.stack(lives, -1).sum(-1).tolist()
    all_states = torch.stack(states, 2)  # (B, K, T, D)
    return Generated(
        ids=[[ids[i][k][: lengths[i][k]] for k in range(count)] for i, count in enumerate(counts)],
        states=[[all_states[i, k, : lengths[i][k]] for k in range(count)] for i, count in enumerate(counts)],
        places=[[where[i][k][: lengths[i][k]] for k in range(count)] for i, count in enumerate(counts)],
        first=first,
    )
