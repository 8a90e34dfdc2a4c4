"""The InternVL adapter: packing, caching, decoding, layouts on disk, what trains, and the released sizes."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from backbones.tiny import FAMILIES, make_batch, make_model, scenes, stock_states
from mmseg_llm.backbones.adapters import Lora, Trainable, lora_targets
from mmseg_llm.backbones.internvl import InternVLBackbone
from mmseg_llm.heads.mask_decoder.head import MaskDecoderHead
from mmseg_llm.model import PerceptionModel

TOLERANCE = 1e-5


def close(actual, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return make_model(request.param)


@pytest.fixture(scope="module")
def qwen2():
    return make_model()


# ---- packing and caching ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_packed_equals_cached_and_separate(model):
    backbone = model.backbone
    batch = make_batch(model, scenes(0, 2, 7))
    packed = backbone(batch).states
    start = len(backbone.codec.image_prefix())
    features = backbone.encode_images(batch.pixels)

    # prefill + extend
    prefix = backbone.prefill(features, [backbone.codec.image_prefix()] * len(features.grids))
    close(prefix.states, packed[:, :start])
    assert torch.equal(prefix.image_positions, batch.image_positions)
    assert prefix.open_branches(4) == 1
    block = batch.visibility.block[:, start:]
    cached = backbone.extend(prefix, block, ids=batch.ids[:, start:])
    close(cached[block >= 0], packed[:, start:][block >= 0])

    # each branch as a plain sequence through the stock model
    for row in range(len(batch.ids)):
        for branch in range(1, 5):
            keep = (batch.visibility.block[row] == 0) | (batch.visibility.block[row] == branch)
            assert batch.positions[0, row, keep].tolist() == list(range(int(keep.sum())))
            alone = stock_states(backbone, batch.ids[row, keep].tolist(), batch.pixels[row])
            close(packed[row, keep], alone)


@torch.no_grad()
def test_extend_in_pieces_and_by_embeddings(qwen2):
    backbone = qwen2.backbone
    batch = make_batch(qwen2, scenes(0))
    prompt = backbone.codec.image_prefix()
    features = backbone.encode_images(batch.pixels)
    ids, block = batch.ids[:, len(prompt) :], batch.visibility.block[:, len(prompt) :]

    def states(pieces, by_embeds=False):
        prefix = backbone.prefill(features, [prompt] * len(features.grids))
        prefix.open_branches(4)
        found = []
        for part in torch.arange(ids.shape[1]).tensor_split(pieces):
            given = {"embeds": backbone.embed(ids[:, part])} if by_embeds else {"ids": ids[:, part]}
            found.append(backbone.extend(prefix, block[:, part], **given))
        assert prefix.length == batch.ids.shape[1]
        return torch.cat(found, 1)

    whole = states(1)
    close(states(7), whole)
    close(states(3, by_embeds=True), whole)


@torch.no_grad()
def test_rollback_and_fork_are_exact(model):
    backbone = model.backbone
    batch = make_batch(model, scenes(0, 3))
    features = backbone.encode_images(batch.pixels)
    prefix = backbone.prefill(features, [backbone.codec.image_prefix()] * len(features.grids))
    prefix.open_branches(2)
    ids = batch.ids[:, 60:68]
    ones, twos = torch.ones_like(ids), torch.full_like(ids, 2)
    backbone.extend(prefix, ones, ids=ids)
    mark = prefix.mark()
    first = backbone.extend(prefix, twos, ids=ids)
    length = prefix.length
    prefix.rollback(mark)
    assert prefix.length == mark.length and prefix.cache.get_seq_length() == mark.length
    backbone.extend(prefix, ones, ids=ids.flip(1))
    backbone.extend(prefix, twos, ids=ids.flip(1))
    prefix.rollback(mark)
    assert torch.equal(backbone.extend(prefix, twos, ids=ids), first)
    assert prefix.length == length

    prefix.rollback(mark)
    fork = prefix.fork(torch.tensor([1, 0, 1]))
    forked = backbone.extend(fork, twos[[1, 0, 1]], ids=ids[[1, 0, 1]])
    close(forked, first[[1, 0, 1]])
    assert prefix.length == mark.length == prefix.cache.get_seq_length()  # untouched
    assert torch.equal(backbone.extend(prefix, twos, ids=ids), first)
    assert torch.equal(fork.features.patches, features.patches[[1, 0, 1]])


@torch.no_grad()
def test_prefill_checks_the_placeholders(qwen2):
    features = qwen2.backbone.encode_images(torch.zeros(1, 3, 96, 96))
    with pytest.raises(ValueError, match=r"35 image placeholders.*36"):
        qwen2.backbone.prefill(features, [qwen2.backbone.codec.image_prefix()[:-2]] * len(features.grids))


# ---- decoding ---------------------------------------------------------------------------------------------------------


def naive_greedy(backbone, prompt, pixels, steps, stop=()):
    """Recompute everything for every token, with the stock model."""
    ids, states = list(prompt), []
    for _ in range(steps):
        state = stock_states(backbone, ids, pixels)[-1]
        states.append(state)
        ids.append(int(backbone.lm_head(state).argmax()))
        if ids[-1] in (backbone.codec.end_id, *stop):
            break
    return ids[len(prompt) :], torch.stack(states)


@torch.no_grad()
def test_generate_equals_recomputation(model):
    backbone, codec = model.backbone, model.backbone.codec
    samples = scenes(0, 3)
    batch = make_batch(model, samples)
    branches = [
        [codec.question(query.text) for query in sample.queries[:count]] for sample, count in zip(samples, (3, 2))
    ]
    prompt = codec.image_prefix()
    prefix = backbone.prefill(backbone.encode_images(batch.pixels), [prompt] * 2)
    length = prefix.length

    def expected(stop):
        return [
            [naive_greedy(backbone, prompt + branch, batch.pixels[row], 5, stop) for branch in branches[row]]
            for row in range(2)
        ]

    free = backbone.generate(prefix, branches, max_new_tokens=5)
    stop = (free.ids[0][0][1], free.ids[1][1][0])  # branches end at different steps
    for generated, reference in (
        (free, expected(())),
        (backbone.generate(prefix, branches, max_new_tokens=5, stop=stop), expected(stop)),
    ):
        assert generated.ids == [[ids for ids, _ in row] for row in reference]
        for row, reference_row in zip(generated.states, reference):
            for states, (_, reference_states) in zip(row, reference_row, strict=True):
                close(states, reference_states)
    assert prefix.length == length == prefix.cache.get_seq_length()


def test_eager_equals_sdpa():
    sdpa, eager = make_model(), make_model(attention="eager")
    eager.load_state_dict(sdpa.state_dict())
    batch = make_batch(sdpa, scenes(0, 3))
    real = batch.visibility.block >= 0
    with torch.no_grad():
        close(eager.backbone(batch).states[real], sdpa.backbone(batch).states[real])
    assert (sdpa.backbone.attention, eager.backbone.attention) == ("sdpa", "eager")


def test_settings_are_checked():
    with pytest.raises(ValueError, match=r"flash_attention_2.*ignores a visibility"):
        InternVLBackbone(attention="flash_attention_2")
    with pytest.raises(ValueError, match="unknown chat template"):
        InternVLBackbone(template="vicuna")
    with pytest.raises(ValueError, match=r"no folder 'nowhere'.*internvl-tiny"):
        InternVLBackbone("nowhere")


# ---- folders ----------------------------------------------------------------------------------------------------------


def check_same(source, backbone):
    """A backbone read from `source` gives the states of `backbone`."""
    loaded = InternVLBackbone(str(source)).eval()
    assert loaded.codec.geometry == backbone.codec.geometry
    assert loaded.codec.image_prefix() == backbone.codec.image_prefix()
    torch.manual_seed(1)
    pixels = torch.randn(3, 96, 96)
    ids = [*backbone.codec.image_prefix(), *backbone.codec.question("the red cube")]
    with torch.no_grad():
        expected = stock_states(backbone, ids, pixels)
        close(stock_states(loaded, ids, pixels), expected)
        close(loaded.logits(expected), backbone.logits(expected))
    return loaded


@pytest.mark.parametrize("with_codec", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_reads_a_transformers_folder(family, with_codec, tmp_path):
    torch.manual_seed(0)
    backbone = InternVLBackbone(family).eval()
    backbone.model.save_pretrained(tmp_path)
    backbone.codec.save(tmp_path) if with_codec else backbone.codec.tokenizer.save_pretrained(tmp_path)
    check_same(tmp_path, backbone)


def test_random_weights_from_a_saved_config(tmp_path):
    torch.manual_seed(0)
    model = make_model()
    model.backbone.save_config(tmp_path / "config")
    again = InternVLBackbone(str(tmp_path / "config"), weights="random")
    assert again.codec.token_id("[REJ]") == model.backbone.codec.token_id("[REJ]")
    again.load_state_dict(model.backbone.state_dict())
    with pytest.raises(ValueError, match=r"safetensors|weights"):
        InternVLBackbone(str(tmp_path / "config"))


INVERSE_VISION = (
    ("embeddings.cls_token", "embeddings.class_embedding"),
    ("embeddings.position_embeddings", "embeddings.position_embedding"),
    ("embeddings.patch_embeddings.projection.", "embeddings.patch_embedding."),
    ("encoder.layer.", "encoder.layers."),
    (".lambda_1", ".ls1"),
    (".lambda_2", ".ls2"),
    (".attention.projection_layer.", ".attn.proj."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
)
INVERSE_INTERNLM2 = (
    ("model.embed_tokens.", "model.tok_embeddings."),
    ("lm_head.", "output."),
    (".input_layernorm.", ".attention_norm."),
    (".post_attention_layernorm.", ".ffn_norm."),
    (".self_attn.o_proj.", ".attention.wo."),
    (".mlp.gate_proj.", ".feed_forward.w1."),
    (".mlp.up_proj.", ".feed_forward.w3."),
    (".mlp.down_proj.", ".feed_forward.w2."),
)


def replace_all(name, rules):
    for old, new in rules:
        name = name.replace(old, new)
    return name


def chat_state(backbone, is_internlm2):
    """The state dict of a stock model under the names of the original layout."""
    source = backbone.model.state_dict()
    text = backbone.model.config.text_config
    state = {}
    for key, value in source.items():
        if key.startswith("model.vision_tower."):
            name = key.removeprefix("model.vision_tower.")
            if ".attention.k_proj." in name or ".attention.v_proj." in name:
                continue
            if ".attention.q_proj." in name:
                value = torch.cat([source[key.replace("q_proj", f"{x}_proj")] for x in "qkv"])
                name = name.replace(".attention.q_proj.", ".attn.qkv.")
            state["vision_model." + replace_all(name, INVERSE_VISION)] = value
        elif key.startswith("model.multi_modal_projector."):
            name = key.removeprefix("model.multi_modal_projector.")
            index = {"layer_norm": "0", "linear_1": "1", "linear_2": "3"}
            module, leaf = name.split(".")
            state[f"mlp1.{index[module]}.{leaf}"] = value
        else:
            name = key.replace("model.language_model.", "model.")
            if is_internlm2 and re.search(r"self_attn\.[kv]_proj", name):
                continue
            if is_internlm2 and "self_attn.q_proj" in name:
                heads, kv = text.num_attention_heads, text.num_key_value_heads
                group, rows = heads // kv, []
                q, k, v = (source[key.replace("q_proj", f"{x}_proj")] for x in "qkv")
                side = q.shape[0] // heads
                for i in range(kv):
                    rows += [q[i * group * side : (i + 1) * group * side]]
                    rows += [k[i * side : (i + 1) * side], v[i * side : (i + 1) * side]]
                value, name = torch.cat(rows), name.replace("self_attn.q_proj", "attention.wqkv")
            state["language_model." + (replace_all(name, INVERSE_INTERNLM2) if is_internlm2 else name)] = value
    return {key: value.clone().contiguous() for key, value in state.items()}


def unmerge(state, targets):
    """Take random adapters out of the target weights, as a checkpoint with `use_llm_lora` has them."""
    result = {}
    for key, value in state.items():
        if not key.startswith("language_model."):
            result[key] = value
            continue
        name = key.replace("language_model.", "language_model.base_model.model.", 1)
        stem = name.removesuffix(".weight")
        if stem.rsplit(".", 1)[-1] in targets and value.ndim == 2:
            a, b = 0.05 * torch.randn(4, value.shape[1]), 0.05 * torch.randn(value.shape[0], 4)
            result[f"{stem}.base_layer.weight"] = value - 2.0 * b @ a
            result[f"{stem}.lora_A.default.weight"], result[f"{stem}.lora_B.default.weight"] = a, b
        elif stem.rsplit(".", 1)[-1].removesuffix(".bias") in targets:
            result[f"{stem.removesuffix('.bias')}.base_layer.bias"] = value
        else:
            result[name] = value
    return result


def write_chat(folder, backbone, state, is_internlm2, binary=False):
    folder.mkdir(exist_ok=True)
    text, vision = backbone.model.config.text_config, backbone.model.config.vision_config
    names = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size vocab_size"
    llm = {name: getattr(text, name) for name in [*names.split(), "max_position_embeddings", "rms_norm_eps"]}
    llm |= {"rope_theta": 1e6, "architectures": ["InternLM2ForCausalLM" if is_internlm2 else "Qwen2ForCausalLM"]}
    if is_internlm2:
        llm["rope_scaling"] = {"type": "dynamic", "factor": 2.0}
    vit = {name: getattr(vision, name) for name in [*names.split()[:3], "intermediate_size", "layer_norm_eps"]}
    vit |= {"image_size": 96, "patch_size": 8, "qkv_bias": True, "qk_normalization": False, "norm_type": "layer_norm"}
    config = {"model_type": "internvl_chat", "llm_config": llm, "vision_config": vit, "downsample_ratio": 0.5}
    (folder / "config.json").write_text(json.dumps(config | {"force_image_size": 96}))
    backbone.codec.tokenizer.save_pretrained(folder)
    keys = sorted(state)
    for number, part in enumerate((keys[::2], keys[1::2])):
        shard = {key: state[key] for key in part}
        if binary:
            torch.save(shard, folder / f"pytorch_model-0000{number}.bin")
        else:
            save_file(shard, folder / f"model-0000{number}.safetensors")
    return folder


@pytest.mark.parametrize("is_unmerged", [False, True], ids=["merged", "lora"])
@pytest.mark.parametrize("family", ["internvl-tiny", "internvl-tiny-llama"])
def test_reads_an_internvl_chat_folder(family, is_unmerged, tmp_path):
    torch.manual_seed(0)
    is_internlm2 = family.endswith("llama")
    backbone = InternVLBackbone(family).eval()
    state = chat_state(backbone, is_internlm2)
    if is_unmerged:
        targets = ("wqkv", "wo", "w1", "w2", "w3") if is_internlm2 else lora_targets("qwen2")
        state = unmerge(state, targets)
        assert sum(".lora_A." in key for key in state) == 4 * len(targets)
    write_chat(tmp_path, backbone, state, is_internlm2, binary=is_unmerged)
    check_same(tmp_path, backbone)


def test_chat_folder_with_a_head_warns(tmp_path):
    torch.manual_seed(0)
    backbone = InternVLBackbone().eval()
    state = chat_state(backbone, False) | {"res_decoder.conv2.bias": torch.zeros(1)}
    write_chat(tmp_path, backbone, state, False)
    with pytest.warns(UserWarning, match="1 tensors that belong to a head"):
        InternVLBackbone(str(tmp_path))


def test_incomplete_chat_folders_are_refused(tmp_path):
    backbone = InternVLBackbone()
    state = chat_state(backbone, False)
    state.pop("language_model.model.norm.weight")
    folder = write_chat(tmp_path / "chat", backbone, state, False)
    with pytest.raises(ValueError, match=r"1 missing keys \(model.language_model.norm.weight"):
        InternVLBackbone(str(folder))
    state["language_model.model.norm.weight"] = torch.ones(128)
    state["language_model.model.norm.other"] = torch.ones(128)
    write_chat(folder, backbone, state, False)
    with pytest.raises(ValueError, match="1 unexpected keys"):
        InternVLBackbone(str(folder))
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ValueError, match="download the weights too"):
        InternVLBackbone(str(folder))
    config = json.loads((folder / "config.json").read_text())
    config["llm_config"]["architectures"] = ["Phi3ForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="Phi3ForCausalLM' is not supported"):
        InternVLBackbone(str(folder))


def test_incomplete_transformers_folders_are_refused(tmp_path):
    backbone = InternVLBackbone()
    backbone.model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokenizer"):
        InternVLBackbone(str(tmp_path))
    backbone.codec.save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop(next(key for key in weights if "language_model" in key and key.endswith(".norm.weight")))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 missing keys"):
        InternVLBackbone(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no \*\.safetensors"):
        InternVLBackbone(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(ValueError, match="type 'llava'"):
        InternVLBackbone(str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config\.json"):
        InternVLBackbone(str(tmp_path))


# ---- what trains ------------------------------------------------------------------------------------------------------

FROZEN = Trainable(vision=False, projector=False, language=False, embeddings=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_trains_adapters_new_rows_and_the_final_norm(family):
    model = make_model(family, lora=Lora(rank=4, alpha=8), trainable=FROZEN)
    backbone = model.backbone
    trains = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    others = {name for name in trains if "lora_" not in name and "trainable_tokens_delta" not in name}
    assert {name.rsplit("language_model.", 1)[-1] for name in others} == {"norm.weight"}
    assert sum("lora_A" in name for name in trains) == sum("lora_B" in name for name in trains) == 4 * 7
    assert sum("trainable_tokens_delta" in name for name in trains) == 2
    assert all(parameter.requires_grad for parameter in model.heads.parameters())

    def tables():
        embeddings, lm_head = backbone.model.get_input_embeddings(), backbone.lm_head
        with torch.no_grad():
            rows = embeddings.weight.shape[0] if hasattr(embeddings, "weight") else 0
            rows = rows or backbone.model.config.text_config.vocab_size
            return embeddings(torch.arange(rows)).clone(), lm_head(torch.eye(backbone.text_width)).T.clone()

    before = tables()
    frozen = {n: p.detach().clone() for n, p in backbone.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)
    model.train()
    losses = model.loss(make_batch(model, scenes(0, 7)))
    sum(value for name, value in losses.items() if not name.startswith("_")).backward()
    optimizer.step()
    new = {backbone.codec.token_id(name) for name in ("[SEG]", "[REJ]")}
    for old, now in zip(before, tables(), strict=True):
        changed = set((old != now).any(1).nonzero()[:, 0].tolist())
        assert changed == new
    for name, parameter in backbone.named_parameters():
        if name in frozen:
            assert torch.equal(frozen[name], parameter), name
    norm = next(p for n, p in backbone.named_parameters() if n.endswith("language_model.norm.weight"))
    assert (norm != 1).any()


def test_trainable_parts():
    model = make_model(trainable=Trainable(vision=False, embeddings=False, new_rows=False, final_norm=False))
    core = model.backbone.model.model
    assert not any(p.requires_grad for p in core.vision_tower.parameters())
    assert all(p.requires_grad for p in core.multi_modal_projector.parameters())
    assert not core.language_model.norm.weight.requires_grad
    assert not core.language_model.embed_tokens.weight.requires_grad
    assert not model.backbone.lm_head.weight.requires_grad
    assert all(p.requires_grad for p in core.language_model.layers.parameters())


def test_lora_targets_are_checked():
    with pytest.raises(ValueError, match="no LoRA targets are known"):
        lora_targets("gpt2")
    with pytest.raises(ValueError, match="match no layer"):
        make_model(lora=Lora(targets=("wqkv",)), trainable=FROZEN)


def test_frozen_vision_keeps_no_graph():
    model = make_model(trainable=Trainable(vision=False, projector=False))
    assert not model.backbone.encode_images(torch.zeros(1, 3, 96, 96)).tokens.requires_grad
    assert make_model().backbone.encode_images(torch.zeros(1, 3, 96, 96)).tokens.requires_grad


# ---- released sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "head", "vision", "projector", "body", "lm_head", "total"),
    [
        ("1B", 27_831_942, 304.01, 4.48, 493.80, 135.90, 938.2),
        ("2B", 30_191_238, 304.01, 12.60, 1699.60, 189.55, 2205.8),
        ("4B", 30_191_238, 304.01, 12.60, 3085.41, 310.63, 3712.6),
        ("8B", 34_385_542, 304.01, 33.57, 7358.69, 379.11, 8075.4),
    ],
)
def test_parameter_counts_of_the_released_sizes(size, head, vision, projector, body, lm_head, total):
    """Table 3.2 of the specification, with two rows for the control tokens, nothing allocated."""
    with torch.device("meta"):
        backbone = InternVLBackbone(f"OpenGVLab/InternVL2_5-{size}", weights="random")
        rows = backbone.lm_head.weight.shape[0]
        backbone.model.resize_token_embeddings(rows + 2, mean_resizing=False)
        model = PerceptionModel(backbone, {"mask_decoder": MaskDecoderHead()})
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.heads.parameters()) == head
    assert len(model.head().decoder.state_dict()) == 58
    core = backbone.model.model
    parts = (core.vision_tower, core.multi_modal_projector, core.language_model, backbone.lm_head)
    counts = [sum(parameter.numel() for parameter in part.parameters()) / 1e6 for part in parts]
    assert [round(count, 2) for count in counts] == [vision, projector, body, lm_head]
    assert round(sum(counts), 1) == total
    assert rows + 2 in (92555, 151676)
