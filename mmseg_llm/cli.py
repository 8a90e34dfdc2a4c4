"""Command line: `mmseg-llm train|evaluate|score|predict|data|convert|bench|doctor`. The signatures are schema and help.

Heavy libraries are imported inside the verbs, so that `--help` is instant.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


def evaluate(
    *,
    checkpoint: Path,
    data: Path,
    output: Path,
    protocol: str = "generate",
    split: Literal["train", "val", "test"] = "test",
    head: str | None = None,
    metric: str | None = None,
    batch_size: int = 16,
    device: str | None = None,
    max_samples: int | None = None,
    refiner: Path | None = None,
) -> None:
    """Score a checkpoint on a dataset; writes scores, protocol and every prediction as RLE.

    Args:
        checkpoint: run folder.
        data: data config (configs/data/*.yaml).
        output: JSON file to write.
        protocol: how the head answers: generate, official, and per_expression (mask_decoder) or force_segment (all_mask).
        split: which dataset of the data config.
        head: name of the head; the first one by default.
        metric: rules of the metric; by default clean, or the reference's own with protocol official.
        batch_size: images at once; the scores do not depend on it.
        device: cpu, cuda, ...; a GPU where there is one by default.
        max_samples: score the first images only.
        refiner: config of what sharpens the masks (configs/segmenters/*.yaml).
    """
    from mmseg_llm.configuration import read_data, read_refiner
    from mmseg_llm.data.base import Subset
    from mmseg_llm.evaluation import evaluate as run
    from mmseg_llm.evaluation import format_report
    from mmseg_llm.inference.perceiver import Perceiver

    sharpen = None if refiner is None else read_refiner(refiner)
    model = Perceiver.from_pretrained(checkpoint, device=device).model
    dataset = read_data(data).dataset(split)
    if max_samples is not None:
        dataset = Subset(dataset, max_samples)
    report = run(
        *(model, dataset, output),
        protocol=protocol,
        head=head,
        batch_size=batch_size,
        metric=metric,
        refiner=sharpen,
    )
    if report:
        print(format_report(report))
        print(f"{'written':>16}: {output}")


def score(*, predictions: Path, metric: str | None = None) -> None:
    """Compute the scores of a predictions file again.

    Args:
        predictions: file written by evaluate.
        metric: other rules than those of the file.
    """
    from mmseg_llm.evaluation import format_report, score_file

    print(format_report(score_file(predictions, metric)))


def predict(
    *,
    checkpoint: Path,
    image: Path,
    query: list[str],
    output: Path,
    head: str | None = None,
    protocol: str | None = None,
    batch_size: int = 8,
    device: str | None = None,
    refiner: Path | None = None,
) -> None:
    """Answer queries about an image or a folder of images: overlays, mask PNGs and one COCO JSON.

    Args:
        checkpoint: run folder.
        image: file or folder.
        query: expression, such as "the red cube"; repeat --query for more.
        output: folder to write.
        head: name of the head; the first one by default.
        protocol: how the head answers; its first way by default.
        batch_size: images at once.
        device: cpu, cuda, ...; a GPU where there is one by default.
        refiner: config of what sharpens the masks (configs/segmenters/*.yaml).
    """
    from mmseg_llm.configuration import read_refiner
    from mmseg_llm.inference.outputs import write_predictions
    from mmseg_llm.inference.perceiver import Perceiver

    for text in query:
        if not text.strip(" ."):
            raise ValueError(f"query {text!r} is empty; give an expression such as 'the red cube'")
    files = sorted(p for p in image.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES) if image.is_dir() else [image]
    if not files:
        raise ValueError(f"folder {image} has no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    sharpen = None if refiner is None else read_refiner(refiner)
    perceiver = Perceiver.from_pretrained(checkpoint, device=device, refiner=sharpen)
    requests = ((path, query) for path in files)
    answers = perceiver.predict_many(requests, head=head, protocol=protocol, batch_size=batch_size)
    for path, predictions in zip(files, write_predictions(answers, files, output), strict=True):
        for item in predictions:
            found = f"{item.mask.area if item.mask else 0} px" if item.exists else "no target"
            print(f"{path.name}: {item.query}: {found}, score {item.score:.3f}")
    print(f"written: {output}")


def data_synthetic(
    *,
    output: Path,
    level: str = "flat-96",
    train: int = 6000,
    val: int = 64,
    test: int = 300,
    seed: int = 0,
    workers: int = 1,
) -> None:
    """Write a synthetic dataset as COCO instances and RefCOCO references; returns at once if it is there already.

    Args:
        output: folder to write.
        level: difficulty, from flat-96 to scene-448.
        train: scenes.
        val: scenes.
        test: scenes.
        seed: of the scenes.
        workers: processes.
    """
    from mmseg_llm.data.synthetic.writer import write_dataset

    splits = {name: count for name, count in (("train", train), ("val", val), ("test", test)) if count}
    report = write_dataset(output, level, splits, seed=seed, workers=workers)
    print(f"{output}: {report['counts']['images']} images, {report['counts']['expressions']} expressions")


def data_trajectories(
    *,
    data: Path,
    environment: Path,
    output: Path,
    split: Literal["train", "val", "test"] = "train",
    max_clicks: int = 20,
    iou_threshold: float = 0.98,
    min_gain: float = 0.0,
    on_low_gain: Literal["break", "discard"] = "break",
    random_starts: int = 0,
    workers: int = 1,
    max_samples: int | None = None,
) -> None:
    """Let the oracle click on every object of a dataset; goes on where an earlier call was stopped.

    Args:
        data: data config (configs/data/*.yaml).
        environment: config of the segmenter that is clicked on (configs/environments/*.yaml).
        output: JSONL file to write, one trajectory per line.
        split: which dataset of the data config.
        max_clicks: most clicks on an object.
        iou_threshold: a mask of this IoU is good enough.
        min_gain: what a click must add to the best IoU so far.
        on_low_gain: whether a click that adds less ends the trajectory or is taken back.
        random_starts: trajectories per object that go on from random clicks, instead of the one from an empty mask.
        workers: processes.
        max_samples: the first images only.
    """
    from mmseg_llm.configuration import read_data
    from mmseg_llm.data.base import Subset
    from mmseg_llm.trajectories import Rules, record_dataset

    dataset = read_data(data).dataset(split)
    if max_samples is not None:
        dataset = Subset(dataset, max_samples)
    counts = record_dataset(
        *(dataset, environment, output), Rules(max_clicks, iou_threshold, min_gain, on_low_gain, random_starts), workers=workers
    )
    print(
        f"{output}: {counts['objects']} objects (and {counts['present']} before), mean IoU {counts['iou']:.3f} after "
        f"{counts['clicks']:.1f} clicks; {counts['without_target']} queries without target"
    )


def data_describe(*, data: Path) -> None:
    """Count what a data config offers, and what it skips.

    Args:
        data: data config (configs/data/*.yaml).
    """
    from mmseg_llm.configuration import read_data

    module = read_data(data)
    for split in ("train", "val", "test"):
        if getattr(module, split) is not None:
            print(json.dumps({split: module.dataset(split).describe()}))


def bench(
    *,
    checkpoint: Path | None = None,
    images: int = 16,
    queries: int = 6,
    level: str = "flat-96",
    output: Path | None = None,
    threads: int = 0,
    backbone: str = "internvl-tiny",
    head: Literal["mask_decoder", "all_mask"] = "mask_decoder",
) -> None:
    """Time the parts and compare shared-prefix inference with one expression at a time and with STAMP's own flow.

    Args:
        checkpoint: run folder; an untrained tiny model by default.
        images: synthetic images timed.
        queries: expressions per image.
        level: of the synthetic scenes.
        output: JSON file to write.
        threads: CPU threads; 0 takes all cores.
        backbone: tiny size of the untrained model.
        head: of the untrained model.
    """
    from mmseg_llm.bench import run_bench

    run_bench(checkpoint, images, queries, level, output, threads, backbone, head)


def convert_stamp(
    *,
    source: str,
    output: Path,
    base: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    mask_attention: Literal["bidirectional", "causal"] = "bidirectional",
    upsampling: Literal["bilinear", "nearest"] = "bilinear",
) -> None:
    """Write a released STAMP checkpoint (full model or LoRA adapter) as a run folder that every tool reads.

    Args:
        source: folder or hub id, such as JiaZL/STAMP-2B-uni.
        output: folder to write.
        base: base model of an adapter; the one its config names by default.
        dtype: storage type.
        min_pixels: lower bound on the area of a canvas; that of the training by default.
        max_pixels: upper bound.
        mask_attention: whether mask tokens see each other in both directions.
        upsampling: of mask cells to pixels; the reference takes nearest.
    """
    from mmseg_llm.zoo.stamp import convert_stamp as run

    folder = run(
        *(source, output),
        base=base,
        dtype=dtype,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        mask_attention=mask_attention,
        upsampling=upsampling,
    )
    print(f"written: {folder}")


def doctor() -> None:
    """Print versions, hardware and which optional parts are missing."""
    from mmseg_llm.doctor import report

    print(report())


def train(arguments: Sequence[str]) -> None:
    """Train, validate or test from a config: `train fit --config configs/quickstart.yaml`."""
    from mmseg_llm.training.cli import train as run

    run(arguments)


GROUPS = {
    "data": "Make and inspect datasets: synthetic, describe, trajectories.",
    "convert": "Read released checkpoints of the reference codes: stamp.",
}
VERBS: dict[str, Callable[..., Any] | dict[str, Callable[..., Any]]] = {
    "evaluate": evaluate,
    "score": score,
    "predict": predict,
    "data": {"synthetic": data_synthetic, "describe": data_describe, "trajectories": data_trajectories},
    "convert": {"stamp": convert_stamp},
    "bench": bench,
    "doctor": doctor,
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
    for name, entry in [("train", train), *VERBS.items()]:
        summary = GROUPS[name] if isinstance(entry, dict) else entry.__doc__ or ""
        lines.append(f"  {name:<10} {summary.splitlines()[0]}")
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
    if words[0] not in {"train", *VERBS}:
        print(f"error: no verb '{words[0]}'; use one of {', '.join(['train', *VERBS])}", file=sys.stderr)
        return 2
    return guarded(lambda: train(words[1:]) if words[0] == "train" else _run(VERBS[words[0]], words))


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
    rest = ["--query+" if word == "--query" else word.replace("--query=", "--query+=", 1) for word in words[1:]]
    auto_cli(entry, args=rest, as_positional=False, prog=f"mmseg-llm {words[0]}", exit_on_error=False)


if __name__ == "__main__":
    sys.exit(main())
