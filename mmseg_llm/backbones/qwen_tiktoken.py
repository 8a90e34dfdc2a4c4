"""The tokenizer of Qwen-VL-Chat as a fast transformers tokenizer, from `qwen.tiktoken` or from the files of Qwen2, whose ranks
are the same.

A `.tiktoken` file lists byte strings by rank; which two a longer one is made of is found by encoding it with the ranks below its
own. Its original class writes the bytes of a path between `<img>` and `</img>`; here image tokens are placeholders by id.
"""

from __future__ import annotations

import base64
import binascii
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

TIKTOKEN_FILE, VOCABULARY_FILE, MERGES_FILE = "qwen.tiktoken", "vocab.json", "merges.txt"
END_OF_TEXT, PLACEHOLDER = "<|endoftext|>", "<imgpad>"
# In the order of their ids, behind the base vocabulary: <|endoftext|> is 151643, <ref> 151851, <img> 151857, <imgpad> 151859.
IMAGE_TOKENS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", PLACEHOLDER)
CONTROL_TOKENS = (
    END_OF_TEXT,
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_{index}|>" for index in range(205)),
    *IMAGE_TOKENS,
)
# Contractions, words with what stands before them, single digits, other signs, line breaks, blanks.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def qwen_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder, with all control tokens.

    Args:
        folder: with `qwen.tiktoken`, or with `vocab.json` and `merges.txt` of Qwen2.

    Raises:
        ValueError: if it has neither, or a file is damaged.
    """
    if (folder / TIKTOKEN_FILE).is_file():
        return build_tokenizer(*read_tiktoken(folder / TIKTOKEN_FILE), name=str(folder))
    if (folder / VOCABULARY_FILE).is_file() and (folder / MERGES_FILE).is_file():
        vocabulary = json.loads((folder / VOCABULARY_FILE).read_text(encoding="utf-8"))
        lines = (folder / MERGES_FILE).read_text(encoding="utf-8").splitlines()
        merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        return build_tokenizer(vocabulary, merges, name=str(folder))  # type: ignore[arg-type]
    raise ValueError(
        f"folder {folder} has no {TIKTOKEN_FILE} (nor {VOCABULARY_FILE} and {MERGES_FILE} of a Qwen2 model, whose base "
        "vocabulary is the same); download the tokenizer file into it"
    )


def build_tokenizer(
    vocabulary: dict[str, int], merges: Sequence[tuple[str, str]], name: str = ""
) -> PreTrainedTokenizerBase:
    """A byte-level BPE with Qwen's pattern, NFC, and `CONTROL_TOKENS` behind its vocabulary.

    Args:
        vocabulary: ids of the base tokens, their bytes written as `byte_letters` does.
        merges: in the order of their ranks.
        name: where it is from, for messages.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(vocabulary, list(merges)))
    core.normalizer = normalizers.NFC()
    pieces = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([pieces, letters])
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )
    tokenizer.name_or_path = name
    return tokenizer


def read_tiktoken(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a `.tiktoken` file: a token in base64 and its rank per line.

    Raises:
        ValueError: if a line is something else, ranks are not 0, 1, 2, ..., or a token is not made of two others.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(
                f"line {number} of {path} is no base64 token with its rank; download the file again"
            ) from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"the ranks in {path} are not 0 to {len(ranks) - 1}; download the file again")
    lacking = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if lacking:
        raise ValueError(f"{path} has no token for the byte {lacking[0]}; download the file again")
    letters = byte_letters()
    ordered = sorted(ranks, key=ranks.__getitem__)
    written = {token: "".join(letters[byte] for byte in token) for token in ordered}
    merges = []
    for token in ordered:
        if len(token) == 1:
            continue
        parts = _parts(token, ranks)
        if len(parts) != 2 or not all(part in ranks for part in parts):
            raise ValueError(f"token {token!r} in {path} is not made of two of lower rank; download the file again")
        merges.append((written[parts[0]], written[parts[1]]))
    return {written[token]: rank for token, rank in ranks.items()}, merges


def _parts(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """What BPE makes of a token with the merges below its own rank."""
    bound = ranks[token]
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        found = [(ranks.get(parts[i] + parts[i + 1], bound), i) for i in range(len(parts) - 1)]
        rank, at = min(found)
        if rank >= bound:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def byte_letters() -> list[str]:
    """The letter that byte-level BPE writes for each byte: printable Latin-1 itself, the others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
