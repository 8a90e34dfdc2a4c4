"""Train a click segmenter: `python tools/train_segmenter.py fit --config configs/simple_click_tiny.yaml`."""

import sys

from mmseg_llm.cli import guarded


def main() -> None:
    """Run the door with the arguments of the process."""
    from mmseg_llm.training.simple_click_cli import train_simple_click

    train_simple_click(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(guarded(main))
