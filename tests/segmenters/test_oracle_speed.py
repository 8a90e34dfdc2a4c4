"""How fast trajectories are made: clicks of the oracle per second of one core, IoUs and run lengths included.

`pytest tests/segmenters/test_oracle_speed.py -s` prints the figure.
"""

from __future__ import annotations

import time

import cv2
import numpy as np
from PIL import Image

from mmseg_llm.segmenters.fakes import DisksEnvironment
from mmseg_llm.segmenters.recorder import record

SIZE = (480, 640)


def blob(seed: int) -> np.ndarray:
    """A ragged object of a tenth to a third of the image."""
    noise = np.random.default_rng(seed).random(SIZE, np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 25) + cv2.GaussianBlur(noise, (0, 0), 6) / 3
    rows, cols = np.indices(SIZE)
    near = np.hypot((rows - 240) / 160, (cols - 320) / 220) < 1
    return (smooth > np.median(smooth)) & near


def test_speed_of_the_oracle():
    image, targets = Image.new("RGB", SIZE[::-1]), [blob(seed) for seed in range(4)]
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    best = 0.0
    try:
        for _ in range(3):  # of three, for the machine is shared
            clicks, started = 0, time.process_time()
            for target in targets:
                found = record(
                    DisksEnvironment(30, 12), image, target, max_clicks=10, iou_threshold=1.0, on_low_gain="discard"
                )
                clicks += len(found.steps) + len(found.rejected)
            best = max(best, clicks / (time.process_time() - started))
    finally:
        cv2.setNumThreads(threads)
    print(f"{best:.0f} clicks per second and core at {SIZE[0]} x {SIZE[1]}")
    assert clicks >= 30 and best >= 30
