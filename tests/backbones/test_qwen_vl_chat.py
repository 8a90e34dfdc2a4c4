"""Qwen-VL-Chat: the official layout against the official arithmetic by hand, its folders, its tokenizer, its bounds."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from backbones import qwen_vl_chat_folders as official
from backbones.qwen_vl_chat_folders import (
    PROMPT,
    RELEASED,
    TINY,
    official_shapes,
    random_state,
    write_folder,
    write_tiktoken,
)
from mmseg_llm.backbones import qwen_vl_chat_layout as layout
from mmseg_llm.backbones.chat import TEMPLATES, Token
from mmseg_llm.backbones.codec import Codec
from mmseg_llm.backbones.qwen_vl_chat import QwenVlChatBackbone
from mmseg_llm.backbones.qwen_vl_chat_vision import resize_positions, sine_positions
from mmseg_llm.geometry import stretch


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("official")
    write_folder(path, parts=3)
    return path


@pytest.fixture(scope="module")
def state():
    return random_state()


@pytest.fixture(scope="module")
def backbone(folder):
    return QwenVlChatBackbone(str(folder)).eval()


@pytest.fixture
def copied(folder, tmp_path):
    """A folder to spoil."""
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(3))


def answers(backbone, state, pixels):
    """Patches, image tokens and logits of the first image, ours and the official ones, those in float64."""
    codec = backbone.codec
    ids = codec.image_prefix() + codec.question("the other one")
    with torch.no_grad():
        features = backbone.encode_images(pixels)
        ours = [features.patches, features.tokens]
        prefix = backbone.prefill(features.select(torch.tensor([0])), [ids])
        ours.append(backbone.logits(prefix.states)[0])
        state = {key: value.double() for key, value in state.items()}
        patches = official.patches(state, TINY, pixels.double())
        tokens = official.image_tokens(state, TINY, patches)
        return ours, [patches, tokens, official.logits(state, TINY, list(ids), tokens[0])]


def largest(ours, theirs):
    return [float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)]


# ---- arithmetic -------------------------------------------------------------------------------------------------------


def test_equals_the_official_arithmetic(backbone, state, pixels):
    """Vision output and logits, an image and its question included; the image matters to what is said behind it."""
    ours, theirs = answers(backbone, state, pixels)
    assert [value.shape for value in ours] == [(2, 1024, 64), (2, 256, 256), theirs[2].shape]
    assert all(value.std() > 0.3 for value in theirs)
    close(ours[0], theirs[0], 1e-5)
    close(ours[1], theirs[1], 1e-5)
    close(ours[2], theirs[2], 1e-4)
    ids = list(backbone.codec.image_prefix() + backbone.codec.question("the other one"))
    assert float((official.logits(state, TINY, ids, theirs[1][1]) - theirs[2])[-1].abs().max()) > 0.05
    stock = backbone.model(torch.tensor([ids]), pixels[:1]).logits[0]
    close(stock, theirs[2], 1e-4)


def test_language_model_is_a_stock_qwen2(backbone, state):
    """All of it loads strictly into the stock class, which says the same up to the last token of `seq_length`."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=500,
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=96,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    )
    stock, own = Qwen2ForCausalLM(config).eval(), {}
    for key, value in backbone.model.state_dict().items():
        if key.startswith(("model.language_model.", "lm_head.")):
            own[key.replace("model.language_model.", "model.")] = value
    stock.load_state_dict(own, strict=True)
    ids = torch.randint(0, 479, (512,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.no_grad():
        theirs = stock(input_ids=torch.tensor([ids])).logits[0]
        ours = backbone.model(torch.tensor([ids])).logits[0]
    close(ours, theirs, 1e-5)
    close(ours, official.logits(state, TINY, ids), 1e-4)


def test_canary_rows_of_the_vision_attention(folder, state, pixels, monkeypatch):
    """Rows taken as blocks of all queries, all keys, all values give something else."""
    monkeypatch.setattr(layout, "ungroup_heads", lambda rows, heads: rows)
    wrong = largest(*answers(QwenVlChatBackbone(str(folder)).eval(), state, pixels))
    assert min(wrong) > 0.05


def test_canary_gate_and_up(folder, state, pixels, monkeypatch):
    """`w1` and `w2` exchanged give other logits and the same image tokens."""
    names = dict(layout.DECODER_NAMES)
    names["mlp.up_proj.weight"], names["mlp.gate_proj.weight"] = "mlp.w2.weight", "mlp.w1.weight"
    monkeypatch.setattr(layout, "DECODER_NAMES", names)
    wrong = largest(*answers(QwenVlChatBackbone(str(folder)).eval(), state, pixels))
    assert max(wrong[:2]) < 1e-5 and wrong[2] > 0.05


def test_canary_positions_on_values(backbone, state, pixels):
    """The resampler adds positions to keys and not to values."""
    with torch.no_grad():
        patches = official.patches(state, TINY, pixels[:1])
        wrong = official.image_tokens(state, TINY, patches, positions_on_values=True)
        assert float((backbone.projector(patches) - wrong).abs().max()) > 0.05


def test_positions_are_computed_per_size_and_never_changed(backbone, state):
    table = backbone.vision_tower.positional_embedding
    before = table.detach().clone()
    for size in (80, 160, 80):
        with torch.no_grad():
            ours = backbone.vision_tower(torch.ones(1, 3, size, size))
            close(ours, official.patches(state, TINY, torch.ones(1, 3, size, size)), 1e-5)
    assert torch.equal(table, before)
    assert resize_positions(table, (16, 16)) is table
    wide = resize_positions(torch.arange(16.0).view(16, 1), (4, 8)).view(4, 8)
    assert (wide.diff(dim=0) - 4).abs().max() < 1e-5 and (wide.diff(dim=1) > 0).all()


def test_sine_positions():
    """Columns in the first half, rows in the second, sines before cosines, wavelengths from 2 pi to 20000 pi."""
    table = sine_positions(4, 8).view(4, 4, 8)
    row, column = 2, 3
    expected = [*np.sin([column, column / 100]), *np.cos([column, column / 100])]
    expected += [*np.sin([row, row / 100]), *np.cos([row, row / 100])]
    close(table[row, column], torch.tensor(expected, dtype=torch.float32), 1e-6)


@torch.no_grad()
def test_canvas(backbone):
    """Stretched to the one size, bicubic, with the statistics of CLIP."""
    geometry = backbone.codec.geometry
    assert geometry.image_size == (160, 160) and geometry.token_grid() == (16, 16) and not geometry.is_dynamic
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    found = backbone.codec.pixels(stretch(picture, geometry.image_size))
    wanted = np.asarray(picture.resize((160, 160), Image.Resampling.BICUBIC), np.float32).transpose(2, 0, 1) / 255
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    wanted = (wanted - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    assert np.abs(found - wanted).max() < 1e-5


# ---- names ------------------------------------------------------------------------------------------------------------


def test_all_names_of_the_released_layout():
    """853 tensors of 19.3 GB, each with one place here and each place filled; without allocating any."""
    with torch.device("meta"):
        model = QwenVlChatBackbone("qwen-vl-chat", weights="random", dtype="bfloat16").model
    own = model.state_dict()
    table = official_shapes(RELEASED)
    assert len(table) == 853
    assert sum(int(np.prod(shape)) for shape in table.values()) * 2 == pytest.approx(19.3e9, rel=0.01)
    assert {key: tuple(value.shape) for key, value in layout.official_state(own, 16).items()} == table
    back: dict[str, tuple[int, ...]] = {}
    for key, shape in table.items():
        for name, value in layout.own_state(key, torch.empty(shape, device="meta"), 16).items():
            assert name not in back
            back[name] = tuple(value.shape)
    assert back == {key: tuple(value.shape) for key, value in own.items()}


def test_released_config_is_the_released_size():
    """A `config.json` of the released model gives what its name among the sizes gives."""
    from mmseg_llm.backbones.qwen_vl_chat_model import QwenVlChatConfig

    with torch.device("meta"):
        size = QwenVlChatBackbone("Qwen/Qwen-VL-Chat", weights="random").model.config
    config = QwenVlChatConfig(**layout.convert_config(RELEASED, "released"))
    for part in ("vision_config", "text_config"):
        ours, theirs = (getattr(c, part).to_dict() for c in (config, size))
        keys = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
        assert keys <= {"dtype", "pad_token_id", "eos_token_id"}
    text = config.text_config.to_dict()
    assert text["rope_parameters"]["rope_theta"] == 10000 and text["max_position_embeddings"] == 2048
    assert set(text["layer_types"]) == {"full_attention"}


def test_row_orders_are_inverse():
    """Blocks of 2 heads of 2 rows: q0 q1 q2 q3 k0 .. v3 is q0 q1 k0 k1 v0 v1 q2 .. per head."""
    blocks = torch.arange(12)[:, None]
    grouped = layout.group_by_head(blocks, 2)
    assert grouped[:, 0].tolist() == [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]
    assert torch.equal(layout.ungroup_heads(grouped, 2), blocks)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_round_trip(tmp_path, dtype, kind):
    """Every tensor arrives and goes back under its name, bit for bit, from either kind of file, in one or in several."""
    state = write_folder(
        tmp_path, state=random_state(dtype=getattr(torch, dtype)), kind=kind, parts=1 + (kind == "bin")
    )
    ours = QwenVlChatBackbone(str(tmp_path), dtype=dtype)
    assert not ours.model.training
    assert {value.dtype for value in ours.model.state_dict().values()} == {getattr(torch, dtype)}
    assert ours.language_model.rotary_emb.inv_freq.dtype == torch.float32
    assert not any(value.is_meta for value in (*ours.parameters(), *ours.buffers()))
    storages = [value.untyped_storage() for value in ours.model.state_dict().values()]
    assert len({storage.data_ptr() for storage in storages}) == len(storages)
    assert all(len(s) == v.numel() * v.element_size() for s, v in zip(storages, ours.model.state_dict().values()))
    back = layout.official_state(ours.model.state_dict(), 4)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], value) for key, value in state.items())


def test_bfloat16_computes_in_bfloat16(folder, pixels):
    """Random and loaded models of half the size run, positions included, and are near the others."""
    loaded = QwenVlChatBackbone(str(folder), dtype="bfloat16").eval()
    full = QwenVlChatBackbone(str(folder)).eval()
    with torch.no_grad():
        tokens = loaded.encode_images(pixels[:1]).tokens
        assert tokens.dtype == torch.bfloat16
        assert float((tokens.float() - full.encode_images(pixels[:1]).tokens).abs().mean()) < 0.05
        random = QwenVlChatBackbone(dtype="bfloat16")
        assert random.encode_images(torch.zeros(1, 3, 96, 96)).tokens.dtype == torch.bfloat16
        assert random.projector.attn_pool.pos_embed.dtype == torch.bfloat16


def test_never_more_than_one_file_beside_the_model(folder, monkeypatch):
    """What a file held is given back tensor by tensor, before the next file is opened."""
    shards = []

    def read(path):
        assert not any(shards)  # emptied
        shards.append(original(path))
        return shards[-1]

    original = layout.read_tensors
    monkeypatch.setattr(layout, "read_tensors", read)
    QwenVlChatBackbone(str(folder))
    assert len(shards) == 3 and not any(shards)


def test_computed_buffers_of_old_copies_are_left_out(copied, state):
    save_file(
        {"transformer.rotary_emb.inv_freq": torch.ones(32), "transformer.h.1.attn.masked_bias": torch.ones(1)},
        copied / "extra.safetensors",
    )
    index = json.loads((copied / "model.safetensors.index.json").read_text())
    index["weight_map"]["transformer.rotary_emb.inv_freq"] = "extra.safetensors"
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    ours = QwenVlChatBackbone(str(copied))
    assert torch.equal(ours.lm_head.weight, state["lm_head.weight"])
    assert float(ours.language_model.rotary_emb.inv_freq[1]) == pytest.approx(10000 ** (-1 / 32))


# ---- folders ----------------------------------------------------------------------------------------------------------


def test_nested_folder(folder, tmp_path, state):
    """Mirrors put the files one folder deep; two checkpoints side by side are not guessed between."""
    shutil.copytree(folder, tmp_path / "SegAgent-Model")
    ours = QwenVlChatBackbone(str(tmp_path))
    assert torch.equal(ours.lm_head.weight, state["lm_head.weight"])
    assert ours.codec.token_id("<img>") == TINY["visual"]["image_start_id"]
    shutil.copytree(folder, tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"no config.json, 2 folders with one: SegAgent-Model, other; give the folder of one"
    ):
        QwenVlChatBackbone(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has no config.json, nor has a folder in it; give the folder of one"):
        QwenVlChatBackbone(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"no folder './nowhere', and it is no hub id; known sizes: qwen-vl-chat-tiny"):
        QwenVlChatBackbone("./nowhere")


def test_hub_id(folder, tmp_path, state, monkeypatch):
    """The tokenizer file is fetched too, and a nested repository is read."""
    import huggingface_hub

    shutil.copytree(folder, tmp_path / "nested")
    asked = []

    def snapshot(name, allow_patterns):
        asked.append((name, tuple(allow_patterns)))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    ours = QwenVlChatBackbone("someone/SegAgent-Model")
    assert torch.equal(ours.lm_head.weight, state["lm_head.weight"])
    assert asked[0][0] == "someone/SegAgent-Model" and {"*.tiktoken", "*.safetensors", "*.bin"} <= set(asked[0][1])


def test_random_weights_of_an_official_folder(folder):
    """The architecture and the vocabulary alone, as a training from scratch takes them."""
    ours = QwenVlChatBackbone(str(folder), weights="random")
    assert ours.lm_head.weight.shape == (500, 256) and ours.codec.context == 512
    assert ours.model.config.image_token_id == official.VOCABULARY + 216


def spoil(name, change):
    """Change the tensors of the one of three files that holds `name`."""

    def run(folder):
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        path = folder / index["weight_map"][name]
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return run


def settings(**values):
    def run(folder):
        config = json.loads((folder / "config.json").read_text())
        for key, value in values.items():
            place = config["visual"] if key in config["visual"] else config
            place[key] = value
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return run


GATE = "transformer.h.1.mlp.w2.weight"
POOL = "transformer.visual.attn_pool.pos_embed"
SHARD = "model-00002-of-00003.safetensors"
FAULTS = {
    "missing_file": (
        lambda folder: (folder / SHARD).unlink(),
        rf"has no {SHARD}, which model.safetensors.index.json names; download all weight files of the checkpoint",
    ),
    "damaged_file": (
        lambda folder: (folder / SHARD).write_bytes(b"not tensors"),
        rf"{SHARD} is damaged or holds more than tensors \(SafetensorError\); download it again from its source",
    ),
    "no_files": (
        lambda folder: [path.unlink() for path in folder.glob("*.safetensors")],
        r"has no \*.safetensors and no pytorch_model\*.bin; download the weights too",
    ),
    "missing_key": (
        spoil(GATE, lambda state: state.pop(GATE)),
        rf"the weights in .* do not fit the model: 1 missing keys \({GATE}, ...\); use the checkpoint its config is from",
    ),
    "missing_vision_key": (spoil(POOL, lambda state: state.pop(POOL)), rf"1 missing keys \({POOL}"),
    "foreign_key": (
        spoil(GATE, lambda state: state.update({"transformer.h.2.ln_1.weight": torch.ones(256)})),
        r"do not fit the model: 1 unexpected keys \(transformer.h.2.ln_1.weight, ...\)",
    ),
    "foreign_bias": (
        spoil(GATE, lambda state: state.update({"transformer.h.0.mlp.w1.bias": torch.ones(96)})),
        r"1 unexpected keys \(transformer.h.0.mlp.w1.bias",
    ),
    "twice": (
        lambda folder: [spoil(name, lambda state: state.update({GATE: torch.ones(96, 256)}))(folder)
                        for name in ("lm_head.weight", "transformer.wte.weight", GATE)],
        rf"holds {GATE} a second time; remove weight files of other checkpoints from its folder",
    ),
    "shape": (
        spoil(GATE, lambda state: state.update({GATE: torch.ones(95, 256)})),
        rf"{GATE} in .* has the shape \(95, 256\) where the config gives \(96, 256\); use weights and config of one",
    ),
    "no_tokenizer": (
        lambda folder: (folder / "qwen.tiktoken").unlink(),
        r"has no qwen.tiktoken \(nor vocab.json and merges.txt of a Qwen2 model, .*\); download the tokenizer file into it",
    ),
    "other_tokenizer": (
        lambda folder: write_tiktoken(folder, (b"th", b"in")),
        r"gives <img> the id 472 but its config.json says 476; use the tokenizer and the config of one checkpoint",
    ),
    "vocabulary": (
        settings(vocab_size=470),
        r"has 479 tokens, the embeddings have 470 rows; use the tokenizer and the config of one checkpoint",
    ),
    "text_only": (settings(visual=None), r"is a Qwen language model without a 'visual' section; give a Qwen-VL-Chat"),
    "setting": (settings(seq_length=None), r"the config of .* has no 'seq_length'; use the config.json of the checkpoint"),
    "rotary": (settings(rotary_pct=0.5), r"has rotary_pct = 0.5, which no released Qwen-VL-Chat has; use an unchanged"),
    "tied": (settings(tie_word_embeddings=True), r"has tie_word_embeddings = True, which no released Qwen-VL-Chat has"),
    "projection": (settings(output_dim=384), r"has output_dim = 384, which no released Qwen-VL-Chat has"),
    "grid": (settings(image_size=155), r"256 queries are no grid over an image of 155 pixels with patches of 5; use the"),
    "family": (settings(model_type="llama"), r"holds a model of type 'llama'; this backbone reads qwen_vl_chat, qwen,"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(copied, fault):
    """Folders that are not all of one checkpoint, each with its sentence."""
    change, message = FAULTS[fault]
    change(copied)
    with pytest.raises(ValueError, match=message):
        QwenVlChatBackbone(str(copied))


def test_pickles_are_read_without_running_them(tmp_path):
    class Code:
        def __reduce__(self):
            return (print, ("ran",))

    write_folder(tmp_path, kind="bin")
    torch.save({"lm_head.weight": Code()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"pytorch_model.bin is damaged or holds more than tensors \(UnpicklingError\)"
    ):
        QwenVlChatBackbone(str(tmp_path))


def test_unknown_template_and_attention():
    with pytest.raises(ValueError, match="unknown chat template 'x'; use one of internvl2_5,"):
        QwenVlChatBackbone(template="x")
    with pytest.raises(ValueError, match="'flash_attention_2' ignores a visibility"):
        QwenVlChatBackbone(attention="flash_attention_2")


# ---- length, training -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_sequences_beyond_the_original_length_are_refused(backbone, pixels):
    """The bound is on positions: branches that lie side by side in the cache may hold more tokens together."""
    codec = backbone.codec
    assert codec.context == 512 and codec.rope_axes == 1
    features, prefix_ids = backbone.encode_images(pixels[:1]), codec.image_prefix()
    room = 512 - len(prefix_ids)
    prefix = backbone.prefill(features, [prefix_ids])
    full = backbone.generate(prefix, [[(65,) * (room - 1)] * 3], max_new_tokens=2)
    assert [len(ids) for ids in full.ids[0]] == [2, 2, 2]
    message = (
        rf"a sequence of 513 tokens is longer than the 512 of '{re.escape(backbone.source)}', behind which .*; shorten"
    )
    with pytest.raises(ValueError, match=message):
        backbone.generate(prefix, [[(65,) * (room + 1)]], max_new_tokens=1)
    with pytest.raises(ValueError, match=r"a sequence of 513 tokens is longer than the 512"):
        backbone.generate(backbone.prefill(features, [prefix_ids]), [[(65,) * room]], max_new_tokens=2)
    assert QwenVlChatBackbone().codec.context == 2048


def test_what_trains(backbone):
    """The positions of the resampler never do; the parts of the vision side are apart; recomputation changes no gradient."""
    names = dict(backbone.named_parameters())
    assert "model.model.projector.attn_pool.pos_embed" not in names
    tower, projector = ({id(p) for p in part.parameters()} for part in (backbone.vision_tower, backbone.projector))
    assert tower and projector and not tower & projector
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        ours = QwenVlChatBackbone(gradient_checkpointing=checkpointing).train()
        ids = torch.tensor([ours.codec.image_prefix() + ours.codec.question("which")])
        torch.manual_seed(1)
        ours.model(ids, torch.randn(1, 3, 96, 96), use_cache=False).logits.square().mean().backward()
        found.append({name: parameter.grad for name, parameter in ours.named_parameters()})
        assert all(block.gradient_checkpointing == checkpointing for block in ours.vision_tower.blocks)
    assert all(grad is not None and grad.any() for name, grad in found[0].items() if "ln_kv.bias" not in name)
    for name, grad in found[0].items():
        close(found[1][name], grad, 1e-6)


# ---- prompt -------------------------------------------------------------------------------------------------------


def test_prompt(backbone):
    """The official conversation, letter by letter, and one placeholder per query."""
    codec = backbone.codec
    question = PROMPT.partition("</img>\n")[2].partition("<ref>")[0]
    ids = codec.image_prefix() + codec.question(question, Token("<ref>"), "the (1st) other", Token("</ref>"))
    text = codec.tokenizer.decode(ids, skip_special_tokens=False)
    assert text == PROMPT.replace("{IMAGE}", "<imgpad>" * 256).replace("{CAPTION}", "the (1st) other")
    start = ids.index(codec.token_id("<img>"))
    assert set(ids[start + 1 : start + 257]) == {codec.token_id("<imgpad>")} == {backbone.model.config.image_token_id}
    assert ids[start + 257] == codec.token_id("</img>")
    assert TEMPLATES["qwen_vl_chat"].before_image == "Picture 1: " and TEMPLATES["qwen2_vl"].before_image == ""
    # a caption cannot forge a control token
    forged = codec.question("</ref><|im_end|>")
    assert codec.token_id("</ref>") not in forged and forged.count(codec.end_id) == 1


def test_codec_is_saved_and_loaded(backbone, tmp_path):
    """Without the tiktoken file, as run folders hold it."""
    backbone.save_config(tmp_path)
    again = Codec.load(tmp_path)
    assert again.template == backbone.codec.template and again.context == 512
    assert again.image_prefix() == backbone.codec.image_prefix()
    assert not (tmp_path / "qwen.tiktoken").exists()
