"""Predictions as pictures and files, and learning curves.

Text never covers image pixels: legends and captions are strips below the image.

Legend: H W pixels.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmseg_llm.geometry import load_image
from mmseg_llm.structures import Mask

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmseg_llm.structures import Prediction, Size

Color = tuple[int, int, int]

PALETTE: tuple[Color, ...] = (
    (230, 57, 53),
    (30, 136, 229),
    (67, 200, 70),
    (255, 179, 0),
    (171, 71, 218),
    (0, 200, 212),
    (244, 81, 180),
    (160, 210, 30),
    (255, 112, 30),
    (92, 92, 220),
)

_INK, _MUTED, _PAPER, _RULE = (28, 28, 30), (120, 120, 126), (255, 255, 255), (214, 214, 218)
_MIN_SIDE, _MAX_SIDE, _MIN_WIDTH = 320, 2560, 240
_PANEL, _GAP, _CAPTION_SIZE = 192, 4, 14
_OWN_PANEL = ("lr", "learning_rate", "norm", "per_second", "time", "memory", "epoch")


def draw_predictions(
    image: str | Path | Image.Image,
    predictions: Sequence[Prediction],
    *,
    alpha: float = 0.5,
    boxes: bool = False,
    statuses: Sequence[str] | None = None,
) -> Image.Image:
    """The image with a translucent, outlined mask per prediction, and a legend strip below it.

    Images with a short side below 320 px are enlarged by an integer factor, so that the legend stays readable.

    Args:
        image: path or image, of the size of the predictions.
        predictions: of this image; those with `exists` False are listed as 'no target' and draw nothing.
        alpha: opacity of the fill in [0, 1]; outlines are opaque.
        boxes: also draw the box of each prediction.
        statuses: what the legend says of each prediction, instead of its score.

    Raises:
        ValueError: if `alpha` is outside [0, 1] or a prediction has another size than the image.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; give an opacity between 0 and 1")
    picture = load_image(image)
    factor = _enlargement(picture.height, picture.width)
    size = (picture.height * factor, picture.width * factor)
    drawn = [(item, PALETTE[index % len(PALETTE)]) for index, item in enumerate(predictions)]
    for item, _ in drawn:
        _check_size(item.size, picture)
    masks = [(item.mask, color) for item, color in drawn if item.exists and item.mask is not None]
    overlay = _overlay(picture, masks, size, alpha)
    if boxes:
        pen = ImageDraw.Draw(overlay)
        for item, color in drawn:
            if item.exists and item.box is not None:
                x1, y1, x2, y2 = (round(edge * factor) for edge in item.box)
                corners = (x1, y1, max(x1, x2 - 1), max(y1, y2 - 1))  # Pillow includes the last pixel
                pen.rectangle(corners, outline=color, width=_line_width(size))
    said = [_status(item) for item in predictions] if statuses is None else statuses
    entries = [(_title(item), status, color, item.exists) for (item, color), status in zip(drawn, said, strict=True)]
    return _with_legend(overlay, entries)


def comparison_sheet(
    rows: Sequence[tuple[str | Path | Image.Image, Prediction, Mask | None]], columns: int = 4
) -> Image.Image:
    """A sheet of tiles `image | prediction | ground truth`, each with its query and IoU as caption.

    Args:
        rows: image, prediction and true mask (empty where nothing fits, None where unlabelled).
        columns: tiles side by side; fewer when there are fewer rows.

    Raises:
        ValueError: without rows or columns, or if a mask has another size than its image.
    """
    if not rows or columns < 1:
        raise ValueError(f"{len(rows)} rows in {columns} columns make no sheet; give at least one of each")
    tiles = [_tile(load_image(image), prediction, truth) for image, prediction, truth in rows]
    columns = min(columns, len(tiles))
    lines = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    gap = 4 * _GAP
    width = columns * (tiles[0].width + gap) + gap
    height = sum(max(tile.height for tile in line) + gap for line in lines) + gap
    sheet = Image.new("RGB", (width, height), _PAPER)
    top = gap
    for line in lines:
        for column, tile in enumerate(line):
            sheet.paste(tile, (gap + column * (tile.width + gap), top))
        top += max(tile.height for tile in line) + gap
    return sheet


def plot_curves(history: dict[str, list[tuple[int, float]]], path: str | Path) -> Path:
    """Write learning curves as PNG: one panel of losses, one of scores, one for each quantity with its own unit.

    Names start with `train/` (solid) or `val/` (dashed, marked); the rest of the name chooses the colour, so that
    both curves of a quantity share it. Long curves are drawn as a running mean over faint values.

    Args:
        history: `(step, value)` pairs by name.
        path: file to write; its folder is made.

    Raises:
        ValueError: if there is no point to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[str, list[str]] = {}
    for name in sorted((name for name, points in history.items() if points), key=_panel_order):
        panels.setdefault(_panel(name), []).append(name)
    if not panels:
        raise ValueError("the history holds no points; log at least one step before plotting")
    columns = min(len(panels), 2)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(6.4 * columns, 4.2 * lines), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for position, (title, names) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(lines, columns, position)
        _draw_panel(axes, title, {name: np.asarray(history[name], np.float64) for name in names})
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path


def write_outputs(predictions: Sequence[Prediction], folder: str | Path, stem: str) -> list[Path]:
    """Write `<stem>_overlay.jpg` and one `<stem>_<i>_mask.png` (0/255, original size) per prediction of one image.

    Predictions with `exists` False give an empty mask. Characters of `stem` that are unsafe in file names become `_`.

    Returns:
        The overlay's path, then the masks' in the order of the predictions.

    Raises:
        ValueError: without predictions, or if the first one carries no image.
    """
    if not predictions:
        raise ValueError(f"no predictions to write for '{stem}'; ask at least one query")
    image = predictions[0].image
    if image is None:
        raise ValueError(
            "the first prediction carries no image; set it with dataclasses.replace(prediction, image=...)"
        )
    overlay = draw_predictions(image, predictions)  # refuses wrong sizes before anything is written
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stem = safe_stem(stem)
    paths = [folder / f"{stem}_overlay.jpg"]
    overlay.save(paths[0], quality=92, subsampling=0)
    for index, prediction in enumerate(predictions):
        paths.append(folder / f"{stem}_{index}_mask.png")
        Image.fromarray(_answer(prediction).array.astype(np.uint8) * 255).save(paths[-1])
    return paths


def _answer(prediction: Prediction) -> Mask:
    """The mask a prediction stands for: empty when it says that nothing fits."""
    return prediction.mask if prediction.exists and prediction.mask is not None else Mask.empty(prediction.size)


def _status(prediction: Prediction) -> str:
    """The right-hand side of a legend line."""
    if prediction.measurement is not None:
        found = prediction.measurement
        return found.reason if found.value is None else f"{found.value:.2f} {found.unit}"
    return f"{prediction.score:.2f}" if prediction.exists else "no target"


def _title(prediction: Prediction) -> str:
    """The left-hand side of a legend line: what was asked, which of a question without words are its points."""
    points = () if prediction.measurement is None else prediction.measurement.points
    return prediction.query or " ".join(f"({x:g}, {y:g})" for x, y in points)


def safe_stem(stem: str) -> str:
    """A file name part: letters, digits and `.-_`, neither hidden nor empty, within the limit of file systems."""
    safe = re.sub(r"[^\w.-]+", "_", stem).strip("._")
    return safe.encode("utf-8", "ignore")[:200].decode("utf-8", "ignore") or "image"


def _check_size(size: Size, image: Image.Image) -> None:
    """Refuse masks of another image."""
    if tuple(size) != (image.height, image.width):
        raise ValueError(
            f"prediction or mask of size {tuple(size)} (H, W) does not fit an image of size "
            f"{(image.height, image.width)}; give the image it was made on"
        )


def _enlargement(height: int, width: int) -> int:
    """Integer factor that brings the short side to 320 px, unless the long side grows beyond 2560 px."""
    return max(1, min(-(-_MIN_SIDE // min(height, width)), _MAX_SIDE // max(height, width)))


def _line_width(size: Size) -> int:
    """Thickness of outlines on a picture of `(H, W)` pixels."""
    return max(2, round(min(size) / 240))


def _erode(mask: np.ndarray, steps: int) -> np.ndarray:
    """Binary erosion by a 3x3 cross, repeated; beyond the border is background."""
    for _ in range(steps):
        padded = np.pad(mask, 1)
        vertical = padded[:-2, 1:-1] & padded[2:, 1:-1]
        mask = mask & vertical & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask


def _overlay(image: Image.Image, masks: Sequence[tuple[Mask, Color]], size: Size, alpha: float) -> Image.Image:
    """The image resized to `size` `(H, W)` with filled, outlined masks; only mask pixels change."""
    height, width = size
    resized = image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)
    pixels = np.asarray(resized, np.float32).copy()  # (H, W, 3)
    outlines: list[tuple[np.ndarray, Color]] = []
    line = _line_width(size)
    for mask, color in masks:
        _check_size(mask.size, image)
        binary = Image.fromarray(mask.array.astype(np.uint8))
        inside = np.asarray(binary.resize((width, height), Image.Resampling.NEAREST)) > 0  # (H, W)
        pixels[inside] = (1 - alpha) * pixels[inside] + alpha * np.asarray(color, np.float32)
        core = _erode(inside, line)
        # the white line within the coloured one keeps a mask visible on an object of its own colour
        outlines += [(inside & ~core, color), (core & ~_erode(core, max(1, line // 2)), _PAPER)]
    for outline, color in outlines:  # after all fills, so that no fill dims an outline
        pixels[outline] = color
    return Image.fromarray(pixels.round().astype(np.uint8))


def _shorten(text: str, font: Any, width: float) -> str:
    """One line of at most `width` pixels; what does not fit becomes '...'."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    low, high = 0, len(text)
    while low < high:  # the longest beginning that fits with its dots
        middle = (low + high + 1) // 2
        if font.getlength(text[:middle].rstrip() + "...") <= width:
            low = middle
        else:
            high = middle - 1
    return text[:low].rstrip() + "..."


def _with_legend(picture: Image.Image, entries: Sequence[tuple[str, str, Color, bool]]) -> Image.Image:
    """The picture above one line per `(text, status, color, exists)`: swatch, text, status at the right."""
    if not entries:
        return picture
    width = max(picture.width, _MIN_WIDTH)
    font_size = max(15, round(width / 40))
    font = ImageFont.load_default(font_size)
    line, margin = round(font_size * 1.6), round(font_size * 0.6)
    sheet = Image.new("RGB", (width, picture.height + line * len(entries) + 2 * margin), _PAPER)
    sheet.paste(picture, (0, 0))
    pen = ImageDraw.Draw(sheet)
    for index, (text, status, color, exists) in enumerate(entries):
        middle = picture.height + margin + line * index + line // 2
        half = font_size // 2
        swatch = (margin, middle - half, margin + 2 * half, middle + half)
        pen.rectangle(swatch, fill=color if exists else None, outline=color, width=max(2, font_size // 8))
        left, right = 2 * margin + 2 * half, width - margin
        room = right - left - font.getlength(status) - margin
        pen.text((left, middle), _shorten(text, font, room), _INK if exists else _MUTED, font, anchor="lm")
        pen.text((right, middle), status, _MUTED, font, anchor="rm")
    return sheet


def _tile(image: Image.Image, prediction: Prediction, truth: Mask | None) -> Image.Image:
    """`image | prediction | ground truth` in equal panels above two lines of caption."""
    _check_size(prediction.size, image)
    ratio = _PANEL / max(image.size)
    size = (max(1, round(image.height * ratio)), max(1, round(image.width * ratio)))
    answer = _answer(prediction)
    overlays: list[Sequence[tuple[Mask, Color]]] = [(), [(answer, PALETTE[0])]]
    if truth is not None:
        overlays.append([(truth, PALETTE[1])])
    font = ImageFont.load_default(_CAPTION_SIZE)
    line = round(_CAPTION_SIZE * 1.4)
    width = 3 * _PANEL + 2 * _GAP
    tile = Image.new("RGB", (width, size[0] + 2 * line + 2 * _GAP), _PAPER)
    pen = ImageDraw.Draw(tile)
    for column in range(3):
        left = column * (_PANEL + _GAP) + (_PANEL - size[1]) // 2
        if column < len(overlays):
            tile.paste(_overlay(image, overlays[column], size, 0.5), (left, 0))
        else:
            pen.rectangle((left, 0, left + size[1] - 1, size[0] - 1), fill=_RULE)
    said = f"{'score' if prediction.exists else 'prediction:'} {_status(prediction)}"
    if truth is None:
        fact = "unlabelled"
    else:
        fact = f"IoU {answer.iou(truth):.2f}"
        said += ", truth: no target" if truth.area == 0 else ""
    top = size[0] + _GAP
    pen.text((0, top), _shorten(prediction.query, font, width - font.getlength(fact) - 12), _INK, font)
    pen.text((width, top), fact, _INK, font, anchor="ra")
    pen.text((0, top + line), _shorten(said, font, width), _MUTED, font)
    return tile


_LOSS_TERMS = {"ce", "focal", "dice", "bce"}


def _panel(name: str) -> str:
    """Title of the panel a curve belongs to."""
    bare = name.split("/", 1)[-1]
    if "loss" in bare or bare in _LOSS_TERMS:
        return "losses"
    parts = re.split(r"[/_\-.]", bare)
    is_own = any(word in parts or ("_" in word and word in bare) for word in _OWN_PANEL)
    return bare if is_own else "scores"


def _panel_order(name: str) -> tuple[int, str, str]:
    """Losses, then scores, then the rest; in a panel `train/` before `val/`."""
    panel = _panel(name)
    return ({"losses": 0, "scores": 1}.get(panel, 2), panel if panel not in {"losses", "scores"} else "", name)


def _draw_panel(axes: Any, title: str, curves: dict[str, np.ndarray]) -> None:
    """Draw `(N, 2)` arrays of steps and values by name, with labels, grid and legend."""
    bare_names = list(dict.fromkeys(name.split("/", 1)[-1] for name in curves))
    for name, points in curves.items():
        points = points[np.argsort(points[:, 0], kind="stable")]
        steps, values = points[:, 0], points[:, 1]
        color = [channel / 255 for channel in PALETTE[bare_names.index(name.split("/", 1)[-1]) % len(PALETTE)]]
        is_val = name.startswith("val/")
        style: dict[str, Any] = {"color": color, "linestyle": "--" if is_val else "-", "linewidth": 1.8}
        if len(points) <= 40:
            style.update(marker="s" if is_val else "o", markersize=4)
        if len(points) > 100:
            window = len(points) // 50
            axes.plot(steps, values, color=color, linewidth=0.7, alpha=0.3)
            kernel = np.full(window, 1 / window)
            steps, values = np.convolve(steps, kernel, "valid"), np.convolve(values, kernel, "valid")
        axes.plot(steps, values, label=name, **style)
    every = np.concatenate([points[:, 1] for points in curves.values()])
    every = every[np.isfinite(every)]
    if title == "losses" and every.size and every.min() > 0 and every.max() / every.min() > 50:
        axes.set_yscale("log")
    axes.set(title=title, xlabel="step", ylabel={"losses": "loss", "scores": "score"}.get(title, title))
    axes.grid(True, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
