"""What `predict` leaves behind: overlays, masks, and one COCO file over all images."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mmseg_llm.inference.visualize import write_outputs
from mmseg_llm.structures import Prediction


def write_predictions(
    answers: Iterable[list[Prediction]], files: Sequence[Path], folder: Path
) -> Iterator[list[Prediction]]:
    """Write each image's predictions as they come and pass them on; `predictions.json` (COCO) is written at the end.

    Args:
        answers: predictions per image, in the order of `files`.
        files: the images.
        folder: to write into.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, (path, predictions) in enumerate(zip(files, answers, strict=True), 1):
        height, width = predictions[0].size
        images.append({"id": image_id, "file_name": path.name, "height": height, "width": width})
        stem = path.stem if sum(other.stem == path.stem for other in files) == 1 else path.name.replace(".", "_")
        write_outputs(predictions, folder, stem)
        for prediction in predictions:
            entry = prediction.to_coco(image_id)
            annotations.append({"id": len(annotations) + 1, "iscrowd": 0, "exists": prediction.exists, **entry})
        yield predictions
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "referred"}]}
    temporary = folder / ".predictions.json"
    temporary.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    temporary.replace(folder / "predictions.json")
