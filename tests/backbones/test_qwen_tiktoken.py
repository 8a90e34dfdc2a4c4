"""The tokenizer of Qwen-VL-Chat from either kind of file, against the real vocabulary and tiktoken's algorithm by hand."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import unicodedata

import pytest
import torch

from backbones import qwen_vl_chat_folders as official
from backbones.qwen_vl_chat_folders import PROMPT, TINY, write_tiktoken
from mmseg_llm.backbones.chat import Token
from mmseg_llm.backbones.codec import load_tokenizer
from mmseg_llm.backbones.qwen_tiktoken import CONTROL_TOKENS, PATTERN, build_tokenizer, qwen_tokenizer, read_tiktoken
from mmseg_llm.backbones.qwen_vl_chat import QwenVlChatBackbone


def test_small_tiktoken(tmp_path):
    """Merges by rank, byte letters, control tokens by position, and text that comes back."""
    write_tiktoken(tmp_path)
    tokenizer = qwen_tokenizer(tmp_path)
    assert tokenizer.tokenize(" the other") == ["Ġthe", "Ġ", "o", "the", "r"]
    assert tokenizer.encode("12") == [49, 50]  # single digits, whatever could be merged
    assert tokenizer.encode("the") == [257] and len(tokenizer) == official.VOCABULARY + 217
    first = official.VOCABULARY
    assert [tokenizer.convert_tokens_to_ids(name) for name in ("<|endoftext|>", "<|im_end|>", "<ref>", "<imgpad>")] == [
        first,
        first + 2,
        first + 208,
        first + 216,
    ]
    for text in ("é e\u0301 \u0000\x7f\xad\u3000", "日本 12345\r\n\n x  y", "I'll DON'T  ...!?\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)
    (tmp_path / "saved").mkdir()
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.encode(" the 12<ref>other") == tokenizer.encode(" the 12<ref>other")


def line(token: bytes, rank: int) -> bytes:
    return base64.b64encode(token) + f" {rank}\n".encode()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (b"###\n", "line 263 of .* is no base64 token with its rank; download the file again"),
        (b"dGg= x\n", "line 263 of .* is no base64 token with its rank"),
        (line(b"ab", 270), "the ranks in .* are not 0 to 262; download the file again"),
        (line(b"abcd", 262), "token b'abcd' in .* is not made of two of lower rank; download the file again"),
        (line(b"abc", 262) + line(b"ab", 263), "token b'abc' in .* is not made of two of lower rank"),
        (line(b"\xff\xfe\xfd", 262), "is not made of two of lower rank"),
    ],
)
def test_tiktoken_faults(tmp_path, extra, message):
    write_tiktoken(tmp_path)
    path = tmp_path / "qwen.tiktoken"
    path.write_bytes(path.read_bytes() + extra)
    with pytest.raises(ValueError, match=message):
        read_tiktoken(path)


def test_tiktoken_without_a_byte(tmp_path):
    (tmp_path / "qwen.tiktoken").write_bytes(b"".join(line(bytes([byte]), byte) for byte in range(255)))
    with pytest.raises(ValueError, match=r"qwen.tiktoken has no token for the byte 255; download the file again"):
        qwen_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def qwen_files(shared_data):
    folder = shared_data / "tokenizers" / "qwen"
    if not (folder / "qwen.tiktoken").is_file():
        pytest.skip(f"the Qwen vocabulary is absent: {folder} has no qwen.tiktoken")
    return folder


@pytest.fixture(scope="module")
def qwen(qwen_files):
    return read_tiktoken(qwen_files / "qwen.tiktoken")


def by_rank(text: str, ranks: dict[bytes, int]) -> list[int]:
    """What tiktoken does: the piece itself when it has a rank, else the pair of lowest rank is joined until there is none."""
    import regex

    ids = []
    for piece in regex.findall(PATTERN, unicodedata.normalize("NFC", text)):
        parts = [bytes([byte]) for byte in piece.encode()]
        if piece.encode() in ranks:
            parts = [piece.encode()]
        while True:
            pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
            if not pairs:
                break
            at = min(pairs)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [ranks[part] for part in parts]
    return ids


@pytest.fixture(scope="module")
def real_tokenizer(qwen):
    return build_tokenizer(*qwen)


def test_real_vocabulary(qwen_files, qwen, real_tokenizer):
    """Token by token and merge by merge those of Qwen2; the tokenizer of either kind of file is the same."""
    vocabulary, merges = qwen
    assert vocabulary == json.loads((qwen_files / "vocab.json").read_text())
    lines = (qwen_files / "merges.txt").read_text().splitlines()[1:]
    assert merges == [tuple(text.split(" ")) for text in lines] and len(merges) == 151387
    assert len(real_tokenizer) == 151860
    ids = {name: real_tokenizer.convert_tokens_to_ids(name) for name in CONTROL_TOKENS}
    assert list(ids.values()) == list(range(151643, 151860))
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<ref>", "<box>", "<quad>", "<img>", "</img>", "<imgpad>")
    wanted = [151643, 151644, 151645, 151851, 151853, 151855, 151857, 151858, 151859]
    assert [ids[name] for name in names] == wanted


def test_real_tokenizer(qwen_files, real_tokenizer, tmp_path):
    """As tiktoken encodes; digits are single tokens; the ids of a whole prompt, by the files of Qwen2, are frozen."""
    tokenizer = real_tokenizer
    ranks = {
        base64.b64decode(token): int(rank)
        for token, rank in (text.split() for text in (qwen_files / "qwen.tiktoken").read_bytes().splitlines())
    }
    texts = [
        "Hello, world! I'LL don't  go\n\n\tto the  zoo ...\r\n",
        "Current IOU: 74, Positive point: (175, 483)",
        "左から2番目の赤い車, naïve cafe\u0301 🙂👍🏽 ½ Ⅷ ١٢٣",
        "x=1;\n    return {'a': [0.25, -17]}  # what?\n",
        "Supercalifragilisticexpialidocious antidisestablishmentarianism",
        "   leading, trailing   ",
    ]
    for text in texts:
        assert tokenizer.encode(text, add_special_tokens=False) == by_rank(text, ranks), text
    assert tokenizer.encode("0123456789") == list(range(15, 25))
    assert tokenizer.encode("Hello, world!") == [9707, 11, 1879, 0]

    config = TINY | {"vocab_size": 151936, "visual": TINY["visual"] | {"image_start_id": 151857}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(qwen_files / name, tmp_path / name)
    with torch.device("meta"):
        codec = QwenVlChatBackbone(str(tmp_path), weights="random").codec
    question = PROMPT.partition("</img>\n")[2].partition("<ref>")[0]
    ids = codec.image_prefix() + codec.question(question, Token("<ref>"), "man in the 2nd row", Token("</ref>"))
    assert ids[:20] == GOLDEN_PREFIX and set(ids[20:276]) == {151859} and ids[276:] == GOLDEN_QUESTION
    whole = PROMPT.replace("{IMAGE}", "<imgpad>" * 256).replace("{CAPTION}", "man in the 2nd row")
    assert tuple(tokenizer.encode(whole, add_special_tokens=False)) == ids


# Ids of the official conversation up to <img>, and behind the image for the caption "man in the 2nd row".
GOLDEN_PREFIX = (
    *(151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198),
    *(151644, 872, 198, 24669, 220, 16, 25, 220, 151857),
)
GOLDEN_QUESTION = (
    *(151858, 198, 5501, 29436, 279, 18267, 74218, 6176, 6911, 304, 264, 1459, 44439, 11566, 3118, 389, 279, 2168, 323),
    *(4008, 2213, 11, 773, 429, 432, 14521, 279, 2169, 1633, 438, 29257, 438, 3204, 13, 576, 1633, 4008, 374, 438),
    *(11017, 25, 151851, 1515, 304, 279, 220, 17, 303, 2802, 151852, 151645, 198, 151644, 77091, 198),
)
