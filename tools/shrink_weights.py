"""Store the weights of a run in half precision, as the package ships them.

python tools/shrink_weights.py --run runs/pretrain_tiny --output mmseg_llm/assets/tiny_mask_decoder.safetensors
"""

from __future__ import annotations

from pathlib import Path

from mmseg_llm.training.checkpoint import WEIGHTS


def main(*, run: Path, output: Path) -> None:
    """Convert.

    Args:
        run: run folder.
        output: file to write.
    """
    import torch
    from safetensors.torch import load_file, save_file

    state = load_file(run / WEIGHTS)
    halves = {key: value.to(torch.float16) if value.is_floating_point() else value for key, value in state.items()}
    worst = max(float(value.abs().max()) for value in halves.values() if value.is_floating_point())
    if worst > torch.finfo(torch.float16).max:
        raise ValueError(f"{run} holds values up to {worst:g}, too large for float16; ship float32")
    save_file(halves, output)
    print(f"{output}: {output.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main, as_positional=False)
