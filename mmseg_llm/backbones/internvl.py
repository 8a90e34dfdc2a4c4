"""InternVL family (2.5, 3, 3.5) on stock `InternVLForConditionalGeneration`; language models Qwen2, Qwen3 and Llama.

Sources: a size of `sizes.SIZES` (random weights, nothing to download), a local folder or a hub id, in the transformers layout or
in the original `internvl_chat` layout.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from mmseg_llm.backbones.adapters import Lora, Trainable, add_lora, add_trainable_rows, set_trainable
from mmseg_llm.backbones.base import Backbone, VisionFeatures
from mmseg_llm.backbones.codec import CODEC_FILE, TEMPLATES, ChatTemplate, Codec, ImageGeometry, load_tokenizer
from mmseg_llm.backbones.internvl_layout import convert_config, convert_state_dict
from mmseg_llm.backbones.sizes import HUB_SOURCES, SIZES
from mmseg_llm.backbones.visibility import ATTENTION_IMPLEMENTATIONS

if TYPE_CHECKING:
    from transformers import InternVLConfig, InternVLForConditionalGeneration, PreTrainedModel

TINY_TOKENIZER = Path(__file__).parent.parent / "assets" / "tiny_tokenizer"
CONFIG_FILE = "config.json"


class InternVLBackbone(Backbone):
    """InternVL at one fixed image size, without tiling.

    Args:
        source: name of a size, folder, or hub id.
        weights: `pretrained` loads them; `random` builds the architecture only (sizes are always random).
        template: chat template of the checkpoint, a key of `codec.TEMPLATES`.
        attention: `sdpa` or `eager`.
        dtype: storage type of the weights.
        lora: adapters on the language model; then set `trainable.language` and `trainable.embeddings` to false.
        trainable: what trains in full.
        gradient_checkpointing: recompute activations of vision tower and language model in the backward pass.

    Raises:
        ValueError: for an unknown source, attention or template, missing weights, or a tokenizer without control tokens.
    """

    def __init__(
        self,
        source: str = "internvl-tiny",
        *,
        weights: Literal["pretrained", "random"] = "pretrained",
        template: str = "internvl2_5",
        attention: str = "sdpa",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        lora: Lora | None = None,
        trainable: Trainable | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if attention not in ATTENTION_IMPLEMENTATIONS:
            raise ValueError(
                f"attention '{attention}' would ignore the visibility; use {' or '.join(ATTENTION_IMPLEMENTATIONS)}"
            )
        if template not in TEMPLATES:
            raise ValueError(f"unknown chat template '{template}'; use one of {', '.join(TEMPLATES)}")
        self.source = source
        self.lora, self.trainable = lora, trainable or Trainable()
        build = _Builder(attention, getattr(torch, dtype), TEMPLATES[template])
        self.model, self.codec = build(source, weights == "random")
        if gradient_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.vision_width = self.model.config.vision_config.hidden_size
        self.text_width = self.model.config.text_config.hidden_size

    @property
    def language_model(self) -> PreTrainedModel:
        """The decoder stack."""
        return self.model.model.language_model

    def prepare(self, tokens: Sequence[str]) -> int:
        """Give the heads' control tokens ids and rows, then freeze, adapt and unfreeze; called once by the model.

        New LM-head rows start at the mean of the old ones, new embedding rows at the model's normal init (MLLMSeg 3.3).
        """
        added = self.codec.add_tokens(tokens)
        rows = self.model.get_input_embeddings().weight.shape[0]
        needed = max(self.codec.token_id(name) for name in tokens) + 1 if tokens else 0
        if needed > rows:
            head = self.model.get_output_embeddings().weight
            mean = None if head.is_meta else head.detach().float().mean(0)
            self.model.resize_token_embeddings(needed, mean_resizing=False)
            if mean is not None:
                with torch.no_grad():
                    self.model.get_output_embeddings().weight[rows:] = mean.to(head.dtype)
        if self.lora is not None:
            add_lora(self.language_model, self.lora)
        set_trainable(self.model, self.language_model, self.trainable)
        if self.trainable.new_rows and not self.trainable.embeddings and tokens:
            add_trainable_rows(self.model, [self.codec.token_id(name) for name in tokens])
        return added

    def encode_images(self, pixels: torch.Tensor) -> VisionFeatures:
        """One pass of the vision tower: patch tokens `(B, P, V)` without CLS, projected tokens `(B, T, D)`."""
        trains = self.trainable.vision or self.trainable.projector
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
            output = self.model.model.get_image_features(pixel_values=pixels, return_dict=True)
        return VisionFeatures(patches=output.last_hidden_state[:, 1:], tokens=output.pooler_output)

    def save_config(self, folder: Path) -> None:
        """Write architecture, tokenizer and codec; `InternVLBackbone(folder, weights='random')` rebuilds them."""
        folder.mkdir(parents=True, exist_ok=True)
        self.model.config.save_pretrained(folder)
        self.codec.save(folder)


class _Builder:
    """Makes model and codec from any source."""

    def __init__(self, attention: str, dtype: torch.dtype, template: ChatTemplate) -> None:
        self.attention, self.dtype, self.template = attention, dtype, template

    def __call__(self, source: str, is_random: bool) -> tuple[InternVLForConditionalGeneration, Codec]:
        size = source if source in SIZES else HUB_SOURCES.get(source) if is_random else None
        if size is not None:
            return self._from_size(size)
        folder = _local_folder(source, with_weights=not is_random)
        settings = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if settings.get("model_type") == "internvl_chat":
            return self._from_chat(folder, settings, is_random)
        if settings.get("model_type") != "internvl":
            raise ValueError(
                f"'{source}' holds a model of type '{settings.get('model_type')}'; "
                "this backbone reads 'internvl' and 'internvl_chat' folders"
            )
        return self._from_transformers(folder, is_random)

    def _build(self, config: InternVLConfig) -> InternVLForConditionalGeneration:
        from transformers import InternVLForConditionalGeneration

        config = copy.deepcopy(config)
        config._attn_implementation = self.attention
        for part in (config.text_config, config.vision_config):
            part._attn_implementation = self.attention
        return InternVLForConditionalGeneration(config).to(self.dtype)

    def _from_size(self, size: str) -> tuple[InternVLForConditionalGeneration, Codec]:
        from transformers import InternVLConfig

        spec = SIZES[size]
        tokenizer = load_tokenizer(TINY_TOKENIZER)
        text = dict(spec["text"])
        if text["vocab_size"] < len(tokenizer):
            text["vocab_size"] = len(tokenizer)
        codec = self._codec(tokenizer, spec["vision"]["image_size"], spec["vision"]["patch_size"], 0.5)
        config = InternVLConfig(
            vision_config=spec["vision"],
            text_config=text,
            image_token_id=codec.token_id(codec.template.image_context),
            image_seq_length=codec.geometry.num_tokens,
            tie_word_embeddings=False,
        )
        model = self._build(config)
        _init_positions(model, codec.geometry.patch_grid)
        return model, codec

    def _from_transformers(self, folder: Path, is_random: bool) -> tuple[InternVLForConditionalGeneration, Codec]:
        from transformers import InternVLConfig, InternVLForConditionalGeneration

        config = InternVLConfig.from_pretrained(folder)
        if is_random:
            model = self._build(config)
        else:
            _weight_files(folder)  # raises without any
            model, info = InternVLForConditionalGeneration.from_pretrained(
                folder, dtype=self.dtype, attn_implementation=self.attention, output_loading_info=True
            )
            if info["missing_keys"]:
                raise ValueError(_missing(folder, info["missing_keys"]))
        if (folder / CODEC_FILE).is_file():
            return model, Codec.load(folder)
        vision = config.vision_config
        return model, self._codec(
            load_tokenizer(folder), vision.image_size[0], vision.patch_size[0], config.downsample_ratio, folder
        )

    def _from_chat(
        self, folder: Path, settings: dict[str, Any], is_random: bool
    ) -> tuple[InternVLForConditionalGeneration, Codec]:
        from transformers import InternVLConfig

        arguments = convert_config(settings)
        vision = arguments["vision_config"]
        codec = self._codec(
            load_tokenizer(folder), vision["image_size"], vision["patch_size"], arguments["downsample_ratio"], folder
        )
        context = codec.token_id(codec.template.image_context)
        config = InternVLConfig(**arguments, image_token_id=context, image_seq_length=codec.geometry.num_tokens)
        model = self._build(config)
        if not is_random:
            state = {key: value for shard in read_shards(folder) for key, value in shard.items()}
            converted, rest = convert_state_dict(state, config)
            result = model.load_state_dict({k: v.to(self.dtype) for k, v in converted.items()}, strict=False)
            if result.missing_keys or result.unexpected_keys:
                raise ValueError(_missing(folder, result.missing_keys, result.unexpected_keys))
            if rest:
                import warnings

                warnings.warn(f"{folder}: {len(rest)} tensors that belong to a head were not read here", stacklevel=2)
        return model, codec

    def _codec(self, tokenizer: Any, image_size: int, patch: int, ratio: float, folder: Path | None = None) -> Codec:
        statistics = {}
        if folder is not None and (folder / "preprocessor_config.json").is_file():
            stored = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
            if "image_mean" in stored and "image_std" in stored:
                statistics = {"mean": tuple(stored["image_mean"]), "std": tuple(stored["image_std"])}
        geometry = ImageGeometry((image_size, image_size), patch, round(1 / ratio), **statistics)
        template = self.template
        # InternLM2 tokenizers open the sequence with <s>; Qwen2 ones have no such token.
        if tokenizer.convert_tokens_to_ids("<s>") not in (None, tokenizer.unk_token_id):
            template = ChatTemplate(system=template.system, bos="<s>")
        return Codec(tokenizer, geometry, template)


def _local_folder(source: str, with_weights: bool) -> Path:
    """The folder itself, or the snapshot of a hub id.

    Raises:
        ValueError: if it is neither, or holds no config.
    """
    folder = Path(source)
    if not folder.is_dir():
        if source.count("/") != 1 or source.startswith((".", "/")):
            raise ValueError(f"no folder '{source}', and it is no hub id; known sizes: {', '.join(SIZES)}")
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

        patterns = ["*.json", "*.model", "*.txt", *(["*.safetensors", "*.bin"] if with_weights else [])]
        try:
            folder = Path(snapshot_download(source, allow_patterns=patterns))
        except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as error:
            raise ValueError(
                f"'{source}' cannot be fetched from the hub ({type(error).__name__}); "
                "check the name and the network, or download the folder and give its path"
            ) from error
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"folder {folder} has no {CONFIG_FILE}; give the folder of a checkpoint")
    return folder


def read_shards(folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    """The weight files of a checkpoint folder, one after the other; safetensors preferred, pickles without code.

    Raises:
        ValueError: if there are none.
    """
    from safetensors.torch import load_file

    for path in _weight_files(folder):
        is_safe = path.suffix == ".safetensors"
        yield load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)


def _weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(f"folder {folder} has no *.safetensors and no pytorch_model*.bin; download the weights too")
    return files


def _missing(folder: Path, missing: Sequence[str], unexpected: Sequence[str] = ()) -> str:
    parts = [f"{len(keys)} {kind} keys ({', '.join(sorted(keys)[:3])}, ...)"
             for kind, keys in (("missing", missing), ("unexpected", unexpected)) if keys]  # fmt: skip
    return f"the weights in {folder} do not fit the model: {' and '.join(parts)}; use the checkpoint its config is from"


def _init_positions(model: InternVLForConditionalGeneration, grid: tuple[int, int]) -> None:
    """Start random models from 2-D sine-cosine positions: zeros, the stock init, cost a from-scratch run many epochs."""
    positions = model.model.vision_tower.embeddings.position_embeddings
    if positions.is_meta:
        return
    quarter = positions.shape[-1] // 4
    omega = 1.0 / 10000 ** (torch.arange(quarter) / quarter)
    angles = [torch.arange(n)[:, None] * omega for n in grid]  # (rows, quarter), (columns, quarter)
    rows, columns = (torch.cat([angle.sin(), angle.cos()], -1) for angle in angles)
    table = torch.cat([rows[:, None].expand(-1, grid[1], -1), columns[None].expand(grid[0], -1, -1)], -1)
    with torch.no_grad():
        positions[0, 1:] = 0.1 * table.flatten(0, 1).to(positions.dtype)
