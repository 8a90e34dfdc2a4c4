"""LLaVA composites on stock `LlavaForConditionalGeneration`: any plain vision encoder, two linear layers, any causal LM.

Sources: a size of `sizes.LLAVA` (random weights, nothing to download), a local folder or hub id in the llava-hf layout, or a
composition of a bare vision encoder and a bare causal LM, each a folder or hub id in its own stock layout, with a new projector
between them.

Legend: B images, P patches, T image tokens (T = P), V vision width, D language width.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from mmseg_llm.backbones.adapters import Lora, Trainable
from mmseg_llm.backbones.base import Backbone
from mmseg_llm.backbones.chat import TEMPLATES, ChatTemplate
from mmseg_llm.backbones.codec import CODEC_FILE, Codec, load_tokenizer, tiny_tokenizer
from mmseg_llm.backbones.coordinates import CoordinateCodec
from mmseg_llm.backbones.features import VisionFeatures
from mmseg_llm.backbones.image_geometry import CLIP_STATISTICS, HALF_STATISTICS, ImageGeometry
from mmseg_llm.backbones.loading import cast, check_type, load_stock, local_folder, read_settings, statistics
from mmseg_llm.backbones.sizes import HUB_SOURCES, LLAVA
from mmseg_llm.backbones.visibility import check_attention

if TYPE_CHECKING:
    from torch import nn
    from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedConfig, PreTrainedModel

    from mmseg_llm.masks import Size

# Of each vision encoder: tokens before the patches, besides registers, and channel statistics (ImageNet's where empty).
VISION_TYPES: dict[str, tuple[int, dict[str, Any]]] = {
    "clip_vision_model": (1, CLIP_STATISTICS),
    "siglip_vision_model": (0, HALF_STATISTICS),
    "dinov2": (1, {}),
    "dinov2_with_registers": (1, {}),
    "dinov3_vit": (1, {}),
}
# Parameters of vision encoders that no hidden state depends on: final norms, pooling heads, the token of masked pre-training.
UNUSED = re.compile(r"post_layernorm|^layernorm\.|^norm\.|(^|\.)head\.|mask_token")
VISION_PARENTS = ("clip", "siglip")  # text and vision in one folder, of which the vision part is taken
TEXT_TYPES = ("qwen2", "qwen3", "llama", "smollm3")
NO_SIZES = ("none for the parts of a composition",)


class LlavaBackbone(Backbone):
    """A composite of vision encoder, projector and language model at one fixed image size.

    Args:
        source: name of a size, folder, or hub id; `llava-tiny` when nothing is given. A folder that `save_config` wrote wins over
            `vision` and `language`, so that a saved run is built again from its own settings.
        vision: folder or hub id of a bare vision encoder; together with `language` and instead of `source`.
        language: folder or hub id of a bare causal LM.
        weights: `pretrained` loads them; `random` builds the architecture only (sizes are always random). The projector of a
            composition is always new.
        template: chat template, a key of `chat.TEMPLATES`; by the tokenizer when None.
        vision_feature_layer: index of the hidden state that is used, 0 for the input of the first layer; that of the source when
            None, -2 in a composition.
        attention: `sdpa`, `eager` or `flex_attention`.
        dtype: storage type of the weights.
        lora: adapters on the language model; then set `trainable.language` and `trainable.embeddings` to false.
        trainable: what trains in full.
        gradient_checkpointing: recompute activations of vision tower and language model in the backward pass.

    Raises:
        ValueError: for an unknown source, attention, template or kind of encoder or LM, half a composition, a layer that the
            encoder does not have, missing weights, or a tokenizer without control tokens.
    """

    def __init__(
        self,
        source: str | None = None,
        *,
        vision: str | None = None,
        language: str | None = None,
        weights: Literal["pretrained", "random"] = "pretrained",
        template: str | None = None,
        vision_feature_layer: int | None = None,
        attention: str = "sdpa",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        lora: Lora | None = None,
        trainable: Trainable | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        check_attention(attention)
        if template is not None and template not in TEMPLATES:
            raise ValueError(f"unknown chat template '{template}'; use one of {', '.join(TEMPLATES)}")
        is_composed = _is_composed(source, vision, language)
        self.source = f"{vision} + {language}" if is_composed else source or "llava-tiny"
        build = _Builder(getattr(torch, dtype), template, vision_feature_layer, weights == "random")
        model, codec = build.compose(str(vision), str(language)) if is_composed else build(self.source)
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
        rows = model.get_input_embeddings().weight.shape[0]
        needed = max(codec.token_id(name) for name in codec.template.control_tokens) + 1
        if needed > rows:
            self._grow(rows, needed)

    @property
    def language_model(self) -> PreTrainedModel:
        """The decoder stack."""
        return self.model.model.language_model

    @property
    def vision_tower(self) -> nn.Module:
        """The vision encoder."""
        return self.model.model.vision_tower

    @property
    def projector(self) -> nn.Module:
        """Two linear layers."""
        return self.model.model.multi_modal_projector

    def prepare(self, tokens: Sequence[str]) -> int:
        """See the base class; chat tokens that a bare LM did not have are as new as those of the heads.

        What lies behind the hidden state in use gets no gradient and stays frozen: distributed training would wait for it.
        """
        added = super().prepare([*tokens, *getattr(self.model.config, "new_chat_tokens", ())])
        config = self.model.config
        depth, layer = config.vision_config.num_hidden_layers, config.vision_feature_layer
        used = layer if layer >= 0 else depth + 1 + layer
        for name, parameter in self.vision_tower.named_parameters():
            found = re.search(r"layers?\.(\d+)\.", name)
            if UNUSED.search(name) or (found and int(found[1]) >= used):
                parameter.requires_grad_(False)
        return added

    def encode_images(self, pixels: torch.Tensor, canvas_sizes: Sequence[Size] | None = None) -> VisionFeatures:
        """One pass of the vision tower: patches `(B, P, V)` of one layer, without CLS and registers, and tokens `(B, T, D)`."""
        config = self.model.config
        trains = self.trainable.vision or self.trainable.projector
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
            output = self.vision_tower(pixels, output_hidden_states=True, return_dict=True)
            layer = output.hidden_states[config.vision_feature_layer]
            patches = layer[:, num_leading(config.vision_config) :]
            tokens = self.projector(patches)
        return VisionFeatures(patches, tokens, (self.codec.geometry.token_grid(),) * len(pixels))


def num_leading(vision: PreTrainedConfig) -> int:
    """How many tokens a vision encoder puts before its patches: CLS and registers."""
    return VISION_TYPES[vision.model_type][0] + getattr(vision, "num_register_tokens", 0)


def _is_composed(source: str | None, vision: str | None, language: str | None) -> bool:
    """Whether the model is put together from two parts.

    Raises:
        ValueError: if one part is missing, or a source says something else.
    """
    if vision is None and language is None:
        return False
    if source is not None:
        if (Path(source) / CODEC_FILE).is_file():  # a saved run
            return False
        raise ValueError(
            f"source '{source}' and parts (vision '{vision}', language '{language}') are both given; drop one"
        )
    if vision is None or language is None:
        raise ValueError(
            f"a composition needs two parts, but vision is '{vision}' and language is '{language}'; "
            "give the folder or hub id of each"
        )
    return True


class _Builder:
    """Makes model and codec from any source."""

    def __init__(self, dtype: torch.dtype, template: str | None, layer: int | None, is_random: bool) -> None:
        self.dtype, self.template = dtype, template
        self.layer, self.is_random = layer, is_random

    def __call__(self, source: str) -> tuple[LlavaForConditionalGeneration, Codec]:
        size = source if source in LLAVA else HUB_SOURCES.get(source) if self.is_random else None
        return self._from_size(LLAVA[size]) if size is not None else self._from_folder(source)

    def compose(self, vision: str, language: str) -> tuple[LlavaForConditionalGeneration, Codec]:
        """A bare vision encoder and a bare causal LM, with a new projector."""
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlavaConfig

        folders = [local_folder(part, not self.is_random, NO_SIZES) for part in (vision, language)]
        check_type(vision, read_settings(folders[0]), (*VISION_TYPES, *VISION_PARENTS))
        check_type(language, read_settings(folders[1]), TEXT_TYPES)
        vision_config = AutoConfig.from_pretrained(folders[0])
        vision_config = getattr(vision_config, "vision_config", vision_config)
        if vision_config.model_type == "siglip_vision_model":
            vision_config.vision_use_head = False  # the pooling head of SigLIP, which no token passes
        tokenizer = load_tokenizer(folders[1])
        template = self._template(tokenizer)
        added = _add_tokens(tokenizer, template.control_tokens)
        parts: tuple[PreTrainedModel, PreTrainedModel] | None = None
        text_config = AutoConfig.from_pretrained(folders[1])
        if not self.is_random:
            tower, _ = load_stock(AutoModel, folders[0], self.dtype, vision_config)
            decoder, _ = load_stock(AutoModelForCausalLM, folders[1], self.dtype)
            parts, vision_config, text_config = (tower, decoder), tower.config, decoder.config
        config = LlavaConfig(
            vision_config=vision_config,
            text_config=text_config,
            vision_feature_layer=-2,
            tie_word_embeddings=text_config.tie_word_embeddings,
        )
        # kept with the config, because a saved run must train the same rows again; image placeholders are never looked up
        config.new_chat_tokens = [name for name in added if name != template.image_context]
        codec = self._codec(tokenizer, template, config, folders[0])
        self._settle(config, codec)
        return (self._build(config) if parts is None else self._assemble(config, *parts)), codec

    def _from_size(self, spec: dict[str, Any]) -> tuple[LlavaForConditionalGeneration, Codec]:
        from transformers import LlavaConfig

        template = TEMPLATES[self.template or spec["template"]]
        tokenizer = tiny_tokenizer(template)
        text = dict(spec["text"])
        text["vocab_size"] = max(text["vocab_size"], len(tokenizer))
        text |= {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
        config = LlavaConfig(
            vision_config=spec["vision"],
            text_config=text,
            vision_feature_layer=spec["layer"],
            tie_word_embeddings=text["tie_word_embeddings"],
        )
        codec = self._codec(tokenizer, template, config, None)
        self._settle(config, codec)
        return self._build(config), codec

    def _from_folder(self, source: str) -> tuple[LlavaForConditionalGeneration, Codec]:
        from transformers import LlavaConfig, LlavaForConditionalGeneration

        folder = local_folder(source, not self.is_random, list(LLAVA))
        settings = read_settings(folder)
        check_type(source, settings, ("llava",))
        # the stock defaults where a config does not say
        parts = {"vision_config": ("clip_vision_model", tuple(VISION_TYPES)), "text_config": ("llama", TEXT_TYPES)}
        for name, (kind, known) in parts.items():
            check_type(f"{source}: {name}", {"model_type": kind} | (settings.get(name) or {}), known)
        config = LlavaConfig.from_pretrained(folder)
        expected = _strategy(config.vision_config)
        if config.vision_feature_select_strategy != expected:
            raise ValueError(
                f"{source}: vision_feature_select_strategy is '{config.vision_feature_select_strategy}', which does not give "
                f"the patches alone of a {config.vision_config.model_type}; only models trained with '{expected}' are read"
            )
        if (folder / CODEC_FILE).is_file():
            codec = Codec.load(folder)
        else:
            tokenizer = load_tokenizer(folder)
            template = self._template(tokenizer)
            _add_tokens(tokenizer, [template.image_context])
            codec = self._codec(tokenizer, template, config, folder)
        if self.is_random:
            self._settle(config, codec)
            return self._build(config), codec
        model, _ = load_stock(LlavaForConditionalGeneration, folder, self.dtype)
        self._settle(model.config, codec)
        return model, codec

    def _build(self, config: LlavaConfig) -> LlavaForConditionalGeneration:
        from transformers import LlavaForConditionalGeneration

        model = LlavaForConditionalGeneration(copy.deepcopy(config))
        cast(model, self.dtype)
        return model

    def _assemble(
        self, config: LlavaConfig, tower: PreTrainedModel, decoder: PreTrainedModel
    ) -> LlavaForConditionalGeneration:
        """The stock composite around loaded parts; it is made without storage, so nothing is held or initialised twice."""
        from transformers import LlavaForConditionalGeneration

        with torch.device("meta"):
            model = LlavaForConditionalGeneration(config)
        core = model.model
        core.vision_tower, core.language_model, model.lm_head = tower, decoder.model, decoder.lm_head
        core.multi_modal_projector = type(core.multi_modal_projector)(config).to(self.dtype)
        for module in core.multi_modal_projector.modules():
            model._init_weights(module)
        return model.eval()  # as the stock loader leaves the parts

    def _settle(self, config: LlavaConfig, codec: Codec) -> None:
        """Write into a config what follows from its parts and the tokenizer.

        Raises:
            ValueError: if the vision encoder has no such layer.
        """
        vision = config.vision_config
        layer = config.vision_feature_layer if self.layer is None else self.layer
        depth = vision.num_hidden_layers
        if not isinstance(layer, int) or not -depth - 1 <= layer <= depth:
            raise ValueError(
                f"vision_feature_layer {layer} is no hidden state of a {vision.model_type} of {depth} layers; "
                f"give one integer from {-depth - 1} to {depth}"
            )
        config.vision_feature_layer = layer
        config.vision_feature_select_strategy = _strategy(vision)
        config.image_token_id = codec.token_id(codec.template.image_context)
        config.image_seq_length = codec.geometry.num_tokens()

    def _template(self, tokenizer: Any) -> ChatTemplate:
        known = tokenizer.get_vocab()
        is_vicuna = "<|im_start|>" not in known and {"<s>", "</s>"} <= known.keys()
        template = TEMPLATES[self.template or ("llava_1_5" if is_vicuna else "llava_chatml")]
        bos = tokenizer.bos_token
        # SmolLM names a turn token or the end token as its bos, and its chat template writes none.
        is_own = bos is not None and bos not in (template.turn_start, template.turn_end, tokenizer.eos_token)
        return replace(template, bos=bos) if is_own and template.style == "chatml" else template

    def _codec(self, tokenizer: Any, template: ChatTemplate, config: LlavaConfig, folder: Path | None) -> Codec:
        vision = config.vision_config
        means = VISION_TYPES[vision.model_type][1] | statistics(folder)
        geometry = ImageGeometry(_pair(vision.image_size), _pair(vision.patch_size)[0], 1, **means)
        return Codec(tokenizer, geometry, template, CoordinateCodec(bins=1000, style="fraction"))


def _pair(side: int | Sequence[int]) -> Size:
    return (side, side) if isinstance(side, int) else (side[0], side[1])


def _strategy(vision: PreTrainedConfig) -> str:
    """The stock name for dropping what comes before the patches; the stock model itself would keep registers."""
    return "default" if num_leading(vision) else "full"


def _add_tokens(tokenizer: Any, names: Sequence[str]) -> list[str]:
    """Append the control tokens that a tokenizer lacks, and return them."""
    from tokenizers import AddedToken

    known = tokenizer.get_vocab()
    new = [name for name in names if name not in known]
    tokens = [AddedToken(name, special=True, normalized=False) for name in new]
    tokenizer.add_tokens(tokens, special_tokens=True)
    return new
