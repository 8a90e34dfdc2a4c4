"""Backbone: one adapter per model family over a stock transformers model. Heads talk to this interface only.

Legend: B rows (one image each), N tokens, T image tokens, P patches, D language width, V vision width, K branches.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mmseg_llm.backbones.prefix import Generated, Prefix
from mmseg_llm.backbones.visibility import Visibility

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mmseg_llm.backbones.codec import Codec
    from mmseg_llm.structures import Batch

Constraint = Callable[[torch.Tensor, list[list[int]]], torch.Tensor]


@dataclass(frozen=True)
class VisionFeatures:
    """Both views of an image that heads use.

    Attributes:
        patches: `(B, P, V)` patch tokens of the last vision layer, raster order, before the projector.
        tokens: `(B, T, D)` projected tokens, as the language model gets them.
    """

    patches: torch.Tensor
    tokens: torch.Tensor

    def select(self, rows: torch.Tensor) -> VisionFeatures:
        """Features of some rows, in the order (and multiplicity) of `rows`."""
        return VisionFeatures(self.patches[rows], self.tokens[rows])


@dataclass(frozen=True)
class LanguageStates:
    """Result of one training pass: `states` `(B, N, D)` after the final norm, and the image `features`."""

    states: torch.Tensor
    features: VisionFeatures


class Backbone(nn.Module):
    """A vision encoder and a language model, assembled once.

    Subclasses set `model` (stock transformers), `codec`, `vision_width`, `text_width` and implement `encode_images`;
    prefix sharing, packing and decoding are the same for every family and live here.
    """

    model: PreTrainedModel
    codec: Codec
    vision_width: int
    text_width: int

    @abstractmethod
    def encode_images(self, pixels: torch.Tensor) -> VisionFeatures:
        """Run the vision tower and the projector once on `pixels` `(B, 3, h, w)`."""

    @property
    @abstractmethod
    def language_model(self) -> PreTrainedModel:
        """The decoder stack without the LM head."""

    @abstractmethod
    def prepare(self, tokens: Sequence[str]) -> int:
        """Give the heads' control tokens ids and rows, then freeze, adapt and unfreeze; called once by the model.

        Returns:
            How many of the tokens were not in the vocabulary before.
        """

    @abstractmethod
    def save_config(self, folder: Path) -> None:
        """Write what `source=folder, weights='random'` needs to build the same architecture again (no weights)."""

    @property
    def lm_head(self) -> nn.Module:
        """The LM head."""
        return self.model.get_output_embeddings()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def attention(self) -> str:
        """Attention implementation of the language model."""
        return self.language_model.config._attn_implementation

    def embed(
        self, ids: torch.Tensor, features: VisionFeatures | None = None, image_positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Input embeddings `(B, N, D)`, the image tokens at `image_positions` `(B, T)` replaced by the projected ones."""
        embeds = self.model.get_input_embeddings()(ids)
        if features is None:
            return embeds
        assert image_positions is not None and image_positions.shape[1] == features.tokens.shape[1]
        index = image_positions[..., None].expand(-1, -1, embeds.shape[-1])
        return embeds.scatter(1, index, features.tokens.to(embeds.dtype))

    def _run(
        self, embeds: torch.Tensor, visibility: Visibility, positions: torch.Tensor, cache: Any = None
    ) -> torch.Tensor:
        """Post-norm states `(B, N, D)` of the last N tokens of `visibility`; the others are in the cache."""
        mask = visibility.render(self.attention, embeds.dtype, num_queries=embeds.shape[1])
        name = "cache" if "cache" in inspect.signature(self.language_model.forward).parameters else "past_key_values"
        arguments = {name: cache, "use_cache": cache is not None}
        output = self.language_model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, **arguments)
        return output.last_hidden_state

    def forward(self, batch: Batch, features: VisionFeatures | None = None) -> LanguageStates:
        """One training pass over packed sequences under `batch.visibility`."""
        if features is None:
            features = self.encode_images(batch.pixels)
        embeds = self.embed(batch.ids, features, batch.image_positions)
        return LanguageStates(self._run(embeds, batch.visibility, batch.positions), features)

    def prefill(self, features: VisionFeatures, prompt: Sequence[int]) -> Prefix:
        """Cache the prompt shared by all branches of each image.

        Args:
            features: of B images.
            prompt: ids with the image placeholders of one image, the same for every row.
        """
        from transformers import DynamicCache

        batch = features.tokens.shape[0]
        ids = torch.tensor([list(prompt)], device=features.tokens.device).expand(batch, -1)
        context = self.codec.token_id(self.codec.template.image_context)
        image_positions = (ids[0] == context).nonzero()[:, 0].expand(batch, -1)
        if image_positions.shape[1] != features.tokens.shape[1]:
            raise ValueError(
                f"the prompt has {image_positions.shape[1]} image placeholders but the vision tower gives "
                f"{features.tokens.shape[1]} tokens; build it with codec.image_prefix()"
            )
        visibility = Visibility.causal(torch.ones_like(ids, dtype=torch.bool))
        cache = DynamicCache(config=self.language_model.config)
        positions = torch.arange(ids.shape[1], device=ids.device).expand(batch, -1)
        states = self._run(self.embed(ids, features, image_positions), visibility, positions, cache)
        return Prefix(
            cache=cache,
            visibility=visibility,
            next_position=positions[:, -1:] + 1,
            states=states,
            image_positions=image_positions,
            features=features,
        )

    def extend(
        self,
        prefix: Prefix,
        block: torch.Tensor,
        *,
        ids: torch.Tensor | None = None,
        embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run more tokens on a cached prefix, which grows by them.

        Args:
            prefix: as returned by `prefill`; give it blocks with `open_branches` first.
            block: `(B, M)` block of each new token, -1 at padding.
            ids, embeds: the tokens `(B, M)` or their embeddings `(B, M, D)`.

        Returns:
            Post-norm states `(B, M, D)`.
        """
        if embeds is None:
            assert ids is not None
            embeds = self.embed(ids)
        positions = prefix.append(block)
        return self._run(embeds, prefix.visibility, positions, prefix.cache)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Vocabulary logits, float32."""
        return self.lm_head(states).float()

    @torch.no_grad()
    def generate(
        self,
        prefix: Prefix,
        suffixes: Sequence[Sequence[Sequence[int]]],
        *,
        max_new_tokens: int = 32,
        stop: Sequence[int] = (),
        constraint: Constraint | None = None,
    ) -> Generated:
        """Greedy decoding of all branches of all images at once.

        Args:
            prefix: B rows; rolled back to its present length at the end.
            suffixes: `suffixes[row][branch]` prompt ids of each branch, none of them empty.
            max_new_tokens: bound per branch.
            stop: ids that end a branch beside the end of the turn.
            constraint: maps logits `(n, vocabulary)` and the ids so far of those n branches to changed logits.
        """
        mark = prefix.mark()
        first = prefix.open_branches(max(len(row) for row in suffixes))
        last = self._prompt_branches(prefix, suffixes, first)  # (B, K, D)
        alive = torch.tensor(
            [[k < len(row) for k in range(last.shape[1])] for row in suffixes], device=last.device
        )  # (B, K)
        ends = torch.tensor([self.codec.end_id, *stop], device=last.device)
        tokens: list[torch.Tensor] = []
        states: list[torch.Tensor] = []
        lives: list[torch.Tensor] = []
        for step in range(max_new_tokens):
            logits = self.logits(last[alive])  # (n, vocabulary)
            if constraint is not None:
                logits = constraint(logits, _collect(tokens, alive))
            token = torch.full(alive.shape, self.codec.pad_id, device=last.device)
            token[alive] = logits.argmax(-1)
            tokens.append(token)
            states.append(last)
            lives.append(alive)
            alive = alive & ~torch.isin(token, ends)
            if step + 1 == max_new_tokens or not alive.any():
                break
            columns = alive.any(0).nonzero()[:, 0]  # branches still running in some row
            block = torch.where(alive[:, columns], columns + first, -1)
            last = last.clone()
            last[:, columns] = self.extend(prefix, block, ids=token[:, columns])
        prefix.rollback(mark)
        return _unpack(tokens, states, lives, [len(row) for row in suffixes])

    def _prompt_branches(self, prefix: Prefix, suffixes: Sequence[Sequence[Sequence[int]]], first: int) -> torch.Tensor:
        """Run the prompts of all branches; the state of the last token of each, `(B, K, D)`."""
        lengths = [sum(len(branch) for branch in row) for row in suffixes]
        shape = (len(suffixes), max(lengths))
        ids = torch.full(shape, self.codec.pad_id)
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
        states = self.extend(prefix, block.to(device), ids=ids.to(device))
        return states.gather(1, ends.to(device)[..., None].expand(-1, -1, states.shape[-1]))


def _collect(tokens: list[torch.Tensor], alive: torch.Tensor) -> list[list[int]]:
    """Ids generated so far of the branches in `alive`, in row-major order."""
    return torch.stack(tokens, -1)[alive].tolist() if tokens else [[] for _ in range(int(alive.sum()))]


def _unpack(
    tokens: list[torch.Tensor], states: list[torch.Tensor], lives: list[torch.Tensor], counts: list[int]
) -> Generated:
    """Cut the padded steps down to what each branch really generated."""
    ids = torch.stack(tokens, -1).tolist()  # (B, K, T)
    lengths = torch.stack(lives, -1).sum(-1).tolist()
    all_states = torch.stack(states, 2)  # (B, K, T, D)
    return Generated(
        ids=[[ids[i][k][: lengths[i][k]] for k in range(count)] for i, count in enumerate(counts)],
        states=[[all_states[i, k, : lengths[i][k]] for k in range(count)] for i, count in enumerate(counts)],
    )
