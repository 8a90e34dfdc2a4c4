"""Pictures of predictions: which pixels change and which do not, sizes, files, curves."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageFont

from mmseg_llm.inference.visualize import (
    PALETTE,
    _erode,
    _panel,
    _shorten,
    comparison_sheet,
    draw_predictions,
    plot_curves,
    safe_stem,
    write_outputs,
)
from mmseg_llm.structures import Mask, Prediction


def photo(height=330, width=400, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def rectangle(height, width, top, left, bottom, right):
    array = np.zeros((height, width), bool)
    array[top:bottom, left:right] = True
    return array


def predict(array, query="the cup", **fields):
    mask = Mask.from_array(array)
    return Prediction(query=query, size=mask.size, mask=mask, box=mask.box, score=0.9, **fields)


def test_palette_is_distinct():
    distances = [np.abs(np.subtract(a, b)).sum() for i, a in enumerate(PALETTE) for b in PALETTE[:i]]
    assert len(PALETTE) >= 10
    assert min(distances) > 60


def test_mask_pixels_are_blended_and_outlined_and_no_others_change():
    image, inside = photo(), rectangle(330, 400, 50, 60, 200, 300)
    before = np.asarray(image).astype(float)
    after = np.asarray(draw_predictions(image, [predict(inside)], alpha=0.25)).astype(float)[:330, :400]
    assert np.array_equal(after[~inside], before[~inside])
    rim = _erode(inside, 2)
    core = _erode(rim, 1)
    assert np.abs(after[core] - (0.75 * before[core] + 0.25 * np.array(PALETTE[0]))).max() <= 0.5
    assert (after[inside & ~rim] == PALETTE[0]).all()
    assert (after[rim & ~core] == 255).all()


def test_legend_is_below_the_image_and_grows_with_the_queries():
    image, mask = photo(), rectangle(330, 400, 0, 0, 9, 9)
    one, three = (draw_predictions(image, [predict(mask)] * count) for count in (1, 3))
    assert one.mode == "RGB"
    assert one.width == three.width == 400
    assert 330 < one.height < three.height
    strip = np.asarray(three)[330:]
    for color in PALETTE[:3]:
        assert (strip == color).all(-1).any()


def test_no_target_draws_nothing_even_with_a_mask():
    image = photo()
    prediction = predict(rectangle(330, 400, 5, 5, 90, 90), exists=False)
    drawn = draw_predictions(image, [prediction], boxes=True)
    assert np.array_equal(np.asarray(drawn)[:330], np.asarray(image))
    assert drawn.height > 330
    assert np.array_equal(np.asarray(draw_predictions(image, [])), np.asarray(image))


def test_small_images_are_enlarged_by_an_integer_and_masks_stay_crisp():
    inside = rectangle(96, 120, 10, 20, 40, 50)
    image = Image.new("RGB", (120, 96), (0, 0, 0))
    drawn = np.asarray(draw_predictions(image, [predict(inside)]))
    assert drawn.shape[1] == 120 * 4
    changed = drawn[: 96 * 4].any(-1)
    assert np.array_equal(changed, inside.repeat(4, 0).repeat(4, 1))


def test_extreme_shapes_stay_bounded():
    drawn = draw_predictions(Image.new("RGB", (2, 2000)), [predict(np.ones((2000, 2), bool))])
    assert drawn.width == 240
    assert drawn.height < 2100


def test_box_is_drawn_on_request_within_its_exclusive_edges():
    image = Image.new("RGB", (400, 330))
    prediction = Prediction(query="x", size=(330, 400), box=(10.0, 20.0, 400.0, 330.0))
    assert not np.asarray(draw_predictions(image, [prediction]))[:330].any()
    y, x = np.asarray(draw_predictions(image, [prediction], boxes=True))[:330].any(-1).nonzero()
    assert (x.min(), y.min(), x.max(), y.max()) == (10, 20, 399, 329)


def test_refuses_other_sizes_and_bad_alpha():
    with pytest.raises(ValueError, match="does not fit"):
        draw_predictions(photo(), [predict(np.ones((4, 4), bool))])
    with pytest.raises(ValueError, match="alpha is 2"):
        draw_predictions(photo(), [], alpha=2)


def test_shorten_fits_the_width():
    font = ImageFont.load_default(15)
    assert _shorten("a  cup\n", font, 200) == "a cup"
    short = _shorten("the cup that stands behind the other cups " * 9, font, 200)
    assert short.endswith("...")
    assert 150 < font.getlength(short) <= 200


def test_erosion_against_a_small_case():
    assert _erode(np.ones((5, 5), bool), 1).sum() == 9
    assert _erode(np.ones((5, 5), bool), 2).sum() == 1
    assert not _erode(np.ones((2, 2), bool), 1).any()


def test_comparison_sheet_wraps_and_shows_the_truth():
    inside = rectangle(40, 40, 5, 5, 30, 30)
    row = (Image.new("RGB", (40, 40)), predict(inside), Mask.from_array(inside))
    one, two, five = (comparison_sheet([row] * count, columns=2) for count in (1, 2, 5))
    assert one.width < two.width == five.width
    assert one.height == two.height < five.height
    for color in PALETTE[:2]:
        assert (np.asarray(one) == color).all(-1).any()
    unlabelled = comparison_sheet([(row[0], row[1], None)])
    assert not (np.asarray(unlabelled) == PALETTE[1]).all(-1).any()
    with pytest.raises(ValueError, match="at least one"):
        comparison_sheet([])
    with pytest.raises(ValueError, match="does not fit"):
        comparison_sheet([(row[0], row[1], Mask.empty((3, 3)))])


def test_plot_curves_writes_a_png(tmp_path):
    history = {
        "train/loss": [(step, 900.0 / (1 + step)) for step in range(400)],
        "val/loss": [(100, 3.0), (200, float("nan")), (300, 2.0)],
        "val/giou": [(100, 0.2), (300, 0.6)],
        "train/lr": [(0, 1e-4), (300, 1e-5)],
        "val/nothing": [],
    }
    path = plot_curves(history, tmp_path / "new" / "curves.png")
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width > 1200
    with pytest.raises(ValueError, match="no points"):
        plot_curves({"val/nothing": []}, tmp_path / "no.png")


@pytest.mark.parametrize(
    ("name", "panel"),
    [
        ("train/loss_mask", "losses"),
        ("val/refcoco/ciou", "scores"),
        ("train/lr", "lr"),
        ("train/grad_norm", "grad_norm"),
        ("val/color_accuracy", "scores"),
        ("train/tokens_per_second", "tokens_per_second"),
    ],
)
def test_panel_of_a_curve(name, panel):
    assert _panel(name) == panel


def test_write_outputs(tmp_path):
    image, inside = photo(), rectangle(330, 400, 5, 5, 90, 90)
    predictions = [predict(inside, image=image), predict(inside, exists=False)]
    paths = write_outputs(predictions, tmp_path / "out", "../a b/c")
    assert [path.name for path in paths] == ["a_b_c_overlay.jpg", "a_b_c_0_mask.png", "a_b_c_1_mask.png"]
    assert all(path.parent == tmp_path / "out" for path in paths)
    with Image.open(paths[1]) as mask, Image.open(paths[2]) as empty:
        assert np.array_equal(np.asarray(mask), inside * 255)
        assert not np.asarray(empty).any()
    with Image.open(paths[0]) as overlay:
        assert overlay.size == draw_predictions(image, predictions).size


def test_write_outputs_refuses_what_it_cannot_draw(tmp_path):
    with pytest.raises(ValueError, match="no predictions"):
        write_outputs([], tmp_path / "out", "a")
    with pytest.raises(ValueError, match="carries no image"):
        write_outputs([predict(np.ones((4, 4), bool))], tmp_path / "out", "a")
    assert not (tmp_path / "out").exists()


def testsafe_stem():
    assert safe_stem("COCO_train2014_000000000025") == "COCO_train2014_000000000025"
    assert safe_stem("..") == "image"
    assert safe_stem("a/b\\c:d*") == "a_b_c_d"
    assert len(safe_stem("x" * 900)) == 200


def test_drawing_needs_neither_torch_nor_matplotlib():
    code = (
        "import sys; from mmseg_llm.inference import draw_predictions; "
        "assert not {'torch', 'matplotlib'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_legends_of_measurements_name_their_points_and_reasons():
    from mmseg_llm.inference.visualize import _status, _title
    from mmseg_llm.structures import Measurement

    found = Prediction("", (20, 30), measurement=Measurement(3.456, points=((4.0, 5.5),)))
    speed = Prediction("how fast?", (20, 30), measurement=Measurement(2.0, points=((1.0, 2.0),), unit="m/s"))
    none = Prediction("", (20, 30), exists=False, measurement=Measurement(None, "no_number", ((1.0, 2.0), (3.0, 4.0))))
    assert [_title(item) for item in (found, speed, none)] == ["(4, 5.5)", "how fast?", "(1, 2) (3, 4)"]
    assert [_status(item) for item in (found, speed, none)] == ["3.46 m", "2.00 m/s", "no_number"]
