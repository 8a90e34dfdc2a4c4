"""Qwen-VL-Chat: a ViT and a resampler of 256 learned queries in front of a stock Qwen2 decoder (SegAgent specification section
10.1).

Sources: a size of `sizes.QWEN_VL_CHAT` (random weights, nothing to download), a local folder or a hub id, in the official layout
(`model_type: qwen`; also one folder deep, as mirrors nest it) or as this library saves it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from mmseg_llm.backbones.adapters import Lora, Trainable
from mmseg_llm.backbones.base import Backbone
from mmseg_llm.backbones.chat import TEMPLATES, ChatTemplate
from mmseg_llm.backbones.codec import CODEC_FILE, Codec, load_tokenizer, tiny_tokenizer
from mmseg_llm.backbones.coordinates import CoordinateCodec
from mmseg_llm.backbones.features import VisionFeatures
from mmseg_llm.backbones.image_geometry import CLIP_STATISTICS, ImageGeometry
from mmseg_llm.backbones.loading import cast, check_type, load_stock, read_settings
from mmseg_llm.backbones.qwen_tiktoken import IMAGE_TOKENS, qwen_tokenizer
from mmseg_llm.backbones.qwen_vl_chat_layout import checkpoint_folder, convert_config, load_official
from mmseg_llm.backbones.sizes import HUB_SOURCES, QWEN_VL_CHAT
from mmseg_llm.backbones.visibility import Visibility, check_attention

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from mmseg_llm.backbones.qwen_vl_chat_model import QwenVlChatConfig, QwenVlChatForCausalLM
    from mmseg_llm.masks import Size


class QwenVlChatBackbone(Backbone):
    """Qwen-VL-Chat at its one image size, stretched. Image tokens stand for cells of a grid only loosely: they are queries.

    Args:
        source: name of a size, folder, or hub id.
        weights: `pretrained` loads them; `random` builds the architecture only (sizes are always random).
        template: chat template, a key of `chat.TEMPLATES`; its image tokens must be in the vocabulary.
        attention: of the language model: `sdpa`, `eager` or `flex_attention`; the vision tower always takes `sdpa`.
        dtype: storage type of the weights.
        lora: adapters on the language model; then set `trainable.language` and `trainable.embeddings` to false.
        trainable: what trains in full.
        gradient_checkpointing: recompute activations of vision tower and language model in the backward pass.

    Raises:
        ValueError: for an unknown source, attention or template, weights that do not fit the config, a missing tokenizer file, or
            a tokenizer of another vocabulary.
    """

    def __init__(
        self,
        source: str = "qwen-vl-chat-tiny",
        *,
        weights: Literal["pretrained", "random"] = "pretrained",
        template: str = "qwen_vl_chat",
        attention: str = "sdpa",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        lora: Lora | None = None,
        trainable: Trainable | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        check_attention(attention)
        if template not in TEMPLATES:
            raise ValueError(f"unknown chat template '{template}'; use one of {', '.join(TEMPLATES)}")
        self.source = source
        model, codec = _Builder(getattr(torch, dtype), TEMPLATES[template])(source, weights == "random")
        super().__init__(
            model,
            codec,
            vision_width=model.config.vision_config.hidden_size,
            text_width=model.config.text_config.hidden_size,
            attention=attention,
            lora=lora,
            trainable=trainable,
            gradient_checkpointing=gradient_checkpointing,
        )

    @property
    def language_model(self) -> PreTrainedModel:
        """The decoder stack."""
        return self.model.model.language_model

    @property
    def vision_tower(self) -> nn.Module:
        """The vision transformer."""
        return self.model.model.vision_tower

    @property
    def projector(self) -> nn.Module:
        """The resampler, its norm and its projection."""
        return self.model.model.projector

    def encode_images(self, pixels: torch.Tensor, canvas_sizes: Sequence[Size] | None = None) -> VisionFeatures:
        """One pass of vision tower and resampler: patch states `(B, P, V)`, tokens `(B, T, D)` by the places of their queries."""
        trains = self.trainable.vision or self.trainable.projector
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
            patches = self.vision_tower(pixels)
            tokens = self.projector(patches)
        return VisionFeatures(patches, tokens, (self.codec.geometry.token_grid(),) * len(pixels))

    def _run(
        self, embeds: torch.Tensor, visibility: Visibility, positions: torch.Tensor, cache: Any = None, **deep: Any
    ) -> torch.Tensor:
        """See the base class.

        Raises:
            ValueError: if a token lies behind the length up to which the original is a Qwen2.
        """
        bound = self.codec.context
        # positions never exceed the packed length, so that short sequences cost no synchronisation with the device
        if visibility.block.shape[1] > bound and (length := int(positions.max()) + 1) > bound:
            raise ValueError(
                f"a sequence of {length} tokens is longer than the {bound} of '{self.source}', behind which the original "
                "rescales its attention in a way that is not built here; shorten the text, or ask in dialogues of their own"
            )
        return super()._run(embeds, visibility, positions, cache, **deep)


class _Builder:
    """Makes model and codec from any source."""

    def __init__(self, dtype: torch.dtype, template: ChatTemplate) -> None:
        self.dtype, self.template = dtype, template

    def __call__(self, source: str, is_random: bool) -> tuple[QwenVlChatForCausalLM, Codec]:
        size = source if source in QWEN_VL_CHAT else HUB_SOURCES.get(source) if is_random else None
        if size is not None:
            return self._from_size(QWEN_VL_CHAT[size])
        folder = checkpoint_folder(source, not is_random, QWEN_VL_CHAT)
        settings = read_settings(folder)
        if check_type(source, settings, ("qwen_vl_chat", "qwen")) == "qwen":
            return self._from_official(folder, settings, is_random)
        return self._from_saved(folder, is_random)

    def _build(self, config: QwenVlChatConfig) -> QwenVlChatForCausalLM:
        from mmseg_llm.backbones.qwen_vl_chat_model import QwenVlChatForCausalLM

        # in its storage type from the start: 9.6 billion parameters are not held in float32 first
        model = QwenVlChatForCausalLM._from_config(copy.deepcopy(config), dtype=self.dtype)
        if not model.lm_head.weight.is_meta:
            model.init_vision()
        cast(model, self.dtype)  # the fixed positions are computed in float32
        return model

    def _from_size(self, spec: dict[str, Any]) -> tuple[QwenVlChatForCausalLM, Codec]:
        from mmseg_llm.backbones.qwen_vl_chat_model import QwenVlChatConfig

        tokenizer = tiny_tokenizer(self.template)
        _add_tokens(tokenizer, IMAGE_TOKENS)
        text = spec["text"] | {"vocab_size": max(spec["text"]["vocab_size"], len(tokenizer))}
        text |= {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
        config = QwenVlChatConfig(vision_config=dict(spec["vision"]), text_config=text)
        codec = self._codec(tokenizer, config)
        return self._build(config), codec

    def _from_saved(self, folder: Path, is_random: bool) -> tuple[QwenVlChatForCausalLM, Codec]:
        from mmseg_llm.backbones.qwen_vl_chat_model import QwenVlChatConfig, QwenVlChatForCausalLM

        config = QwenVlChatConfig.from_pretrained(folder)
        is_codec = (folder / CODEC_FILE).is_file()
        codec = Codec.load(folder) if is_codec else self._codec(load_tokenizer(folder), config)
        if is_random:
            return self._build(config), codec
        model: Any = load_stock(QwenVlChatForCausalLM, folder, self.dtype)[0]
        cast(model, self.dtype)
        return model, codec

    def _from_official(
        self, folder: Path, settings: dict[str, Any], is_random: bool
    ) -> tuple[QwenVlChatForCausalLM, Codec]:
        from mmseg_llm.backbones.qwen_vl_chat_model import QwenVlChatConfig, QwenVlChatForCausalLM

        arguments = convert_config(settings, str(folder))
        config = QwenVlChatConfig(**arguments)
        codec = self._codec(qwen_tokenizer(folder), config)
        self._check_vocabulary(folder, settings, codec)
        if is_random:
            return self._build(config), codec
        with torch.device("meta"):
            model = QwenVlChatForCausalLM(config)
        decoder = model.model.language_model
        decoder.rotary_emb = type(decoder.rotary_emb)(config=decoder.config)  # its frequencies are in no file
        load_official(model, folder, self.dtype, arguments["vision_config"]["num_attention_heads"])
        return model.eval(), codec  # type: ignore[return-value]

    @staticmethod
    def _check_vocabulary(folder: Path, settings: dict[str, Any], codec: Codec) -> None:
        """Raises: ValueError if tokenizer and config are not of one checkpoint."""
        found, stored = codec.token_id("<img>"), settings["visual"].get("image_start_id")
        if stored is not None and found != stored:
            raise ValueError(
                f"the tokenizer in {folder} gives <img> the id {found} but its config.json says {stored}; "
                "use the tokenizer and the config of one checkpoint"
            )
        if len(codec.tokenizer) > settings["vocab_size"]:
            raise ValueError(
                f"the tokenizer in {folder} has {len(codec.tokenizer)} tokens, the embeddings have {settings['vocab_size']} "
                "rows; use the tokenizer and the config of one checkpoint"
            )

    def _codec(self, tokenizer: Any, config: QwenVlChatConfig) -> Codec:
        """The codec; the config learns the id of the image placeholder.

        Raises:
            ValueError: if the queries do not lie over the patches as a grid.
        """
        vision: Any = config.vision_config
        side, patch = vision.image_size, vision.patch_size
        merge = max(1, round(side / patch / vision.num_queries**0.5))
        if (side // (patch * merge)) ** 2 != vision.num_queries or side % (patch * merge):
            raise ValueError(
                f"{vision.num_queries} queries are no grid over an image of {side} pixels with patches of {patch}; "
                "use the unchanged config.json of a Qwen-VL-Chat"
            )
        means: dict[str, Any] = CLIP_STATISTICS
        geometry = ImageGeometry((side, side), patch, merge, **means)
        codec = Codec(tokenizer, geometry, self.template, CoordinateCodec(bins=1000))
        config.image_token_id = codec.token_id(self.template.image_context)
        return codec


def _add_tokens(tokenizer: Any, names: Sequence[str]) -> None:
    from tokenizers import AddedToken

    known = tokenizer.get_vocab()
    tokens = [AddedToken(name, special=True, normalized=False) for name in names if name not in known]
    tokenizer.add_tokens(tokens, special_tokens=True)
