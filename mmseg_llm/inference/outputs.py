"""What `predict` leaves behind: overlays, masks, episodes of clicks, and files for annotation tools over all images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

from mmseg_llm.inference.annotations import to_coco_file, to_label_studio, write_label_studio
from mmseg_llm.inference.episodes import filmstrip, save_animation
from mmseg_llm.inference.visualize import write_outputs
from mmseg_llm.structures import Prediction


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
