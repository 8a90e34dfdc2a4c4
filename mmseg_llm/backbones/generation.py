"""Decoding of many branches of many images at once, behind their cached prefixes.

Branches are greedy or sampled, each with a seed of its own, so that what one says does not depend on what is decoded beside it.
Where a constraint leaves one way on only, nothing is decided: such tokens are run together with the one before them.

Legend: B images, K branches, T tokens of an answer, M new tokens of a pass, n branches that go on, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from mmseg_llm.backbones.base import Backbone
    from mmseg_llm.backbones.prefix import Prefix


class Constraint(Protocol):
    """Which answers are possible."""

    def allowed(self, ids: Sequence[int]) -> Sequence[int] | None:
        """Token ids that may follow an answer's first tokens `ids`, at least one; None where any may."""


@dataclass(frozen=True)
class Sampling:
    """How the next token of a seeded branch is drawn.

    Attributes:
        temperature: logits are divided by it; > 0.
        top_p: only the likeliest tokens that together reach this probability are drawn from.
    """

    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Raises: ValueError for values out of range."""
        if not self.temperature > 0:
            raise ValueError(
                f"temperature is {self.temperature}; it must be above 0 (branches without seed are greedy)"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must lie in (0, 1]")


DEFAULT_SAMPLING = Sampling()


@dataclass
class Generated:
    """What `Backbone.generate` returns.

    Attributes:
        ids: `ids[row][branch]` generated token ids, the end token included when it was reached.
        states: `states[row][branch]` `(T, D)`: the state that emitted each of these tokens.
        chances: `chances[row][branch]` probability of each of these tokens among those that were possible.
        places: `places[row][branch]` where each of these tokens lies in the cache; -1 for the last one, which nothing has been
            computed from yet. Meaningful as long as the branches are kept.
        first: block of the first branch.
    """

    ids: list[list[list[int]]]
    states: list[list[torch.Tensor]] = field(default_factory=list)
    chances: list[list[list[float]]] = field(default_factory=list)
    places: list[list[list[int]]] = field(default_factory=list)
    first: int = 0


@dataclass
class _Branch:
    """An answer that grows."""

    row: int
    index: int
    emitter: int  # of the next token: index into all states so far
    generator: torch.Generator | None
    constraint: Constraint | None
    ids: list[int] = field(default_factory=list)
    emitters: list[int] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)  # said, not run yet
    is_over: bool = False


@torch.no_grad()
def generate(
    backbone: Backbone,
    prefix: Prefix,
    suffixes: Sequence[Sequence[Sequence[int]]],
    *,
    max_new_tokens: int,
    stop: Sequence[int] = (),
    constraints: Sequence[Sequence[Constraint]] | None = None,
    keep: bool = False,
    first: int | None = None,
    seeds: Sequence[Sequence[int | None]] | None = None,
    sampling: Sampling = DEFAULT_SAMPLING,
) -> Generated:
    """See `Backbone.generate`."""
    mark = prefix.mark()
    count = max(len(row) for row in suffixes)
    if first is None:
        first = prefix.open_branches(count)
    latest = _prompt_branches(backbone, prefix, suffixes, first).flatten(0, 1)  # (B K, D)
    branches = [
        _Branch(
            *(i, k, i * count + k),
            _generator(seeds[i][k] if seeds else None),
            constraints[i][k] if constraints else None,
        )
        for i, row in enumerate(suffixes)
        for k in range(len(row))
    ]
    ends = {backbone.codec.end_id, *stop}
    states, offset = [latest], 0
    while alive := [branch for branch in branches if not branch.is_over]:
        at = torch.tensor([branch.emitter - offset for branch in alive], device=latest.device)
        chosen = _choose(backbone.logits(latest[at]), alive, sampling)
        for branch, token, chance in zip(alive, *chosen, strict=True):
            _say(branch, token, chance, ends, max_new_tokens)
        if not any(branch.pending for branch in alive):
            break
        offset += len(latest)
        latest = _run_pending(backbone, prefix, alive, len(suffixes), first, offset)
        states.append(latest)
    if not keep:
        prefix.rollback(mark)
    return _gather(branches, torch.cat(states), [len(row) for row in suffixes], first)


def _generator(seed: int | None) -> torch.Generator | None:
    return None if seed is None else torch.Generator().manual_seed(seed)


def _choose(logits: torch.Tensor, branches: Sequence[_Branch], sampling: Sampling) -> tuple[list[int], list[float]]:
    """The next token of each branch, and its probability, from its logits `(n, vocabulary)`, which are written to."""
    groups: dict[tuple[int, ...], list[int]] = {}  # branches that may go on alike are dealt with at once
    for row, branch in enumerate(branches):
        allowed = None if branch.constraint is None else branch.constraint.allowed(branch.ids)
        if allowed is not None:
            groups.setdefault(tuple(allowed), []).append(row)
    for allowed, rows in groups.items():
        at = torch.tensor(rows, device=logits.device)[:, None], torch.tensor(allowed, device=logits.device)
        kept = logits[at]
        logits[at[0][:, 0]] = -torch.inf
        logits[at] = kept
    drawn = [row for row, branch in enumerate(branches) if branch.generator is not None]
    values = logits
    if drawn:  # the largest of logits with Gumbel noise is a draw from their softmax
        kept = _nucleus(logits[drawn] / sampling.temperature, sampling.top_p)
        noise = torch.stack([torch.rand(logits.shape[1], generator=branches[row].generator) for row in drawn])
        values = logits.clone()
        values[drawn] = kept - (-noise.clamp(min=1e-20).log()).clamp(min=1e-20).log().to(logits.device)
    chosen = values.argmax(-1)
    chances = (logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(-1)).exp()
    return chosen.tolist(), chances.tolist()


def _nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Logits `(n, vocabulary)` with all but the likeliest tokens of total probability `top_p` at minus infinity."""
    if top_p >= 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True)
    chances = ordered.softmax(-1)
    is_out = chances.cumsum(-1) - chances >= top_p  # the token that reaches it stays
    return torch.empty_like(logits).scatter(-1, order, ordered.masked_fill(is_out, -torch.inf))


def _say(branch: _Branch, token: int, chance: float, ends: set[int], most: int) -> None:
    """Add a token and all that must follow it; what has to be run before the next decision is pending."""
    run = [token]
    while len(branch.ids) + len(run) < most and run[-1] not in ends and branch.constraint is not None:
        allowed = branch.constraint.allowed([*branch.ids, *run])
        if allowed is None or len(allowed) != 1:
            break
        run.append(allowed[0])
    branch.ids += run
    branch.chances += [chance] + [1.0] * (len(run) - 1)
    branch.is_over = run[-1] in ends or len(branch.ids) == most
    branch.pending = run[: len(run) - branch.is_over]
    branch.emitters.append(branch.emitter)
    if branch.is_over:
        branch.places += [-1] * (len(run) - len(branch.pending))


def _run_pending(
    backbone: Backbone, prefix: Prefix, branches: Sequence[_Branch], num_rows: int, first: int, offset: int
) -> torch.Tensor:
    """Run what was said; the states `(B M, D)`, which are numbered from `offset` on."""
    rows: list[list[tuple[int, int]]] = [[] for _ in range(num_rows)]
    spans: list[tuple[_Branch, int]] = []
    for branch in branches:
        spans.append((branch, len(rows[branch.row])))
        rows[branch.row] += [(first + branch.index, token) for token in branch.pending]
    width = max(len(row) for row in rows)
    packed = [row + [(-1, backbone.codec.pad_id)] * (width - len(row)) for row in rows]
    block, ids = torch.tensor(packed, device=prefix.states.device).unbind(-1)  # (B, M) each
    start = prefix.length
    states = backbone.extend(prefix, block, ids=ids)
    for branch, column in spans:
        count = len(branch.pending)
        if not count:
            continue
        numbers = [offset + branch.row * width + column + j for j in range(count)]
        places = [start + column + j for j in range(count)]
        tail = branch.places  # the place of a last token that is not run stands behind those of the run
        branch.places = [*tail[: len(tail) - branch.is_over], *places, *tail[len(tail) - branch.is_over :]]
        forced = numbers if branch.is_over else numbers[:-1]
        branch.emitters += forced
        branch.emitter, branch.pending = numbers[-1], []
    return states.flatten(0, 1)


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


def _gather(branches: Sequence[_Branch], states: torch.Tensor, counts: Sequence[int], first: int) -> Generated:
    """Branches back in the order of their prompts."""
    found = iter(branches)
    rows = [[next(found) for _ in range(count)] for count in counts]
    return Generated(
        ids=[[branch.ids for branch in row] for row in rows],
        states=[[states[torch.tensor(branch.emitters, device=states.device)] for branch in row] for row in rows],
        chances=[[branch.chances for branch in row] for row in rows],
        places=[[branch.places for branch in row] for row in rows],
        first=first,
    )
