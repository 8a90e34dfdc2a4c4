"""What a click policy sees: the image with the mask so far in a semi-transparent colour (SegAgent specification section 2.5).

No contour, no marks of clicks, no text; an empty mask shows the plain image.

Legend: H W pixels.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from PIL import Image

Colour = Literal["green", "blue", "red"]
COLOURS: dict[str, tuple[int, int, int]] = {"green": (0, 255, 0), "blue": (0, 0, 255), "red": (255, 0, 0)}


@dataclass(frozen=True)
class Overlay:
    """The renderer of observations.

    Attributes:
        colour: of the mask; a prompt that names the colour must name this one.
        alpha: share of the colour where the mask is.
        jpeg_roundtrip: pass the picture through a JPEG file (quality 75, 4:2:0), as the released evaluation does.
    """

    colour: Colour = "green"
    alpha: float = 0.5
    jpeg_roundtrip: bool = False

    def __post_init__(self) -> None:
        """Raises: ValueError for an unknown colour, or a share outside of [0, 1]."""
        if self.colour not in COLOURS:
            raise ValueError(f"colour is '{self.colour}'; choose from {', '.join(get_args(Colour))}")
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha is {self.alpha}; it must lie in [0, 1]")

    def __call__(self, image: Image.Image, mask: np.ndarray) -> Image.Image:
        """The image with the mask on it.

        Args:
            image: RGB, `(H, W)`.
            mask: `(H, W)`, set where it is above 0.

        Returns:
            RGB of the same size; where the mask is set `floor((1 - alpha) v + alpha colour)`.

        Raises:
            ValueError: if the sizes differ.
        """
        if mask.shape != (image.height, image.width):
            raise ValueError(
                f"mask of shape {mask.shape} does not fit an image of size {(image.height, image.width)} (H, W); "
                "bring it to the original size first"
            )
        values = np.array(image.convert("RGB"))  # (H, W, 3)
        table = self._table()
        inside = mask > 0
        for channel in range(3):
            values[inside, channel] = table[channel][values[inside, channel]]
        shown = Image.fromarray(values)
        return through_jpeg(shown) if self.jpeg_roundtrip else shown

    def _table(self) -> np.ndarray:
        """uint8 `(3, 256)`: what each value of each channel becomes; all that rounding is in here."""
        values = np.arange(256, dtype=np.float64)
        colour = np.array(COLOURS[self.colour], np.float64)[:, None]
        return ((1.0 - self.alpha) * values + self.alpha * colour).astype(np.uint8)


def through_jpeg(image: Image.Image) -> Image.Image:
    """The image as it comes back from a JPEG file with Pillow's default settings."""
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=75, subsampling="4:2:0")
    file.seek(0)
    return Image.open(file).convert("RGB")
