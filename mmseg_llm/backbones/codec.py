"""Codec: all that data workers need to know of a backbone - tokenizer, chat template, image geometry - without weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmseg_llm.backbones.chat import ChatTemplate, Token
from mmseg_llm.backbones.coordinates import CoordinateCodec
from mmseg_llm.backbones.image_geometry import ImageGeometry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mmseg_llm.masks import Size
    from mmseg_llm.structures import Canvas

IGNORE_INDEX = -100
MAX_TEXTS = 4096  # whose tokens are remembered
CODEC_FILE = "codec.json"
TINY_TOKENIZER = Path(__file__).parent.parent / "assets" / "tiny_tokenizer"


@dataclass
class Codec:
    """Turns text, canvases and coordinates into what a backbone takes, and back. Cheap to pickle.

    Attributes:
        tokenizer: fast transformers tokenizer.
        geometry: image sizes and normalisation.
        template: chat turns.
        coordinates: how the family writes points.
        rope_axes: 1, or 3 where image tokens have their place in time and in the grid for rotary positions (M-RoPE).
        context: tokens the language model takes; 0 when unknown.
    """

    tokenizer: PreTrainedTokenizerBase
    geometry: ImageGeometry = field(default_factory=ImageGeometry)
    template: ChatTemplate = field(default_factory=ChatTemplate)
    coordinates: CoordinateCodec = field(default_factory=CoordinateCodec)
    rope_axes: int = 1
    context: int = 0

    def __post_init__(self) -> None:
        """Check that every control token is a single known id.

        Raises:
            ValueError: if the tokenizer lacks one.
        """
        self._texts: dict[str, tuple[int, ...]] = {}
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

        self._texts.clear()
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
                ids += self._encode(text)
                text = ""
            if part:
                ids.append(self._ids[part] if part in self._ids else self.token_id(part))
        return tuple(ids)

    def _encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text; prompts are made of the same few again and again."""
        if text not in self._texts:
            if len(self._texts) == MAX_TEXTS:
                self._texts.clear()
            self._texts[text] = tuple(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
        return self._texts[text]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, control tokens included, without the end token."""
        kept = [index for index in ids if index != self.end_id]
        return self.tokenizer.decode(kept, skip_special_tokens=False).strip()

    def image_prefix(self, canvas_size: Size | None = None) -> tuple[int, ...]:
        """Ids shared by everything asked about one image: system turn, user header and the image placeholders by rows.

        Args:
            canvas_size: of the image; of the fixed canvas when None.
        """
        t = self.template
        return self.encode(*t.opening(), *t.user(), *t.image(*self.geometry.token_grid(canvas_size)))

    def question(self, *parts: str, is_first: bool = True) -> tuple[int, ...]:
        """Ids of a question up to the start of its answer; the first one stands behind the image, later ones open a turn."""
        t = self.template
        start = [t.after_image] if is_first else t.user()
        return self.encode(*start, *parts, *t.end_of_user(), *t.assistant())

    def answer(self, *parts: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids and labels of an answer: all of it is supervised, its end token too, the line break behind is not."""
        ids = self.encode(self.template.before_answer, *parts, Token(self.template.turn_end))
        tail = self.encode(self.template.after_answer)
        return ids + tail, ids + (IGNORE_INDEX,) * len(tail)

    def positions(self, ids: Sequence[int], canvas_size: Size | None = None) -> tuple[np.ndarray, int]:
        """Rotary positions of a sequence with one image, and the position of whatever follows it.

        With M-RoPE (Qwen2-VL, section 2.1) text advances all axes by one per token; an image that starts at p puts its token
        (row, column) at (p, p + row, p + column), and text goes on at p + max(rows, columns).

        Args:
            ids: with at most one run of image placeholders.
            canvas_size: of the image; of the fixed canvas when None.

        Returns:
            int64 `(rope_axes, N)` and the next position.
        """
        count = len(ids)
        places = np.flatnonzero(np.asarray(ids) == self._ids[self.template.image_context])
        if self.rope_axes == 1 or not len(places):
            return np.broadcast_to(np.arange(count), (self.rope_axes, count)).copy(), count
        rows, columns = self.geometry.token_grid(canvas_size)
        assert len(places) == rows * columns and places[-1] - places[0] + 1 == len(places)
        start, end = int(places[0]), int(places[-1]) + 1
        row, column = (index.ravel() for index in np.indices((rows, columns)))
        image = np.stack([np.zeros_like(row), row, column]) + start  # (3, T)
        text = np.arange(count - end) + start + max(rows, columns)
        parts = [np.arange(start)[None].repeat(3, 0), image, text[None].repeat(3, 0)]
        return np.concatenate(parts, axis=1), start + max(rows, columns) + count - end

    def pixels(self, canvas: Canvas) -> np.ndarray:
        """Normalised float32 `(3, h, w)` of a canvas.

        Raises:
            ValueError: if the canvas has another size than the backbone takes.
        """
        g = self.geometry
        if g.is_dynamic and (canvas.size[0] % g.step or canvas.size[1] % g.step):
            raise ValueError(f"canvas of size {canvas.size} given to a backbone whose tokens are {g.step} pixels wide")
        if not g.is_dynamic and canvas.size != g.image_size:
            raise ValueError(f"canvas of size {canvas.size} given to a backbone that takes {g.image_size}")
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
            "rope_axes": self.rope_axes,
            "context": self.context,
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
            rope_axes=settings.get("rope_axes", 1),
            context=settings.get("context", 0),
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


def tiny_tokenizer(template: ChatTemplate) -> PreTrainedTokenizerBase:
    """The tokenizer that ships with the package, with the control tokens of a template."""
    from tokenizers import AddedToken

    tokenizer = load_tokenizer(TINY_TOKENIZER)
    known = tokenizer.get_vocab()
    names = [name for name in template.control_tokens if name not in known]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    return tokenizer
