"""The same as `mmseg-llm evaluate`."""

import sys

from mmseg_llm.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
