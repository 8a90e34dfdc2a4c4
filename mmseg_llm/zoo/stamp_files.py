"""Files of released STAMP checkpoints: full models and LoRA adapters, read from safetensors by their official flat names.

Flat names are those that transformers 4.57 wrote: `visual.*`, `model.*`, `lm_head.weight`, `classifier.*` (STAMP specification
section 7).

Legend: V rows of the vocabulary, D language width.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmseg_llm.backbones.loading import CONFIG_FILE, read_settings

if TYPE_CHECKING:
    import torch

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MODEL_WEIGHTS = "model.safetensors"
MODEL_INDEX = "model.safetensors.index.json"
EMBEDDINGS, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
CLASSIFIER = ("classifier.weight", "classifier.bias")

_NESTED = {"model.visual.": "visual.", "model.language_model.": "model."}
_PEFT_PREFIX = "base_model.model."
_PEFT_COPY = re.compile(r"\.(modules_to_save|original_module)(\.default)?(?=\.(weight|bias)$)")


def fetch(source: str | Path) -> Path:
    """The folder itself, or the snapshot of a hub id; adapters on the hub are fetched as any other checkpoint.

    Raises:
        ValueError: if it is neither.
    """
    folder, name = Path(source), str(source)
    if folder.is_dir():
        return folder
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"no folder '{name}', and it is no hub id; give a checkpoint folder or an id like owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"'{name}' cannot be fetched from the hub ({type(error).__name__}); "
            "check the name and the network, or download the folder and give its path"
        ) from error


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a LoRA adapter rather than a full model.

    Raises:
        ValueError: if it holds neither.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        return True
    if (folder / CONFIG_FILE).is_file():
        return False
    raise ValueError(
        f"{folder} is no STAMP checkpoint: it has neither {CONFIG_FILE} (full model) nor {ADAPTER_CONFIG} (LoRA adapter); "
        "give one of these folders (a run folder of this library needs no conversion)"
    )


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer was saved in a folder."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def model_files(folder: Path) -> list[Path]:
    """The safetensors files of a full model: the single one, or those of the index.

    Raises:
        ValueError: if there are none, or one of the index is missing.
    """
    if (folder / MODEL_WEIGHTS).is_file():
        return [folder / MODEL_WEIGHTS]
    names = sorted(set(read_settings(folder, MODEL_INDEX).get("weight_map", {}).values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        lacking = missing[0] if missing else f"{MODEL_WEIGHTS} and no {MODEL_INDEX}"
        raise ValueError(f"{folder} has no {lacking}; download all weight files of the checkpoint")
    return [folder / name for name in names]


def adapter_files(folder: Path) -> list[Path]:
    """The safetensors file of an adapter.

    Raises:
        ValueError: if it is missing; pickled adapters are not read.
    """
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ValueError(f"{folder} has no {ADAPTER_WEIGHTS}; download it, or save the adapter as safetensors")
    return [folder / ADAPTER_WEIGHTS]


def flat_name(key: str) -> str:
    """Official name of a parameter of the stock class, or of a checkpoint that nests its parts as that class does."""
    for nested, flat in _NESTED.items():
        if key.startswith(nested):
            return flat + key.removeprefix(nested)
    return key


def _is_copy(key: str) -> bool:
    return _PEFT_COPY.search(key) is not None


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """An open safetensors file; errors of a damaged one become one sentence."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); download it again") from error


class Weights:
    """Tensors of some safetensors files by flat name; files are only read for the tensors that are asked for.

    PEFT's second copies of modules that were trained in full are dropped: `modules_to_save` gives way to the plain name,
    `original_module` is the base's (STAMP specification 7.3).

    Args:
        folder: they belong to.
        files: all of its weight files.

    Raises:
        ValueError: if a file is damaged.
    """

    def __init__(self, folder: Path, files: Sequence[Path]) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, tuple[Path, str]] = {}
        for path in files:
            with _opened(path) as file:
                for key in sorted(file.keys(), key=_is_copy):  # plain names first
                    copy = _PEFT_COPY.search(key)
                    name = flat_name(_PEFT_COPY.sub("", key).removeprefix(_PEFT_PREFIX))
                    if (copy is None or copy[1] == "modules_to_save") and name not in self.shapes:
                        self.shapes[name] = tuple(file.get_slice(key).get_shape())
                        self._places[name] = (path, key)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor as stored."""
        path, key = self._places[name]
        with _opened(path) as file:
            return file.get_tensor(key)

    def require(self, names: Iterable[str]) -> None:
        """Raises: ValueError if one of the names is missing."""
        missing = [name for name in names if name not in self.shapes]
        if missing:
            shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise ValueError(
                f"the weights in {self.folder} lack {shown}; give a folder with all files of a released STAMP checkpoint"
            )

    def refuse(self, names: Iterable[str]) -> None:
        """Raises: ValueError if there are any of these names, which nothing takes."""
        unexpected = sorted(names)
        if unexpected:
            shown = ", ".join(unexpected[:3]) + (", ..." if len(unexpected) > 3 else "")
            raise ValueError(
                f"the weights in {self.folder} hold {shown}, which this model has no place for; "
                "use the config and the base that they were trained with"
            )

    def check_classifier(self) -> None:
        """The classifier is one output over the width of the embeddings: `(1, D)` and `(1,)`.

        Raises:
            ValueError: if it has another shape.
        """
        width = self.shapes[EMBEDDINGS][1]
        found = [self.shapes[name] for name in CLASSIFIER]
        if found != [(1, width), (1,)]:
            raise ValueError(
                f"the classifier in {self.folder} has the shapes {found[0]} and {found[1]} where the language model of width "
                f"{width} needs (1, {width}) and (1,); use weights and classifier of one checkpoint"
            )
