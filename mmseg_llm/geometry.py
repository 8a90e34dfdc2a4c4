"""Images, canvases and masks: how pixels move between the original image and what a model sees.

Legend: H W pixels of the original, h w pixels of a canvas, Q queries.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mmseg_llm.structures import Canvas, Mask

if TYPE_CHECKING:
    import torch

    from mmseg_llm.structures import Box


def load_image(image: str | Path | Image.Image) -> Image.Image:
    """Open as RGB, fully decoded, without applying EXIF rotation (annotations refer to the stored pixels).

    Raises:
        ValueError: if the file is missing or cannot be decoded, or `image` is neither a path nor an image.
    """
    if isinstance(image, Image.Image):
        return _to_rgb(image)
    if not isinstance(image, str | Path):
        raise ValueError(
            f"an image must be a path or a PIL image, got {type(image).__name__}; wrap an array with PIL.Image.fromarray"
        )
    path = Path(image)
    try:
        with Image.open(path) as handle:
            return _to_rgb(handle)
    except FileNotFoundError as error:
        raise ValueError(f"image {path} does not exist; check the image folder of the dataset") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"image {path} is too large to be opened safely ({error}); scale it down first") from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"image {path} cannot be decoded ({error}); replace or remove the file") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB of 8 bits; greyscale of 16 bits, which Pillow would clip to white, is scaled."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    return image.convert("RGB")


def upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF rotation of a photograph that comes straight from a camera (not of annotated data)."""
    return ImageOps.exif_transpose(image)


def stretch(image: Image.Image, size: tuple[int, int]) -> Canvas:
    """Resize to exactly `size` `(h, w)`, bicubic antialiased, aspect ratio not kept (MLLMSeg section 1.1)."""
    height, width = size
    resized = image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)
    return Canvas(
        image=resized,
        original_size=(image.height, image.width),
        scale=(width / image.width, height / image.height),
    )


def letterbox(image: Image.Image, size: tuple[int, int], fill: tuple[int, int, int] = (0, 0, 0)) -> Canvas:
    """Resize with the aspect ratio kept and pad right and bottom to `size` `(h, w)`."""
    height, width = size
    ratio = min(width / image.width, height / image.height)
    inner = (max(1, round(image.width * ratio)), max(1, round(image.height * ratio)))
    canvas = Image.new("RGB", (width, height), fill)
    canvas.paste(image.resize(inner, Image.Resampling.BICUBIC), (0, 0))
    return Canvas(
        image=canvas,
        original_size=(image.height, image.width),
        scale=(inner[0] / image.width, inner[1] / image.height),
    )


def crop(canvas: Canvas, left: int, top: int, size: tuple[int, int]) -> Canvas:
    """Cut the `(h, w)` window at `(left, top)` out of a canvas; the mapping to the original follows."""
    height, width = size
    return Canvas(
        image=canvas.image.crop((left, top, left + width, top + height)),
        original_size=canvas.original_size,
        scale=canvas.scale,
        offset=(canvas.offset[0] - left, canvas.offset[1] - top),
    )


def frame(canvas: Canvas, size: tuple[int, int]) -> Canvas:
    """The upper left `(h, w)` of a canvas; towers whose input is no whole number of patches do not see the rest."""
    return canvas if canvas.size == tuple(size) else crop(canvas, 0, 0, size)


def mask_to_canvas(mask: Mask, canvas: Canvas) -> np.ndarray:
    """The mask as bool `(h, w)` seen through the canvas: each canvas pixel takes the original pixel under its centre.

    Raises:
        ValueError: if the mask is not of the original image's size.
    """
    if mask.size != canvas.original_size:
        raise ValueError(f"mask of size {mask.size} does not fit an image of size {canvas.original_size}")
    if canvas.size == canvas.original_size and canvas.scale == (1.0, 1.0) and canvas.offset == (0.0, 0.0):
        return mask.array
    height, width = canvas.size
    columns, rows = (np.arange(n, dtype=np.float64) for n in (width, height))
    x = np.floor((columns + 0.5 - canvas.offset[0]) / canvas.scale[0]).astype(np.int64)
    y = np.floor((rows + 0.5 - canvas.offset[1]) / canvas.scale[1]).astype(np.int64)
    inside_x = (x >= 0) & (x < mask.size[1])
    inside_y = (y >= 0) & (y < mask.size[0])
    seen = mask.array[y.clip(0, mask.size[0] - 1)[:, None], x.clip(0, mask.size[1] - 1)[None, :]]
    return seen & inside_y[:, None] & inside_x[None, :]


def covers(canvas: Canvas) -> bool:
    """Whether a canvas shows the whole original image and nothing else."""
    height, width = canvas.original_size
    shown = (canvas.scale[0] * width, canvas.scale[1] * height)
    return canvas.offset == (0.0, 0.0) and np.allclose(shown, (canvas.size[1], canvas.size[0]))


def canvas_to_original(values: torch.Tensor, canvas: Canvas) -> torch.Tensor:
    """Bring canvas maps back to the original image: bilinear, pixel centres aligned, outside of the canvas the border.

    Args:
        values: `(Q, h', w')` float logits or probabilities over the whole canvas, at any resolution.
        canvas: the canvas the maps were made on.

    Returns:
        `(Q, H, W)`.
    """
    import torch
    import torch.nn.functional as functional

    height, width = canvas.original_size
    ratio_y, ratio_x = values.shape[-2] / canvas.size[0], values.shape[-1] / canvas.size[1]
    if covers(canvas):  # a stretched canvas: plain resizing is the exact inverse
        resized = functional.interpolate(values[:, None], (height, width), mode="bilinear", align_corners=False)
        return resized[:, 0]  # (Q, H, W)
    corners = canvas.to_canvas(np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1))
    x = (corners[..., 0] + 0.5) * ratio_x * 2 / values.shape[-1] - 1
    y = (corners[..., 1] + 0.5) * ratio_y * 2 / values.shape[-2] - 1
    grid = torch.as_tensor(np.stack((x, y), -1), dtype=values.dtype, device=values.device)  # (H, W, 2)
    return functional.grid_sample(
        values[None], grid[None], mode="bilinear", padding_mode="border", align_corners=False
    )[0]


def box_iou(first: Box | None, second: Box | None) -> float:
    """Intersection over union of two `(x1, y1, x2, y2)` boxes; 0.0 when either is None or has no area."""
    if first is None or second is None:
        return 0.0
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    intersection = max(0.0, width) * max(0.0, height)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second))
    union = areas - intersection
    return intersection / union if union > 0 else 0.0
