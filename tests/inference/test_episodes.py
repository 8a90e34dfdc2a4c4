"""Episodes as pictures: what is where, how many panels and frames, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mmseg_llm.inference.episodes import (
    _SHADE,
    _TRACK,
    FRAME_MS,
    LAST_FRAME_MS,
    MASK,
    NEGATIVE,
    POSITIVE,
    TARGET,
    _font,
    _said,
    _wrap,
    animate,
    filmstrip,
    save_animation,
)
from mmseg_llm.structures import Click, Mask, PolicyStep, Prediction

SIZE = (90, 120)
GREY = (97, 97, 97)


def mask(top, left, bottom, right, size=SIZE):
    array = np.zeros(size, bool)
    array[top:bottom, left:right] = True
    return Mask.from_array(array)


def episode(clicks, masks=None, size=SIZE, **fields):
    """On a plain grey image; masks are empty by default."""
    masks = masks or [Mask.empty(size)] * (len(clicks) + 1)
    steps = [
        PolicyStep(click, shown, f"Current IOU: {10 * number}, Finish", number / 10, "ok")
        for number, (click, shown) in enumerate(zip([None, *clicks], masks, strict=True))
    ]
    image = Image.new("RGB", size[::-1], GREY)
    prediction = Prediction("the cup", size, mask=masks[-1], trajectory=tuple(steps), stop="max_clicks", image=image)
    return replace(prediction, **fields)


def box(found):
    """`(left, top, right, bottom)` of the pixels of a bool array, ends exclusive."""
    rows, cols = np.flatnonzero(found.any(1)), np.flatnonzero(found.any(0))
    return cols[0], rows[0], cols[-1] + 1, rows[-1] + 1


def where(picture, color):
    return (np.asarray(picture) == color).all(-1)


def runs(line):
    """Number of stretches that are set."""
    return int(line[0]) + int((line[1:] & ~line[:-1]).sum())


def bar(frame, color):
    """Share of the lowest bar of some colour in a frame that is filled."""
    below = box(where(frame, GREY))[3] + 20
    filled, track = where(frame, color)[below:], where(frame, _TRACK)[below:]
    lines = np.flatnonzero(filled.sum(1) & (track.sum(1) > 100))
    return filled[lines[-1]].sum() / (filled[lines[-1]] | track[lines[-1]]).sum()


@pytest.mark.parametrize(
    ("count", "columns", "lines", "across"),
    [(4, None, 2, 3), (0, None, 1, 1), (4, 2, 3, 2), (1, 9, 1, 2)],
)
def test_one_panel_per_mask_in_lines_of_equal_size(count, columns, lines, across):
    strip = filmstrip(episode([Click(5, 6, True)] * count), columns=columns)
    shade = where(strip, _SHADE)
    left, top, *_ = box(shade)
    assert runs(shade[:, left]) == lines
    assert runs(shade[top]) == across
    corner = [where(strip, GREY)[:, left:].any(0), where(strip, GREY).any(1)]
    assert [runs(line) for line in corner] == [across, lines]


@pytest.mark.parametrize("size", [(90, 120), (1000, 1500), (16, 16), (300, 20)])
@pytest.mark.parametrize("place", [(0, 0), (1, 1), (0.3, 0.9)])
def test_clicks_are_drawn_at_their_pixel_and_never_cut(size, place):
    row, col = (min(int(share * side), side - 1) for share, side in zip(place, size))
    frame = animate(episode([Click(row, col, True)], size=size))[1]
    left, top, right, bottom = box(where(frame, GREY))
    if place in {(0, 0), (1, 1)}:  # the disk hides a corner of the picture
        start = animate(episode([Click(row, col, True)], size=size))[0]
        left, top, right, bottom = box(where(start, GREY))
    disk = where(frame, POSITIVE)
    disk[bottom + 30 :] = False  # the legend
    x1, y1, x2, y2 = box(disk)
    assert x2 - x1 == pytest.approx(y2 - y1, abs=1)
    assert x2 - x1 >= 18
    expected = left + (col + 0.5) * (right - left) / size[1], top + (row + 0.5) * (bottom - top) / size[0]
    assert ((x1 + x2) / 2, (y1 + y2) / 2) == pytest.approx(expected, abs=1)


def test_clicks_add_up_and_have_two_colours():
    clicks = [Click(20, 20, True), Click(60, 90, False), Click(20, 100, True)]
    frames = animate(episode(clicks))
    blue, orange = ([int(where(frame, color).sum()) for frame in frames] for color in (POSITIVE, NEGATIVE))
    assert blue[0] < blue[1] == blue[2] < blue[3]
    assert orange[0] == orange[1] < orange[2] == orange[3]
    assert blue[0] > 0 and orange[0] > 0  # the legend


def test_mask_is_blended_outlined_and_the_rest_of_the_picture_untouched():
    shown = mask(30, 30, 60, 90)
    start, after = (np.asarray(frame) for frame in animate(episode([Click(1, 1, True)], [Mask.empty(SIZE), shown])))
    left, top, right, bottom = box((start == GREY).all(-1))
    scale = (right - left) / SIZE[1]
    inside = after[round(top + 45 * scale), round(left + 60 * scale)]
    assert inside == pytest.approx(0.55 * np.array(GREY) + 0.45 * np.array(MASK), abs=1)
    assert after[round(top + 75 * scale), round(left + 60 * scale)].tolist() == list(GREY)
    picture = (after == MASK).all(-1)[top:bottom, left:right]
    x1, y1, x2, y2 = np.array(box(picture)) / scale
    assert (x1, y1, x2, y2) == pytest.approx((30, 30, 90, 60), abs=0.6)


def test_target_adds_its_outline_and_the_true_iou():
    prediction = episode([Click(1, 1, True)], [Mask.empty(SIZE), mask(30, 30, 60, 60)])
    without, with_ = filmstrip(prediction), filmstrip(prediction, mask(30, 30, 60, 90))
    assert not where(without, TARGET).any() and where(with_, TARGET).any()
    assert with_.height > without.height
    frame = animate(prediction, mask(30, 30, 60, 90))[1]
    assert bar(frame, MASK) == pytest.approx(0.5, abs=0.01)


def test_the_answer_is_marked_where_it_is():
    masks = [Mask.empty(SIZE), mask(10, 10, 40, 40), mask(10, 10, 50, 50)]
    last = episode([Click(1, 1, True), Click(2, 90, True)], masks)
    middle = replace(last, mask=masks[1])
    none = replace(last, mask=mask(0, 0, 1, 1))
    marks = [[where(frame, MASK).sum() for frame in animate(made)] for made in (last, middle, none)]
    assert np.array_equal(np.argwhere(np.array(marks[0]) > marks[2]), [[2]])
    assert np.array_equal(np.argwhere(np.array(marks[1]) > marks[2]), [[1]])
    repeated = episode([Click(1, 1, True), Click(2, 90, True)], [masks[0], masks[1], masks[1]])
    assert np.diff([where(frame, MASK).sum() for frame in animate(repeated)])[1] > 0  # the last of equal masks
    rejected = [where(frame, MASK).sum() for frame in animate(replace(last, exists=False))]
    assert np.array_equal(np.argwhere(np.array(rejected) > marks[2]), [[0]])


def test_no_text_widens_or_leaves_the_picture():
    short = episode([Click(5, 5, True)])
    words = "W" * 300 + " and " + "very " * 80
    step = replace(short.trajectory[1], text=words, status="malformed")
    wordy = replace(short, query=words, stop=words, trajectory=(short.trajectory[0], step))
    plain, full = filmstrip(short), filmstrip(wordy)
    assert plain.width == full.width and full.height > plain.height
    edge = np.asarray(full)[:, -10:]
    assert (edge == 255).all()
    frames = animate(wordy)
    assert len({frame.size for frame in frames}) == 1


def test_bars_only_where_something_was_estimated():
    known = episode([Click(5, 5, True)])
    steps = tuple(replace(step, estimate=None) for step in known.trajectory)
    assert filmstrip(replace(known, trajectory=steps)).height < filmstrip(known).height
    half = (known.trajectory[0], replace(known.trajectory[1], estimate=None))
    assert filmstrip(replace(known, trajectory=half)).height == filmstrip(known).height


def test_small_images_are_enlarged_and_large_ones_reduced():
    widths = [animate(episode([], size=size))[0].width for size in ((12, 16), (90, 120), (1500, 2000))]
    assert len(set(widths)) == 1
    assert 640 < widths[0] < 800


def test_animation_file(tmp_path):
    photo = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8).repeat(10, 0).repeat(10, 1)
    masks = [Mask.empty(SIZE), mask(10, 10, 40, 40), mask(10, 10, 40, 40)]
    made = episode([Click(20, 20, True), Click(70, 80, False)], masks, image=Image.fromarray(photo))
    path = save_animation(made, tmp_path / "new" / "clicks.gif", mask(12, 12, 42, 42))
    frames = animate(made, mask(12, 12, 42, 42))
    with Image.open(path) as file:
        assert (file.format, file.n_frames, file.info["loop"]) == ("GIF", 3, 0)
        durations = []
        for index, frame in enumerate(frames):
            file.seek(index)
            durations.append(file.info["duration"])
            shown, exact = np.asarray(file.convert("RGB")).astype(int), np.asarray(frame).astype(int)
            assert shown.shape == exact.shape
            for color in ((255, 255, 255), POSITIVE, NEGATIVE, _SHADE):
                assert (shown[(exact == color).all(-1)] == color).all()
            assert np.abs(shown - exact).mean() < 3
    assert durations == [FRAME_MS, FRAME_MS, LAST_FRAME_MS]
    assert [found.name for found in path.parent.iterdir()] == ["clicks.gif"]


def test_animation_of_few_colours_and_one_mask(tmp_path):
    path = save_animation(episode([], size=(4, 4)), tmp_path / "one.gif")
    with Image.open(path) as file:
        assert file.n_frames == 1
        assert file.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_predictions_save_animations_and_still_masks(tmp_path):
    made = episode([Click(20, 20, True)], [Mask.empty(SIZE), mask(10, 10, 40, 40)])
    with Image.open(made.save(tmp_path / "a.gif")) as file:
        assert file.n_frames == 2
    with Image.open(made.save(tmp_path / "a.png")) as file:
        assert np.array_equal(np.asarray(file) > 0, made.mask.array)
    with pytest.raises(ValueError, match=r"\.gif"):
        made.save(tmp_path / "a.bmp")


def test_refusals_say_what_to_change(tmp_path):
    made = episode([Click(5, 5, True)])
    for call in (filmstrip, animate):
        with pytest.raises(ValueError, match="the prediction for 'the cup' has no trajectory"):
            call(replace(made, trajectory=()))
        with pytest.raises(ValueError, match="carries no image"):
            call(replace(made, image=None))
        with pytest.raises(ValueError, match=r"\(5, 5\) .* does not belong"):
            call(made, Mask.empty((5, 5)))
    with pytest.raises(ValueError, match="does not fit an image of size"):
        animate(replace(made, image=Image.new("RGB", (7, 7))))
    with pytest.raises(ValueError, match="columns is 0"):
        filmstrip(made, columns=0)
    with pytest.raises(ValueError, match="no trajectory"):
        replace(made, trajectory=()).save(tmp_path / "x.gif")
    assert not list(tmp_path.iterdir())


def test_words_of_the_policy():
    step = PolicyStep(None, Mask.empty(SIZE))
    assert _said(step) == ("not asked", False)
    assert _said(replace(step, status="no_action")) == ("said nothing", False)
    assert _said(replace(step, text=" Current\nIOU: 7", status="ok")) == ("Current IOU: 7", True)
    assert _said(replace(step, text="click!", status="out_of_range")) == ("out of range: click!", True)


def test_wrapped_lines_fit():
    font = _font(13)
    for text in ("one", "one two three four five six seven", "x" * 200, "a " + "x" * 200 + " b c"):
        lines = _wrap(text, font, 120, 2)
        assert 1 <= len(lines) <= 2
        assert all(font.getlength(line) <= 120 for line in lines)
    assert _wrap("one two", font, 500, 2) == ["one two"]


def test_letters_beyond_ascii_have_glyphs():
    font = _font(20)
    unknown = font.getmask("\uffff").getbbox(), bytes(font.getmask("\uffff"))
    for letter in "äßéжλ·":
        assert (font.getmask(letter).getbbox(), bytes(font.getmask(letter))) != unknown
