"""STAMP folders as others write them, with the stock class and with peft itself, and the mask pass by hand on stock modules."""

from __future__ import annotations

import json

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from mmseg_llm.backbones.qwen_vl import patchify
from mmseg_llm.heads.all_mask.answering import open_images
from mmseg_llm.heads.all_mask.passes import Trigger
from mmseg_llm.heads.all_mask.prompts import SEG
from mmseg_llm.structures import Query, Sample

BASE_TOKENS, BASE_ROWS, WIDTH = 127, 140, 64
ROWS = BASE_TOKENS + 4
TOKENS = ("<|seg|>", "<|mask|>", "<|yes|>", "<|no|>")
PIXELS = {"min_pixels": 6 * 28 * 28, "max_pixels": 16 * 28 * 28, "max_new_tokens": 4}
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
VISION = {"depth": 1, "embed_dim": 32, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 2,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


# ---- checkpoints as others write them ---------------------------------------------------------------------------------


def stock_model(rows: int, tied: bool, seed: int = 0):
    """A stock model with weights large enough that errors show."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    config = Qwen2VLConfig(
        vision_config=VISION,
        text_config={**TEXT, "vocab_size": rows, "tie_word_embeddings": tied},
        image_token_id=5,
        video_token_id=6,
        vision_start_token_id=3,
        vision_end_token_id=4,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.1 if parameter.ndim > 1 else 0.3) + (parameter.ndim == 1))
    return model


def save_tokenizer(folder, added=TOKENS, count=BASE_TOKENS) -> None:
    from tokenizers import AddedToken, Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    names = [*CONTROL, *(f"word{i}" for i in range(count - len(CONTROL)))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="word0"))
    fast = PreTrainedTokenizerFast(tokenizer_object=words, pad_token=CONTROL[0], eos_token="<|im_end|>")
    fast.add_tokens([AddedToken(name, special=True, normalized=False) for name in added], special_tokens=True)
    fast.save_pretrained(folder)


def save_config(folder, model, tied: bool) -> None:
    """As transformers 4.57 did: the class of STAMP, the tie flag within the nested text config."""
    text = {**TEXT, "vocab_size": model.get_input_embeddings().weight.shape[0], "tie_word_embeddings": tied}
    settings = {"model_type": "qwen2_vl", "architectures": ["SegQwenVL"], "vision_config": VISION, "text_config": text}
    settings |= {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 3, "vision_end_token_id": 4}
    (folder / "config.json").write_text(json.dumps(settings))


def flat(model, tied: bool) -> dict[str, torch.Tensor]:
    state = {}
    for key, value in model.state_dict().items():
        if tied and key == "lm_head.weight":
            continue
        key = key.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        state[key] = value.contiguous().clone()
    return state


def classifier(width: int = WIDTH, dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(1, width, generator=generator)
    return {"classifier.weight": weight.to(dtype), "classifier.bias": torch.tensor([0.25], dtype=dtype)}


def save_sharded(folder, state, parts: int = 3) -> None:
    names = sorted(state)
    index = {"metadata": {"total_size": 0}, "weight_map": {}}
    for part in range(parts):
        file = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        chosen = names[part::parts]
        save_file({name: state[name] for name in chosen}, folder / file, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(chosen, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_full(folder, *, tied=True, dtype=torch.float32, sharded=False, model=None):
    """A folder as STAMP-2B-uni's; returns the stock model and the official tensors."""
    model = model or stock_model(ROWS, tied).to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    save_config(folder, model, tied)
    save_tokenizer(folder)
    state = flat(model, tied) | classifier(dtype=dtype)
    if sharded:
        save_sharded(folder, state)
    else:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return model, state


def write_base(folder, tied=False):
    folder.mkdir(parents=True, exist_ok=True)
    model = stock_model(BASE_ROWS, tied, seed=1)
    save_config(folder, model, tied)
    save_tokenizer(folder, added=())
    save_file(flat(model, tied), folder / "model.safetensors", metadata={"format": "pt"})
    return model


def write_adapter(folder, base_folder, *, tied=False, tokenizer=True, rslora=True):
    """An adapter that peft writes, trained as STAMP's: rank-stabilized, embeddings, LM head and classifier in full."""
    from peft import LoraConfig, get_peft_model

    model = write_base(base_folder, tied)
    model.resize_token_embeddings(ROWS, mean_resizing=False)
    model.add_module("classifier", nn.Linear(WIDTH, 1))
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=rslora,
        target_modules=TARGETS,
        modules_to_save=["embed_tokens", "lm_head", "classifier"],
    )
    model.config._name_or_path = str(base_folder)
    wrapped = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    wrapped.save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(base_folder)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    if tokenizer:
        save_tokenizer(folder)
    return wrapped


def edit(folder, change, name="model.safetensors") -> None:
    state = load_file(folder / name)
    change(state)
    save_file(state, folder / name, metadata={"format": "pt"})


# ---- the mask pass by hand, on stock modules --------------------------------------------------------------------------


def sample() -> Sample:
    picture = np.random.default_rng(3).integers(0, 256, (60, 88, 3), dtype=np.uint8)
    return Sample(Image.fromarray(picture), (60, 88), (Query("word3"), Query("word7")), id="noise")


def official(model, z, ids, canvas, pixels):
    """Vocabulary logits, states, and the logits of the mask tokens behind `ids`, by the stock class and a linear layer."""
    grid = (canvas[0] // 28, canvas[1] // 28)
    count = grid[0] * grid[1]
    patches, thw = patchify(pixels, [canvas], 14, 2), torch.tensor([(1, 2 * grid[0], 2 * grid[1])])
    tensor = torch.tensor([ids])
    core = model.model
    with torch.no_grad():
        output = model(
            input_ids=tensor,
            pixel_values=patches,
            image_grid_thw=thw,
            mm_token_type_ids=(tensor == 5).int(),
            output_hidden_states=True,
        )
        features = torch.cat(tuple(core.get_image_features(patches, thw, return_dict=True).pooler_output))
        table = model.get_input_embeddings()
        embeds = table(torch.cat([tensor, torch.full((1, count), BASE_TOKENS + 1)], 1))
        embeds[0, tensor[0].eq(5).nonzero()[:, 0]] = features
        embeds[0, len(ids) :] += features
        positions, _ = core.get_rope_index(tensor, mm_token_type_ids=(tensor == 5).int(), image_grid_thw=thw)
        tail = positions[:, :, -1:] + 1 + torch.arange(count)
        allowed = torch.ones(len(ids) + count, len(ids) + count, dtype=torch.bool).tril()
        allowed[len(ids) :] = True
        states = core.language_model(
            inputs_embeds=embeds,
            position_ids=torch.cat([positions, tail], 2),
            attention_mask=allowed[None, None],
        ).last_hidden_state
        cells = nn.functional.linear(states[0, len(ids) :], *z).view(grid)
    return output.logits, output.hidden_states[-1], cells


def compare(ours, model, z) -> tuple[float, float, float]:
    """Largest differences of vocabulary logits, states and mask logits."""
    backbone, head, item = ours.backbone, ours.head("all_mask"), sample()
    codec = backbone.codec
    canvas = head.canvas(item, codec)
    pixels = torch.from_numpy(codec.pixels(canvas))[None].to(backbone.model.dtype)
    question = codec.question("word3") + codec.encode("word9") + (codec.token_id(SEG),)
    with torch.no_grad():
        prefix, _ = open_images(head, backbone, [item])
        start = codec.image_prefix(canvas.size)
        block = prefix.open_branches(1)
        cells = head.cell_logits(backbone, prefix, [Trigger(0, block, lead=question)])[0][0]
        features = backbone.encode_images(pixels, [canvas.size])
        states = backbone.prefill(features, [start + question]).states
        logits = backbone.logits(states)
    wanted = official(model, z, start + question, canvas.size, pixels)
    assert wanted[2].abs().mean() > 0.1
    return tuple((a.float() - b.float()).abs().max().item() for a, b in zip((logits, states, cells), wanted))  # type: ignore
