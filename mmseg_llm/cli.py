"""Command line: `mmseg-llm train|train-segmenter|evaluate|score|predict|data|clicks|convert|bench|doctor`."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmseg_llm.verbs import clicks, convert, data, depth_data, models


def train(arguments: Sequence[str]) -> None:
    """Train, validate or test from a config: `train fit --config configs/quickstart.yaml`."""
    from mmseg_llm.training.cli import train as run

    run(arguments)


def train_segmenter(arguments: Sequence[str]) -> None:
    """Train a segmenter to click on from a config: `train-segmenter fit --config configs/simple_click_tiny.yaml`."""
    from mmseg_llm.training.simple_click_cli import train_simple_click as run

    run(arguments)


GROUPS = {
    "data": "Make and inspect datasets: synthetic, describe, trajectories, rollouts, sft, curate, constant.",
    "clicks": "Interactive segmentation: measure segmenters by clicks, rate given masks.",
    "convert": "Read released checkpoints of the reference codes: stamp, segagent, depthlm, simple_click.",
}
TRAINING: dict[str, Callable[[Sequence[str]], None]] = {"train": train, "train-segmenter": train_segmenter}
"""Verbs that hand their arguments on."""
VERBS: dict[str, Callable[..., Any] | dict[str, Callable[..., Any]]] = {
    "evaluate": models.evaluate,
    "score": models.score,
    "predict": models.predict,
    "data": {
        "synthetic": data.synthetic,
        "describe": data.describe,
        "trajectories": data.trajectories,
        "rollouts": data.rollouts,
        "sft": data.sft,
        "curate": depth_data.curate,
        "constant": depth_data.constant,
    },
    "clicks": {"measure": clicks.measure, "rate": clicks.rate},
    "convert": {
        "stamp": convert.stamp,
        "segagent": convert.segagent,
        "depthlm": convert.depthlm,
        "simple_click": convert.simple_click,
    },
    "bench": models.bench,
    "doctor": models.doctor,
}


def find_configs(arguments: Sequence[str]) -> list[str]:
    """Let `configs/...` paths that are not in the working directory name the configs that ship with the package."""
    shipped = Path(__file__).parent / "configs"
    root = shipped if shipped.is_dir() else Path(__file__).parent.parent / "configs"
    found = []
    for argument in arguments:
        option, equals, value = argument.rpartition("=")
        path = Path(value)
        inside = root.joinpath(*path.parts[1:]) if path.parts[:1] == ("configs",) else None
        if inside is not None and not path.exists() and inside.is_file():
            value = str(inside)
        found.append(f"{option}{equals}{value}")
    return found


def usage() -> str:
    """The verbs with their first lines."""
    lines = ["usage: mmseg-llm VERB ...   (mmseg-llm VERB --help for its options)", ""]
    for name, entry in [*TRAINING.items(), *VERBS.items()]:
        summary = GROUPS[name] if isinstance(entry, dict) else entry.__doc__ or ""
        lines.append(f"  {name:<15} {summary.splitlines()[0]}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; user errors become one sentence and exit status 2."""
    words = find_configs(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in {"-h", "--help"}:
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        from mmseg_llm import __version__

        print(__version__)
        return 0
    if words[0] not in TRAINING | VERBS:
        print(f"error: no verb '{words[0]}'; use one of {', '.join(TRAINING | VERBS)}", file=sys.stderr)
        return 2
    return guarded(lambda: TRAINING[words[0]](words[1:]) if words[0] in TRAINING else _run(VERBS[words[0]], words))


def guarded(run: Callable[[], None]) -> int:
    """Run something; user errors become one sentence and exit status 2."""
    from jsonargparse import ArgumentError

    try:
        run()
    except (ValueError, ArgumentError) as error:
        print(f"error: {' '.join(str(root_cause(error)).split())}", file=sys.stderr)
        return 2
    return 0


def root_cause(error: BaseException) -> BaseException:
    """The error of this library behind one that a parser wrapped around it."""
    package = str(Path(__file__).parent)
    found, current = error, error.__cause__ or error.__context__
    while current is not None:
        trace = current.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        if isinstance(current, ValueError) and trace and trace.tb_frame.f_code.co_filename.startswith(package):
            found = current
        current = current.__cause__ or current.__context__
    return found


def _run(entry: Callable[..., Any] | dict[str, Callable[..., Any]], words: list[str]) -> None:
    from jsonargparse import auto_cli

    # `--query a --query b` is the natural way to repeat; jsonargparse appends with a plus
    lists = "query|trajectories" + ("|points" if words[0] == "predict" else "")
    rest = [re.sub(rf"^--({lists})(?=$|=)", r"--\1+", word) for word in words[1:]]
    auto_cli(entry, args=rest, as_positional=False, prog=f"mmseg-llm {words[0]}", exit_on_error=False)


if __name__ == "__main__":
    sys.exit(main())
