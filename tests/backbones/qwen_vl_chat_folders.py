"""Tiny folders in the official Qwen-VL-Chat layout, and the official arithmetic by hand on their tensors.

Nothing here comes from the package: names and shapes are those of SegAgent specification section 10.1.
"""

from __future__ import annotations

import base64
import json
import math

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

RELEASED = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 22016,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "seq_length": 2048,
    "max_position_embeddings": 8192,
    "no_bias": True,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "tie_word_embeddings": False,
    "model_type": "qwen",
    "architectures": ["QWenLMHeadModel"],
    "visual": {
        "heads": 16,
        "image_size": 448,
        "image_start_id": 151857,
        "layers": 48,
        "mlp_ratio": 4.9231,
        "output_dim": 4096,
        "patch_size": 14,
        "width": 1664,
    },
}
PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nPicture 1: <img>{IMAGE}</img>\n"
    "Please optimize the semi-transparent green mask in a point-wise manner based on the image and description content, "
    "so that it covers the target object as accurately as possible. The object description is as follows:"
    "<ref>{CAPTION}</ref><|im_end|>\n<|im_start|>assistant\n"
)
VOCABULARY = 256 + 6  # bytes and the merges of `write_tiktoken`
TINY = RELEASED | {
    "vocab_size": 500,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "kv_channels": 64,
    "seq_length": 512,
    "visual": {
        "heads": 4,
        "image_size": 160,
        "image_start_id": VOCABULARY + 208 + 6,
        "layers": 2,
        "mlp_ratio": 2.0,
        "output_dim": 256,
        "patch_size": 5,
        "width": 64,
    },
}


def official_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of every tensor, from the table of the specification."""
    width, vocab, half = config["hidden_size"], config["vocab_size"], config["intermediate_size"] // 2
    visual = config["visual"]
    v, out, patch = visual["width"], visual["output_dim"], visual["patch_size"]
    hidden = int(v * visual["mlp_ratio"])
    shapes = {"transformer.wte.weight": (vocab, width), "lm_head.weight": (vocab, width)}
    shapes["transformer.ln_f.weight"] = (width,)
    for i in range(config["num_hidden_layers"]):
        for name, shape in {
            "ln_1.weight": (width,),
            "ln_2.weight": (width,),
            "attn.c_attn.weight": (3 * width, width),
            "attn.c_attn.bias": (3 * width,),
            "attn.c_proj.weight": (width, width),
            "mlp.w1.weight": (half, width),
            "mlp.w2.weight": (half, width),
            "mlp.c_proj.weight": (width, half),
        }.items():
            shapes[f"transformer.h.{i}.{name}"] = shape
    top = "transformer.visual."
    shapes |= {f"{top}conv1.weight": (v, 3, patch, patch), f"{top}positional_embedding": (256, v)}
    linear = {"attn.in_proj": (3 * v, v), "attn.out_proj": (v, v), "mlp.c_fc": (hidden, v), "mlp.c_proj": (v, hidden)}
    norms = ["ln_pre"]
    for i in range(visual["layers"]):
        stem = f"transformer.resblocks.{i}."
        norms += [f"{stem}ln_1", f"{stem}ln_2"]
        for name, shape in linear.items():
            shapes |= {f"{top}{stem}{name}.weight": shape, f"{top}{stem}{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{top}{name}.weight": (v,), f"{top}{name}.bias": (v,)}
    for name in ("attn_pool.ln_q", "attn_pool.ln_kv", "ln_post"):
        shapes |= {f"{top}{name}.weight": (out,), f"{top}{name}.bias": (out,)}
    for name, shape in {
        "attn_pool.query": (256, out),
        "attn_pool.pos_embed": (256, out),
        "attn_pool.kv_proj.weight": (out, v),
        "attn_pool.attn.in_proj_weight": (3 * out, out),
        "attn_pool.attn.in_proj_bias": (3 * out,),
        "attn_pool.attn.out_proj.weight": (out, out),
        "attn_pool.attn.out_proj.bias": (out,),
        "proj": (out, out),
    }.items():
        shapes[top + name] = shape
    return shapes


def random_state(config: dict = TINY, dtype=torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    """Values large enough that errors show; nothing is zero or one."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in official_shapes(config).items():
        value = torch.randn(shape, generator=generator)
        is_norm = ".ln_" in name and name.endswith("weight")
        if is_norm:
            value = 1 + 0.3 * value
        elif name.endswith("bias") or len(shape) == 1:
            value = 0.2 * value
        elif "wte" not in name and "pos_embed" not in name and "query" not in name:
            value = value * 1.2 / math.prod(shape[1:]) ** 0.5
        state[name] = value.to(dtype)
    return state


def write_tiktoken(folder, merges=(b"th", b"the", b" the", b"in", b"er", b"12")) -> None:
    tokens = [bytes([byte]) for byte in range(256)] + list(merges)
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    (folder / "qwen.tiktoken").write_text("\n".join(lines) + "\n")


def write_folder(folder, *, state=None, kind="safetensors", parts=1, config=TINY) -> dict[str, torch.Tensor]:
    """A checkpoint folder as the official code saves it; returns its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    state = random_state(config) if state is None else state
    (folder / "config.json").write_text(json.dumps(config))
    write_tiktoken(folder)
    stem, index = ("model", "model.safetensors.index.json")
    if kind == "bin":
        stem, index = ("pytorch_model", "pytorch_model.bin.index.json")
    places = {}
    for part in range(parts):
        name = f"{stem}.{kind}" if parts == 1 else f"{stem}-{part + 1:05d}-of-{parts:05d}.{kind}"
        chosen = {key: state[key].clone() for key in sorted(state)[part::parts]}
        places |= dict.fromkeys(chosen, name)
        if kind == "bin":
            torch.save(chosen, folder / name)
        else:
            save_file(chosen, folder / name, metadata={"format": "pt"})
    if parts > 1:
        (folder / index).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": places}))
    return state


# ---- the official arithmetic ------------------------------------------------------------------------------------------


def bicubic(table: torch.Tensor, count: int) -> torch.Tensor:
    old, new = math.isqrt(len(table)), math.isqrt(count)
    image = table.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=(new, new), mode="bicubic", align_corners=False)
    return image.permute(0, 2, 3, 1).flatten(0, 2).to(table.dtype)


def norm(s, name, x):
    return F.layer_norm(x, x.shape[-1:], s[f"{name}.weight"], s[f"{name}.bias"], 1e-6)


def linear(s, name, x):
    return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]


def patches(s, config, pixels):
    """States `(B, P, V)` of the vision transformer: per head, the rows of `in_proj` are its query, its key, its value."""
    visual, top = config["visual"], "transformer.visual."
    x = F.conv2d(pixels, s[f"{top}conv1.weight"], stride=visual["patch_size"]).flatten(2).transpose(1, 2)
    x = norm(s, f"{top}ln_pre", x + bicubic(s[f"{top}positional_embedding"], x.shape[1]))
    heads, size = visual["heads"], visual["width"] // visual["heads"]
    for i in range(visual["layers"]):
        stem = f"{top}transformer.resblocks.{i}."
        mixed = linear(s, f"{stem}attn.in_proj", norm(s, f"{stem}ln_1", x))
        out = []
        for head in range(heads):
            q, k, v = mixed[..., head * 3 * size : (head + 1) * 3 * size].split(size, -1)
            out.append((q / size**0.5 @ k.transpose(1, 2)).softmax(-1) @ v)
        x = x + linear(s, f"{stem}attn.out_proj", torch.cat(out, -1))
        inner = linear(s, f"{stem}mlp.c_fc", norm(s, f"{stem}ln_2", x))
        inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
        x = x + linear(s, f"{stem}mlp.c_proj", inner)
    return x


def image_tokens(s, config, x, positions_on_values: bool = False):
    """The 256 vectors `(B, 256, D)`; positions are added to keys only."""
    top = "transformer.visual."
    pool, out = f"{top}attn_pool.", config["visual"]["output_dim"]
    kv = norm(s, f"{pool}ln_kv", x @ s[f"{pool}kv_proj.weight"].T)
    place = s[f"{pool}pos_embed"]
    keys = kv + bicubic(place, x.shape[1])
    queries = norm(s, f"{pool}ln_q", s[f"{pool}query"]) + place
    parts = zip((queries, keys, keys if positions_on_values else kv), s[f"{pool}attn.in_proj_weight"].chunk(3),
                s[f"{pool}attn.in_proj_bias"].chunk(3))  # fmt: skip
    q, k, v = (value @ weight.T + bias for value, weight, bias in parts)
    heads = []
    for start in range(0, out, 128):
        a, b, c = (value[..., start : start + 128] for value in (q, k, v))
        heads.append((a / 128**0.5 @ b.transpose(-1, -2)).softmax(-1) @ c)
    mixed = linear(s, f"{pool}attn.out_proj", torch.cat(heads, -1))
    return norm(s, f"{top}ln_post", mixed) @ s[f"{top}proj"]


def rms(x, weight):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def logits(s, config, ids, tokens=None):
    """Vocabulary logits `(N, vocabulary)` of one sequence, the vectors `tokens` between `<img>` and `</img>`."""
    x = s["transformer.wte.weight"][torch.tensor(ids)].clone()
    if tokens is not None:
        start = ids.index(config["visual"]["image_start_id"]) + 1
        assert ids[start + 256] == config["visual"]["image_start_id"] + 1
        x[start : start + 256] = tokens
    count, width = x.shape
    heads, size = config["num_attention_heads"], config["kv_channels"]
    frequency = 1.0 / config["rotary_emb_base"] ** (torch.arange(0, size, 2).float() / size)
    angle = (torch.arange(count).float()[:, None] * frequency).repeat(1, 2)[:, None]  # (N, 1, size)

    def rotated(value):
        first, second = value.chunk(2, -1)
        return value * angle.cos() + torch.cat([-second, first], -1) * angle.sin()

    hidden = torch.full((count, count), -math.inf).triu(1)
    for i in range(config["num_hidden_layers"]):
        h = f"transformer.h.{i}."
        mixed = linear(s, f"{h}attn.c_attn", rms(x, s[f"{h}ln_1.weight"]))
        q, k, v = (part.view(count, heads, size) for part in mixed.split(width, -1))
        weights = torch.einsum("nhd,mhd->hnm", rotated(q), rotated(k)) / size**0.5 + hidden
        found = torch.einsum("hnm,mhd->nhd", weights.softmax(-1), v).flatten(1)
        x = x + found @ s[f"{h}attn.c_proj.weight"].T
        inner = rms(x, s[f"{h}ln_2.weight"])
        inner = (inner @ s[f"{h}mlp.w1.weight"].T) * F.silu(inner @ s[f"{h}mlp.w2.weight"].T)
        x = x + inner @ s[f"{h}mlp.c_proj.weight"].T
    return rms(x, s["transformer.ln_f.weight"]) @ s["lm_head.weight"].T
