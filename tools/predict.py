"""The same as `mmseg-llm predict`."""

import sys

from mmseg_llm.cli import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
