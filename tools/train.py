"""Train: `python tools/train.py fit --config configs/quickstart.yaml`. The same as `mmseg-llm train`."""

import sys

from mmseg_llm.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
