"""What `predict` leaves behind: names, addresses, and little memory until the files over all images are written."""

from __future__ import annotations

import json
from itertools import chain
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pytest
from PIL import Image

from mmseg_llm.inference import outputs
from mmseg_llm.inference.outputs import write_predictions
from mmseg_llm.structures import Click, Mask, PolicyStep, Prediction

SIZE = (24, 32)


def answer(query="the cup"):
    array = np.zeros(SIZE, bool)
    array[4:12, 5:20] = True
    steps = (PolicyStep(None, Mask.empty(SIZE)), PolicyStep(Click(6, 9, True), Mask.from_array(array)))
    shown = Mask.from_array(array)
    image = Image.new("RGB", SIZE[::-1], (90, 120, 30))
    return Prediction(query, SIZE, mask=shown, box=shown.box, score=0.5, trajectory=steps, image=image)


def test_pixels_are_not_kept_until_the_end(tmp_path, monkeypatch):
    """Drawing decodes every mask of an image; with thousands of images only the run lengths may stay."""
    seen, write = [], outputs.to_coco_file
    monkeypatch.setattr(outputs, "to_coco_file", lambda kept, *rest: (seen.extend(chain(*kept)), write(kept, *rest)))
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    list(write_predictions(([answer(), answer("b")] for _ in files), files, tmp_path / "out", "/images/"))
    masks = [mask for item in seen for mask in (item.mask, *(step.mask for step in item.trajectory))]
    assert len(masks) == 2 * 2 * 3 and not any("array" in vars(mask) for mask in masks)
    assert all(item.image is None for item in seen)
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())["annotations"]) == 4


def test_files_of_one_stem_are_told_apart(tmp_path):
    files = [tmp_path / name for name in ("a.png", "a.jpg", "b.jpg")]
    list(write_predictions(([answer()] for _ in files), files, tmp_path / "out"))
    names = {path.name.removesuffix("_overlay.jpg") for path in (tmp_path / "out").glob("*_overlay.jpg")}
    assert names == {"a_png", "a_jpg", "b"} and not (tmp_path / "out" / "label_studio.json").exists()


def test_stems_are_counted_once(tmp_path):
    """Not again for every image: of ten thousand files that would be a hundred million comparisons."""

    class Files(list):
        walks = 0

        def __iter__(self):
            Files.walks += 1
            return super().__iter__()

    files = Files(tmp_path / f"{i}.png" for i in range(6))
    list(write_predictions(([answer()] for _ in range(6)), files, tmp_path / "out"))
    assert Files.walks <= 3


@pytest.mark.parametrize("name", ["a b.png", "50%.png", "a#1?.png", "a+b&c=d.png", "\u00fc.png", "plain-1_2.png"])
@pytest.mark.parametrize("address", ["https://host/images/", "/data/local-files/?d="])
def test_addresses_lead_to_the_file(tmp_path, name, address):
    list(write_predictions([[answer()]], [tmp_path / name], tmp_path / "out", address))
    (task,) = json.loads((tmp_path / "out" / "label_studio.json").read_text())
    url = urlsplit(task["data"]["image"])
    assert task["data"]["image"].startswith(address) and not url.fragment
    assert (parse_qs(url.query)["d"][0] if "?" in address else unquote(url.path.removeprefix("/images/"))) == name
