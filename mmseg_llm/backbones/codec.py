"""Codec: all that data workers need to know of a backbone - tokenizer, chat template, image geometry - without weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmseg_llm.backbones.coordinates import CoordinateCodec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mmseg_llm.structures import Canvas

IGNORE_INDEX = -100
CODEC_FILE = "codec.json"

# The constant system message of InternVL2.5 and later, and that of InternVL2 (both are part of the released models).
INTERNVL2_5_SYSTEM = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)
INTERNVL2_SYSTEM = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)


class Token(str):
    """A control token inside a prompt, by name. Plain strings in a prompt can never become control tokens."""

    __slots__ = ()


@dataclass(frozen=True)
class ChatTemplate:
    """ChatML-like turns around one image. Control tokens are named; `bos` opens the sequence where the family has one."""

    system: str = INTERNVL2_5_SYSTEM
    turn_start: str = "<|im_start|>"
    turn_end: str = "<|im_end|>"
    image_start: str = "<img>"
    image_context: str = "<IMG_CONTEXT>"
    image_end: str = "</img>"
    bos: str | None = None

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Every control token the template uses."""
        names = (self.turn_start, self.turn_end, self.image_start, self.image_context, self.image_end)
        return names if self.bos is None else (*names, self.bos)


TEMPLATES = {
    "internvl2_5": ChatTemplate(),
    "internvl2": ChatTemplate(system=INTERNVL2_SYSTEM),
    "plain": ChatTemplate(system=""),
}


@dataclass(frozen=True)
class ImageGeometry:
    """Fixed-size view of an image: pixels, patches of the vision tower and tokens of the language model.

    Attributes:
        image_size: `(h, w)` of the canvas.
        patch: side of a patch in pixels.
        merge: patches per token and axis (the inverse of the pixel-unshuffle ratio).
        mean, std: channel statistics on the 0..1 scale.
    """

    image_size: tuple[int, int] = (448, 448)
    patch: int = 14
    merge: int = 2
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        """Raises: ValueError if the image size is not a whole number of tokens."""
        step = self.patch * self.merge
        if self.image_size[0] % step or self.image_size[1] % step:
            raise ValueError(f"image size {self.image_size} must be a multiple of patch * merge = {step}")

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Rows and columns of vision patches."""
        return (self.image_size[0] // self.patch, self.image_size[1] // self.patch)

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of image tokens in the language model."""
        return (self.patch_grid[0] // self.merge, self.patch_grid[1] // self.merge)

    @property
    def num_tokens(self) -> int:
        """Image tokens per image."""
        return self.token_grid[0] * self.token_grid[1]


@dataclass
class Codec:
    """Turns text, canvases and coordinates into what a backbone takes, and back. Cheap to pickle.

    Attributes:
        tokenizer: fast transformers tokenizer.
        geometry: image sizes and normalisation.
        template: chat turns.
        coordinates: how the family writes points.
    """

    tokenizer: PreTrainedTokenizerBase
    geometry: ImageGeometry = field(default_factory=ImageGeometry)
    template: ChatTemplate = field(default_factory=ChatTemplate)
    coordinates: CoordinateCodec = field(default_factory=CoordinateCodec)

    def __post_init__(self) -> None:
        """Check that every control token is a single known id.

        Raises:
            ValueError: if the tokenizer lacks one.
        """
        self._ids = {name: self.token_id(name) for name in self.template.control_tokens}

    def token_id(self, name: str) -> int:
        """Id of a control token, looked up by name and never by tokenising a string.

        Raises:
            ValueError: if the tokenizer does not know it as one token.
        """
        index = self.tokenizer.convert_tokens_to_ids(name)
        if not isinstance(index, int) or self.tokenizer.convert_ids_to_tokens(index) != name:
            raise ValueError(
                f"the tokenizer at '{self.tokenizer.name_or_path}' has no token '{name}'; use the tokenizer saved with "
                "the checkpoint, or train from a base so that the token is added"
            )
        return index

    def add_tokens(self, names: Sequence[str]) -> int:
        """Append control tokens that are missing, in order; returns how many were added."""
        from tokenizers import AddedToken

        known = self.tokenizer.get_vocab()
        new = [AddedToken(name, special=True, normalized=False) for name in names if name not in known]
        return self.tokenizer.add_tokens(new, special_tokens=True) if new else 0

    @property
    def pad_id(self) -> int:
        """Id that fills padding (never attended to, never supervised)."""
        index = self.tokenizer.pad_token_id
        return self.end_id if index is None else index

    @property
    def end_id(self) -> int:
        """Id that ends an answer."""
        return self._ids[self.template.turn_end]

    def encode(self, *parts: str) -> tuple[int, ...]:
        """Token ids of a prompt given as text and `Token` parts; neighbouring texts are tokenised as one string."""
        ids: list[int] = []
        text = ""
        for part in (*parts, Token("")):
            if not isinstance(part, Token):
                text += part
                continue
            if text:
                ids += self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
                text = ""
            if part:
                ids.append(self._ids[part] if part in self._ids else self.token_id(part))
        return tuple(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, control tokens included, without the end token."""
        kept = [index for index in ids if index != self.end_id]
        return self.tokenizer.decode(kept, skip_special_tokens=False).strip()

    def image_prefix(self) -> tuple[int, ...]:
        """Ids shared by everything asked about one image: system turn, user header and the image placeholders."""
        t = self.template
        parts: list[str] = [] if t.bos is None else [Token(t.bos)]
        if t.system:
            parts += [Token(t.turn_start), f"system\n{t.system}", Token(t.turn_end), "\n"]
        parts += [Token(t.turn_start), "user\n", Token(t.image_start)]
        parts += [Token(t.image_context)] * self.geometry.num_tokens
        return self.encode(*parts, Token(t.image_end))

    def question(self, *parts: str) -> tuple[int, ...]:
        """Ids from behind the image to the start of the answer; begin the text with a line break."""
        t = self.template
        return self.encode(*parts, Token(t.turn_end), "\n") + self.encode(Token(t.turn_start), "assistant\n")

    def answer(self, *parts: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids and labels of an answer: all of it is supervised, its end token too, the line break behind is not."""
        ids = self.encode(*parts, Token(self.template.turn_end))
        tail = self.encode("\n")
        return ids + tail, ids + (IGNORE_INDEX,) * len(tail)

    def pixels(self, canvas: Canvas) -> np.ndarray:
        """Normalised float32 `(3, h, w)` of a canvas.

        Raises:
            ValueError: if the canvas has another size than the backbone takes.
        """
        if canvas.size != self.geometry.image_size:
            raise ValueError(f"canvas of size {canvas.size} given to a backbone that takes {self.geometry.image_size}")
        # scaled in float64 and then rounded, bit for bit as the stock image processors do it
        levels = (np.arange(256) * (1 / 255)).astype(np.float32)
        values: np.ndarray = levels[np.asarray(canvas.image, np.uint8)]  # (h, w, 3)
        values = (values - np.asarray(self.geometry.mean, np.float32)) / np.asarray(self.geometry.std, np.float32)
        return np.ascontiguousarray(values.transpose(2, 0, 1))

    def save(self, folder: Path) -> None:
        """Write tokenizer and settings into `folder`."""
        self.tokenizer.save_pretrained(folder)
        settings = {
            "geometry": asdict(self.geometry),
            "template": asdict(self.template),
            "coordinates": asdict(self.coordinates),
        }
        (folder / CODEC_FILE).write_text(json.dumps(settings, ensure_ascii=False, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Codec:
        """Inverse of `save`.

        Raises:
            ValueError: if the folder holds no codec or tokenizer.
        """
        path = Path(folder) / CODEC_FILE
        if not path.is_file():
            raise ValueError(f"{folder} has no {CODEC_FILE}; it is not a folder written by this library")
        settings = json.loads(path.read_text(encoding="utf-8"))
        for key in ("image_size", "mean", "std"):
            settings["geometry"][key] = tuple(settings["geometry"][key])
        return cls(
            tokenizer=load_tokenizer(folder),
            geometry=ImageGeometry(**settings["geometry"]),
            template=ChatTemplate(**settings["template"]),
            coordinates=CoordinateCodec(**settings["coordinates"]),
        )


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a local folder or hub id; SentencePiece folders of InternLM2 become a Llama-style tokenizer.

    Raises:
        ValueError: if there is none.
    """
    from transformers import AutoTokenizer, LlamaTokenizerFast, PreTrainedTokenizerFast

    folder = Path(source)
    if folder.is_dir() and (folder / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    if folder.is_dir() and (folder / "tokenizer.model").is_file():
        # The InternLM2 tokenizer class is remote code; the same pieces without the dummy prefix space are equivalent.
        return LlamaTokenizerFast.from_pretrained(folder, legacy=False, add_prefix_space=False)
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer can be loaded from '{source}': {str(error).splitlines()[0]}") from error
