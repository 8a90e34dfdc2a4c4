"""`mmseg-llm doctor`: what is installed, what is missing and what each missing part would enable."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

CORE = ("torch", "torchvision", "transformers", "lightning", "jsonargparse", "peft", "albumentations", "pycocotools",
        "faster-coco-eval", "segment-anything", "torchmetrics", "tokenizers", "safetensors", "numpy", "pillow")  # fmt: skip
OPTIONAL = {"sentencepiece": "original InternLM2 tokenizers (pip install 'mmseg_llm[sentencepiece]')"}


def installed(name: str) -> str | None:
    """Version of a package, None when it is absent."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def report() -> str:
    """The report as text."""
    import torch

    from mmseg_llm import __version__

    lines = [f"mmseg_llm {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    lines += [f"  {name:<18} {installed(name) or 'MISSING: pip install mmseg_llm again'}" for name in CORE]
    lines += [f"  {name:<18} {installed(name) or 'absent; enables ' + use}" for name, use in OPTIONAL.items()]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            memory = torch.cuda.get_device_properties(index).total_memory / 2**30
            lines.append(f"  GPU {index}: {torch.cuda.get_device_name(index)}, {memory:.0f} GiB")
    else:
        lines.append(f"  no GPU; CPU with {torch.get_num_threads()} threads")
    return "\n".join(lines)
