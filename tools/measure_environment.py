"""The same as `mmseg-llm clicks measure`."""

import sys

from mmseg_llm.cli import main

if __name__ == "__main__":
    sys.exit(main(["clicks", "measure", *sys.argv[1:]]))
