"""The images that `predict` is given, and what it leaves behind.

It leaves overlays, masks, episodes of clicks, and files for annotation tools over all images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

from PIL import Image, UnidentifiedImageError

from mmseg_llm.inference.annotations import to_coco_file, to_label_studio, write_label_studio
from mmseg_llm.inference.episodes import filmstrip, save_animation
from mmseg_llm.inference.visualize import safe_stem, write_outputs
from mmseg_llm.structures import Prediction

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


def find_images(path: Path) -> list[Path]:
    """The image itself, or the images in a folder, sorted.

    Raises:
        ValueError: if there is none.
    """
    if not path.is_dir():
        return [path]
    files = sorted(item for item in path.iterdir() if item.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(f"folder {path} has no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return files


def prepare_folder(
    folder: Path, images: Sequence[Path], inputs: Sequence[Path] = (), endings: Sequence[str] = ()
) -> None:
    """Make the folder to write into, unless that would overwrite what was given.

    Args:
        folder: to make.
        images: that are given.
        inputs: other files that are given.
        endings: of the names of the files that may be written about each image.

    Raises:
        ValueError: if the folder is that of the images, cannot be made, or a file to be written is one that was given.
    """
    if any(folder.resolve() == image.resolve().parent for image in images):
        raise ValueError(
            f"output folder {folder} is the folder of the images, where files could be overwritten; name another, such as "
            f"{folder / 'predictions'}"
        )
    given = {path.resolve() for path in (*images, *inputs)}
    for stem in unique_stems(images):
        for ending in endings:
            target = folder / f"{safe_stem(stem)}{ending}"
            if target.resolve() in given:
                raise ValueError(
                    f"{target} would be overwritten, which is one of the inputs; name another output folder"
                )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output folder {folder} cannot be made ({error.strerror}); name another") from error


def find_faults(images: Iterable[Path], check: Callable[[Path], object]) -> dict[Path, str]:
    """What is wrong with images by their headers, which decodes none, and by a check; those with nothing wrong are not in it.

    Args:
        images: to check.
        check: of something else about each, which raises ValueError.
    """
    faults = {}
    for path in images:
        try:
            with Image.open(path):
                check(path)
        except FileNotFoundError:
            faults[path] = f"image {path} does not exist"
        except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
            faults[path] = f"image {path} cannot be decoded ({error}); replace or remove the file"
        except ValueError as error:
            faults[path] = str(error)
    return faults


def refuse_faults(faults: dict[Path, str], num_images: int) -> None:
    """Say at the end of a run, or before one without anything to do, what was left out.

    Raises:
        ValueError: if anything was.
    """
    if faults and num_images == 1:
        raise ValueError(next(iter(faults.values())))
    if faults:
        names = ", ".join(path.name for path in list(faults)[:3]) + (", ..." if len(faults) > 3 else "")
        raise ValueError(f"{len(faults)} of {num_images} images were left out ({names}); mend or remove them")


def write_predictions(
    answers: Iterable[list[Prediction]], files: Sequence[Path], folder: Path, label_studio: str | None = None
) -> Iterator[list[Prediction]]:
    """Write each image's predictions as they come and pass them on; files over all images are written at the end.

    These are `predictions.json` (COCO, with the clicks of click policies) and, on demand, `label_studio.json`. The episode of a
    click policy is drawn as a film strip (`..._clicks.jpg`) and an animation (`..._clicks.gif`).

    Args:
        answers: predictions per image, in the order of `files`.
        files: the images.
        folder: to write into.
        label_studio: address that Label Studio finds the images at, such as `https://host/images/` or `/data/local-files/?d=`;
            None writes no such file. File names are appended percent-encoded, as Label Studio itself does for either kind;
            the address stays as it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept: list[list[Prediction]] = []
    for stem, predictions in zip(unique_stems(files), answers, strict=True):
        masks = write_outputs(predictions, folder, stem)[1:]
        for prediction, mask in zip(predictions, masks, strict=True):
            if prediction.trajectory:
                name = mask.name.removesuffix("_mask.png")
                filmstrip(prediction).convert("RGB").save(folder / f"{name}_clicks.jpg", quality=92)
                save_animation(prediction, folder / f"{name}_clicks.gif")
        kept.append([_light(prediction) for prediction in predictions])
        yield predictions
    names = [path.name for path in files]
    to_coco_file(kept, names, folder / "predictions.json")
    if label_studio is not None:
        tasks = to_label_studio(kept, [label_studio + quote(name) for name in names])
        write_label_studio(tasks, folder / "label_studio.json")


def unique_stems(files: Iterable[Path]) -> list[str]:
    """Names of output files: without suffix where that tells the files apart, with it where several share a stem."""
    paths = list(files)
    stems = Counter(path.stem for path in paths)
    return [path.stem if stems[path.stem] == 1 else path.name.replace(".", "_") for path in paths]


def _light(prediction: Prediction) -> Prediction:
    """What the files at the end need of a prediction: no image, and masks without the pixels that drawing decoded."""
    mask = None if prediction.mask is None else replace(prediction.mask)
    steps = tuple(replace(step, mask=replace(step.mask)) for step in prediction.trajectory)
    return replace(prediction, image=None, mask_logits=None, mask=mask, trajectory=steps)
