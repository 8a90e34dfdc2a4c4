"""Official weights of SimpleClick (`cocolvis_vit_large.pth` and its like; SegAgent specification section 11).

An official file pickles, besides its tensors, objects of the training code. Such a file is refused by `load_simple_click`;
`convert_simple_click` takes the tensors out once, without running or importing anything that the file names.
"""

from __future__ import annotations

import collections
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mmseg_llm.data.unpickle import ForbiddenGlobalError
from mmseg_llm.segmenters.sam_engine import summary
from mmseg_llm.segmenters.simple_click.network import SIZES, UNUSED, SimpleClick

ASSETS = Path(__file__).parents[2] / "assets"
HINT = "get cocolvis_vit_large.pth (or base, huge, xtiny) from https://github.com/uncbiag/SimpleClick"
# Package of the official training code; its objects in a file are settings that nothing here needs.
FOREIGN = "isegm"

# All that a pickle of tensors needs besides storages, which torch resolves itself.
_PLAIN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
}


class _Inert:
    """Stands for an object of the training code: takes everything, does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def load_simple_click(path: str | Path) -> SimpleClick:
    """A network with the weights of a file; its size follows from their shapes.

    Args:
        path: `.safetensors` of `convert_simple_click` or of a training, the name of one that ships with the package, or a
            `.pth` that holds nothing but tensors.

    Raises:
        ValueError: if the file is missing or damaged, holds objects of foreign classes, or its tensors are not exactly those of
            a SimpleClick network.
    """
    path = _existing(path)
    if path.suffix == ".safetensors":
        try:
            content: Any = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} is not a safetensors file ({summary(error)}); convert the original again"
            ) from error
        return build_simple_click(content, path)
    _check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, usually objects of the training code, and was not loaded; take the tensors out "
            f"once with convert_simple_click({str(path)!r}, 'simple_click.safetensors') and load that file"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a file of torch.save ({summary(error)}); {HINT}") from error
    return build_simple_click(_tensors(content, path), path)


def convert_simple_click(path: str | Path, to: str | Path) -> Path:
    """Copy the tensors of an official `.pth` to a safetensors file, which `load_simple_click` reads without a pickle.

    Only tensors are built; objects of the package `isegm` become inert stand-ins, and any other name that the file asks for
    stops the conversion. Tensors that no forward pass reads are left out.

    Args:
        path: official file.
        to: safetensors file to write.

    Returns:
        `to`.

    Raises:
        ValueError: if the file is missing or damaged, asks for any other global (nothing of it is run), or its tensors are
            not exactly those of a SimpleClick network.
    """
    path, to = _existing(path), Path(to)
    if to.suffix != ".safetensors":
        raise ValueError(f"cannot convert to '{to}'; name a file that ends in .safetensors")
    _check_archive(path)
    return save_simple_click(build_simple_click(_tensors(_load_restricted(path), path), path), to)


def save_simple_click(network: SimpleClick, path: str | Path, dtype: torch.dtype | None = None) -> Path:
    """Write a network to a safetensors file; what stands at `path` is complete at any time.

    Args:
        network: weights of any device.
        path: file to write.
        dtype: to store as, such as `torch.float16` for half of the size; as they are when None. Loading gives float32.

    Returns:
        `path`.

    Raises:
        ValueError: if a weight does not fit into `dtype`.
    """
    path = Path(path)
    state = {
        key: value.detach().to("cpu", dtype or value.dtype).contiguous() for key, value in network.state_dict().items()
    }
    broken = sorted(key for key, value in state.items() if not value.isfinite().all())
    if broken:
        raise ValueError(
            f"{broken[0]} is not finite as {dtype or 'stored'}; the training diverged, or store it as float32"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    save_file(state, partial, {"format": "pt"})
    return partial.replace(path)


def build_simple_click(state: Mapping[str, torch.Tensor], source: str | Path = "state_dict") -> SimpleClick:
    """A network in eval mode, float32, around official tensors by key; the tensors are taken over where they are float32.

    Args:
        state: all tensors that the network reads; those of `UNUSED` may be there too.
        source: what errors call it.

    Raises:
        ValueError: for tensors that are missing, unknown or of another shape.
    """
    name = size_of(state, source)
    with torch.device("meta"):
        network = SimpleClick(name)
    floats = {key: value.float() for key, value in state.items()}
    try:
        network.load_state_dict(floats, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{source} does not hold SimpleClick '{name}' ({summary(error)}); {HINT}") from error
    return network.eval()


def size_of(state: Mapping[str, torch.Tensor], source: str | Path = "state_dict") -> str:
    """Name in `SIZES` of the network that tensors belong to, by width, depth and patch.

    Raises:
        ValueError: if none does.
    """
    kernel = state.get("backbone.patch_embed.proj.weight")
    if kernel is None or kernel.ndim != 4:
        raise ValueError(
            f"{source} holds no SimpleClick network, key backbone.patch_embed.proj.weight is missing; {HINT}"
        )
    blocks = {key.split(".")[2] for key in state if key.startswith("backbone.blocks.")}
    found = (kernel.shape[0], len(blocks), kernel.shape[-1])
    for name, size in SIZES.items():
        if (size.width, size.depth, size.patch) == found:
            return name
    known = ", ".join(f"{name} {(size.width, size.depth, size.patch)}" for name, size in SIZES.items())
    raise ValueError(f"{source} has (width, depth, patch) {found}, which is no SimpleClick; known are {known}")


def _existing(path: str | Path) -> Path:
    """The path of a file that is there, or ships with the package under that name."""
    path = Path(path).expanduser()
    for candidate in (path, ASSETS / path):
        if candidate.is_file():
            return candidate
    raise ValueError(f"SimpleClick weights {path} do not exist; {HINT}")


def _check_archive(path: Path) -> None:
    """Refuse what is no zip archive of `torch.save` (torch 1.6 and later), or one of TorchScript, which is a program."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {Path(name).name for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path} is not a file of torch.save ({summary(error)}); {HINT}") from error
    if "data.pkl" not in names or "constants.pkl" in names:
        raise ValueError(f"{path} is an archive of something else than torch.save; {HINT}")


def _tensors(content: Any, path: Path) -> dict[str, torch.Tensor]:
    """The state dict within what a file holds: `{state_dict, config}`, or the state dict alone."""
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict of tensors; {HINT}")
    return {key: value for key, value in state.items() if not key.startswith(UNUSED)}


def _load_restricted(path: Path) -> Any:
    """What a file of `torch.save` holds, its foreign objects inert.

    Raises:
        ValueError: if it asks for a name that neither tensors nor the training code need, or is damaged.
    """

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if module.split(".")[0] == FOREIGN:
                return _Inert
            if (module, name) in _PLAIN:
                return _PLAIN[module, name]
            raise ForbiddenGlobalError(path, module, name)

    restricted: Any = SimpleNamespace(Unpickler=Unpickler, __name__="restricted")
    try:
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=restricted)
    except ForbiddenGlobalError as error:
        raise ValueError(
            f"{path} asks for '{error.module}.{error.name}', which neither tensors nor the training code need, and was not "
            f"converted; {HINT}"
        ) from error
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
    ) as error:
        raise ValueError(f"{path} is not a file of torch.save ({summary(error)}); {HINT}") from error
