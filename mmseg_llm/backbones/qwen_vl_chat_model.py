"""Qwen-VL-Chat as a transformers model: the stock Qwen2 decoder behind its own vision tower and resampler.

The original language model is Qwen2 for sequences up to `seq_length` tokens; beyond, it rescales rotary frequencies and
attention (SegAgent specification section 10.1). Legend: B rows, N tokens, T image tokens, D language width.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, Qwen2Config, Qwen2Model
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from mmseg_llm.backbones.qwen_vl_chat_vision import Resampler, VisionTower


class QwenVlChatVisionConfig(PreTrainedConfig):
    """Vision tower and resampler; the defaults are those of the released model.

    Attributes:
        num_positions: rows of the tower's table of positions, a square.
        num_queries: image tokens of the language model, a square.
        output_size: language width.
        num_pool_heads: attention heads of the resampler.
    """

    model_type = "qwen_vl_chat_vision"
    base_config_key = "vision_config"

    hidden_size: int = 1664
    num_hidden_layers: int = 48
    num_attention_heads: int = 16
    intermediate_size: int = 8192
    image_size: int = 448
    patch_size: int = 14
    num_positions: int = 256
    num_queries: int = 256
    output_size: int = 4096
    num_pool_heads: int = 32
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02


PARTS: dict[str, Any] = {"vision_config": QwenVlChatVisionConfig, "text_config": Qwen2Config}


class QwenVlChatConfig(PreTrainedConfig):
    """Both parts, and the id of the token that image tokens replace."""

    model_type = "qwen_vl_chat"
    sub_configs: ClassVar[dict[str, Any]] = PARTS  # what earlier versions of transformers look at
    sub_configs_defaults: ClassVar[dict[str, Any]] = PARTS

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 151859
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Parts given as dicts become configs, which later versions of transformers do by themselves."""
        for name, kind in PARTS.items():
            value = getattr(self, name)
            if value is None or isinstance(value, dict):
                setattr(self, name, kind(**(value or {})))
        super().__post_init__(**kwargs)


class QwenVlChatCore(nn.Module):
    """All but the LM head.

    Args:
        config: of the whole model.
    """

    def __init__(self, config: QwenVlChatConfig) -> None:
        super().__init__()
        self.image_token_id = config.image_token_id
        self.vision_tower = VisionTower(config.vision_config)
        self.projector = Resampler(config.vision_config)
        self.language_model = Qwen2Model(config.text_config)

    def forward(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None = None, **arguments: Any
    ) -> BaseModelOutputWithPast:
        """Plain sequences `(B, N)` with one image each; its tokens overwrite the placeholders."""
        embeds = self.language_model.embed_tokens(input_ids)
        if pixel_values is not None:
            tokens = self.projector(self.vision_tower(pixel_values)).to(embeds.dtype)  # (B, T, D)
            places = (input_ids == self.image_token_id)[..., None].expand_as(embeds)
            embeds = embeds.masked_scatter(places, tokens)
        return self.language_model(inputs_embeds=embeds, **arguments)


class QwenVlChatForCausalLM(PreTrainedModel):
    """Qwen-VL-Chat with its LM head.

    Args:
        config: of the whole model.
    """

    config_class = QwenVlChatConfig
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["Qwen2DecoderLayer", "VisionBlock"]
    _supports_sdpa = True
    _supports_flex_attn = True

    def __init__(self, config: QwenVlChatConfig) -> None:
        super().__init__(config)
        self.model = QwenVlChatCore(config)
        text = config.text_config
        assert isinstance(text, Qwen2Config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings."""
        return self.model.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Exchange the token embeddings."""
        self.model.language_model.embed_tokens = value  # type: ignore[assignment]

    def forward(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None = None, **arguments: Any
    ) -> CausalLMOutputWithPast:
        """Vocabulary logits of plain sequences."""
        output = self.model(input_ids, pixel_values, **arguments)
        return CausalLMOutputWithPast(
            logits=self.lm_head(output.last_hidden_state), past_key_values=output.past_key_values
        )

    @torch.no_grad()
    def init_vision(self) -> None:
        """Random weights for what the stock initialisation leaves at zero, and a resampler whose tokens see their own place.

        Queries and keys start as a few fast frequencies of the positions, hardly disturbed by content. From queries that look
        everywhere, a from-scratch run would first have to learn where they are.
        """
        config: Any = self.config.vision_config
        tower, pool = self.model.vision_tower, self.model.projector.attn_pool
        width = config.output_size
        tower.positional_embedding.normal_(std=config.hidden_size**-0.5)
        self.model.projector.proj.normal_(std=width**-0.5)
        pool.query.normal_(std=config.initializer_range)
        fast = torch.arange(width) % (width // 4) < POOL_FREQUENCIES
        look = torch.diag(fast.float() * POOL_SHARPNESS)
        value = torch.empty(width, width).normal_(std=width**-0.5)
        pool.attn.in_proj_weight.copy_(torch.cat([look, look, value]))
        for layer_norm in (pool.ln_q, pool.ln_kv):
            layer_norm.weight[fast] = POOL_CONTENT


# How a random resampler looks at its own place: frequencies in use, factor on queries and keys, share of content in them.
POOL_FREQUENCIES, POOL_SHARPNESS, POOL_CONTENT = 8, 6.0, 0.05
