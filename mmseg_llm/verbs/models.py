"""Verbs about trained models: evaluate, score, predict, bench, doctor.

Heavy libraries are imported inside the verbs, so that `--help` is instant.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mmseg_llm.inference.depth_options import DepthRequest
    from mmseg_llm.inference.perceiver import Perceiver


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
    environment: Path | None = None,
    max_clicks: int | None = None,
    candidates: int | None = None,
    start: Path | None = None,
) -> None:
    """Score a checkpoint on a dataset; writes scores, protocol and every prediction as RLE.

    Args:
        checkpoint: run folder.
        data: data config (configs/data/*.yaml).
        output: JSON file to write.
        protocol: how the head answers: generate, official, and per_expression (mask_decoder), force_segment (all_mask), or
            reward_selected, search and oracle_best (click_policy).
        split: which dataset of the data config.
        head: name of the head; the first one by default.
        metric: rules of the metric; by default clean, or the reference's own with protocol official.
        batch_size: images at once; the scores do not depend on it.
        device: cpu, cuda, ...; a GPU where there is one by default.
        max_samples: score the first images only.
        refiner: config of what sharpens the masks (configs/segmenters/*.yaml).
        environment: config of what a click policy clicks on, other than in its training (configs/environments/*.yaml).
        max_clicks: of an episode of a click policy; as in its training by default.
        candidates: answers that a click policy tries per mask with protocol search.
        start: predictions file of any head whose masks a click policy goes on from.
    """
    from mmseg_llm.configuration import read_environment, read_refiner, read_split
    from mmseg_llm.evaluation import evaluate as run
    from mmseg_llm.evaluation import format_report
    from mmseg_llm.inference.perceiver import Perceiver

    sharpen = None if refiner is None else read_refiner(refiner)
    perceiver = Perceiver.from_pretrained(checkpoint, device=device)
    clicked = None if environment is None else read_environment(environment)
    perceiver.click_on(clicked, head, max_clicks=max_clicks, candidates=candidates)
    dataset = read_split(data, split, max_samples)
    report = run(
        *(perceiver.model, dataset, output),
        protocol=protocol,
        head=head,
        batch_size=batch_size,
        metric=metric,
        refiner=sharpen,
        start=start,
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
    output: Path,
    query: list[str] | None = None,
    task: Literal["segment", "depth"] = "segment",
    head: str | None = None,
    protocol: str | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    refiner: Path | None = None,
    environment: Path | None = None,
    max_clicks: int | None = None,
    candidates: int | None = None,
    label_studio: str | None = None,
    points: list[str] | str | None = None,
    grid: str | None = None,
    camera: str | None = None,
    fov: float | None = None,
    distance: Literal["planar", "ray"] | None = None,
    max_pixels: int | None = None,
    mask_head: str | None = None,
) -> None:
    """Answer queries about an image or a folder of images: masks, or with task depth metres as maps, clouds and sizes.

    Args:
        checkpoint: run folder.
        image: file or folder; pixels as stored, so turn photographs with an EXIF orientation first (mogrify -auto-orient).
        output: folder to write, other than that of the images.
        query: expression, such as "the red cube"; repeat --query for more. With task depth: objects to measure.
        task: segment writes overlays, mask PNGs and one COCO JSON; depth writes pictures, 16-bit PNGs, npz, PLY, HTML and JSON.
        head: name of the head; the first one (that fits the task) by default.
        protocol: how the head answers; its first way by default.
        batch_size: images at once, 8 by default; task depth takes one after the other.
        device: cpu, cuda, ...; a GPU where there is one by default.
        refiner: config of what sharpens the masks (configs/segmenters/*.yaml).
        environment: config of what a click policy clicks on, other than in its training (configs/environments/*.yaml).
        max_clicks: of an episode of a click policy; as in its training by default.
        candidates: answers that a click policy tries per mask with protocol search.
        label_studio: also write pre-annotations for Label Studio, which finds the images here, such as /data/local-files/?d=.
        points: pixels to measure, such as "120,80;40,60" (x,y).
        grid: rows and columns of a depth map; 48x64 by default where neither points nor queries are given.
        camera: fx,fy,cx,cy in pixels, or a JSON file with them, or with cameras by file name; else EXIF, else an assumption.
        fov: field of view in degrees over the longer side, to assume where the camera is not known.
        distance: what metres are measured along, for heads that do not say.
        max_pixels: of the map and cloud interpolated from the answers; 1000000 by default.
        mask_head: name of the head whose masks are measured; the first one that does not measure depth by default.
    """
    depth = {"points": points, "grid": grid, "camera": camera, "fov": fov, "distance": distance}
    depth |= {"max_pixels": max_pixels}
    clicks = {"environment": environment, "max_clicks": max_clicks, "candidates": candidates}
    masks = {"refiner": refiner, "mask_head": mask_head} | clicks
    heads = {"head": head, "protocol": protocol}
    files = {"batch_size": batch_size, "label_studio": label_studio}
    _predict(checkpoint, image, output, query, task, device, depth, masks, heads, files)


Options = dict[str, Any]
"""Values by the name of their option; None where it is not given."""


def _predict(
    checkpoint: Path,
    image: Path,
    output: Path,
    query: list[str] | None,
    task: str,
    device: str | None,
    *groups: Options,
) -> None:
    """`predict`: everything that can be refused is before the model is loaded; images that cannot be read are left out."""
    from mmseg_llm.configuration import read_environment, read_refiner
    from mmseg_llm.geometry import load_image
    from mmseg_llm.inference.depth_outputs import ENDINGS, write_depths
    from mmseg_llm.inference.outputs import find_faults, find_images, prepare_folder, refuse_faults
    from mmseg_llm.inference.perceiver import Perceiver

    depth, masks, heads, files = groups
    request = _depth_request(task, query, *groups)
    images = find_images(image)
    # masks of a folder become one file at the end, so each image is decoded before; depths are written one by one
    faults = find_faults(images, load_image if request is None else request.camera_of)
    if len(faults) == len(images):
        refuse_faults(faults, len(images))
    inputs = [Path(depth["camera"])] if depth["camera"] else []
    prepare_folder(output, images, inputs, () if request is None else ENDINGS)
    for path, fault in faults.items():
        print(f"{path.name}: left out: {fault}")
    refiner, environment = masks["refiner"], masks["environment"]
    sharpen = None if refiner is None else read_refiner(refiner)
    perceiver = Perceiver.from_pretrained(checkpoint, device=device, refiner=sharpen)
    clicked = None if environment is None else read_environment(environment)
    clicking = {name: masks[name] for name in ("max_clicks", "candidates")}
    perceiver.click_on(clicked, heads["head"] if request is None else masks["mask_head"], **clicking)
    if request is None:
        lines = _write_masks(
            perceiver, [path for path in images if path not in faults], output, query or (), heads, files
        )
    else:
        lines = write_depths(perceiver, images, output, request, faults)
    for line in lines:
        print(line)
    print(f"written: {output}")
    refuse_faults(faults, len(images))


def _depth_request(
    task: str, query: list[str] | None, depth: Options, masks: Options, heads: Options, files: Options
) -> DepthRequest | None:
    """What task depth is asked for, None for task segment; options that a task would ignore are refused."""
    from mmseg_llm.inference.depth_options import read_request
    from mmseg_llm.inference.depth_queries import Asking

    for text in query or ():
        if not text.strip(" ."):
            raise ValueError(f"query {text!r} is empty; give an expression such as 'the red cube'")
    if task != "depth":
        if given := _given(depth | {"mask_head": masks["mask_head"]}):
            raise ValueError(f"{given} needs --task depth")
        if not query:
            raise ValueError("nothing to predict; give --query 'the red cube', or --task depth")
        return None
    if given := _given(files):
        raise ValueError(f"{given} is for masks; leave it out of --task depth")
    if not query and (given := _given(masks)):
        raise ValueError(f"{given} is about the masks of objects; give --query 'the red cube' with it")
    asking = Asking(heads["head"], heads["protocol"], depth["distance"])
    options = {name: value for name, value in depth.items() if name != "distance"}
    return read_request(query, **options, asking=asking, mask_head=masks["mask_head"])


def _given(options: Options) -> str:
    """The options that are given, as they are written."""
    return ", ".join(f"--{name}" for name, value in options.items() if value is not None)


def _write_masks(
    perceiver: Perceiver, images: list[Path], output: Path, query: Sequence[str], heads: Options, files: Options
) -> Iterator[str]:
    """Task segment: answer and write image after image; yields what there is to say about each."""
    from mmseg_llm.inference.outputs import write_predictions

    batch_size = 8 if files["batch_size"] is None else files["batch_size"]
    answers = perceiver.predict_many(((path, query) for path in images), batch_size=batch_size, **heads)
    written = write_predictions(answers, images, output, files["label_studio"])
    for path, predictions in zip(images, written, strict=True):
        for item in predictions:
            found = f"{item.mask.area if item.mask else 0} px" if item.exists else "no target"
            yield f"{path.name}: {item.query}: {found}, score {item.score:.3f}"


def bench(
    *,
    checkpoint: Path | None = None,
    images: int = 16,
    queries: int = 6,
    level: str | None = None,
    output: Path | None = None,
    threads: int = 0,
    backbone: str = "internvl-tiny",
    head: Literal["mask_decoder", "all_mask"] = "mask_decoder",
) -> None:
    """Time the parts and compare shared-prefix inference with one question at a time and with the references' own flows.

    Args:
        checkpoint: run folder; an untrained tiny model by default.
        images: synthetic images timed.
        queries: expressions per image.
        level: of the synthetic scenes; flat-96, or solid-128 for a depth head, by default.
        output: JSON file to write.
        threads: CPU threads; 0 takes all cores.
        backbone: tiny size of the untrained model.
        head: of the untrained model.
    """
    from mmseg_llm.bench import run_bench

    run_bench(checkpoint, images, queries, level, output, threads, backbone, head)


def doctor() -> None:
    """Print versions, hardware and which optional parts are missing."""
    from mmseg_llm.doctor import report

    print(report())
