"""A model that knows the geometry of what it is asked about, so that everything made of its answers can be checked."""

from __future__ import annotations

import numpy as np

from mmseg_llm.cameras import Camera
from mmseg_llm.structures import Mask, Measurement, Prediction

CAMERA = Camera(100.0, 110.0, 61.0, 40.0)
SIZE = (96, 128)


class _Head:
    protocols = ("generate", "other")

    def __init__(self, name: str, distance: str | None = None) -> None:
        self.name = name
        if distance is not None:
            self.distance = distance


class PlaneWorld:
    """Sees a plane: `slope . ray = 1 / z`; masks are boxes by query.

    Args:
        distance: what the depth head answers along; None for a model without one.
        slope: (a, b, c) of inverse planar depth `a X/Z + b Y/Z + c`.
        fails: reason by (x, y) of a point, None where it is answered.
        masks: bool array by query; others are rejected.
    """

    def __init__(self, distance="ray", slope=(0.0, 0.0, 0.25), fails=lambda x, y: None, masks=None) -> None:
        self.kind, self.slope, self.fails, self.masks = distance or "ray", slope, fails, masks or {}
        self.heads = {"mask_decoder": _Head("mask_decoder")}
        if distance is not None:
            self.heads["depth_text"] = _Head("depth_text", distance)
        self.calls: list = []

    def eval(self):
        return self

    def head(self, name=None):
        name = name or next(iter(self.heads))
        if name not in self.heads:
            raise ValueError(f"the model has no head '{name}'; it has {', '.join(self.heads)}")
        return self.heads[name]

    def planar(self, camera, points):
        """Planar metres `(...)` of pixels `(..., 2)`, by nothing but the intrinsics."""
        x, y = (points[..., 0] - camera.cx) / camera.fx, (points[..., 1] - camera.cy) / camera.fy
        return 1 / (self.slope[0] * x + self.slope[1] * y + self.slope[2])

    def ray(self, camera, points):
        """The same along the ray."""
        x, y = (points[..., 0] - camera.cx) / camera.fx, (points[..., 1] - camera.cy) / camera.fy
        return self.planar(camera, points) * np.sqrt(x * x + y * y + 1)

    def predict(self, samples, head=None, protocol="generate"):
        self.calls.append((head, protocol, [len(sample.queries) for sample in samples]))
        answer = self._depth if hasattr(self.head(head), "distance") else self._mask
        return [answer(sample, query) for sample in samples for query in sample.queries]

    def _depth(self, sample, query):
        assert query.task == "depth" and query.text == "" and sample.load_image().mode == "RGB"
        (point,) = query.points
        inside = -0.5 <= point.x < sample.size[1] - 0.5 and -0.5 <= point.y < sample.size[0] - 0.5
        reason = self.fails(point.x, point.y) if inside else "outside_image"
        metres = (self.ray if self.kind == "ray" else self.planar)(sample.camera, np.array([point.x, point.y]))
        measurement = Measurement(
            None if reason else float(metres),
            reason or "",
            ((point.x, point.y),),
            "depth",
            "m",
            self.kind,
            sample.camera,
        )
        text = "somewhere" if reason else f"{metres:.2f} m"
        return Prediction("", sample.size, query.id, sample.id, text=text, score=0.5, measurement=measurement)

    def _mask(self, sample, query):
        found = self.masks.get(query.text)
        mask = Mask.empty(sample.size) if found is None else Mask.from_array(found)
        return Prediction(
            query.text, sample.size, query.id, sample.id, mask=mask, box=mask.box, score=0.9, exists=found is not None
        )


def noise(size=SIZE, seed=0):
    """A picture without any two pixels alike."""
    from PIL import Image

    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


def box_mask(top, bottom, left, right, size=SIZE):
    array = np.zeros(size, bool)
    array[top:bottom, left:right] = True
    return array
