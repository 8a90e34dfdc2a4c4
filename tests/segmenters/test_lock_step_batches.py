"""How each environment shares the work of clicks in lock-step; that the results stay the same is in test_lock_step.py."""

from __future__ import annotations

import hypothesis
import numpy as np
import torch
from hypothesis import strategies as st

from mmseg_llm.segmenters import GrabCutEnvironment, SamEnvironment
from mmseg_llm.segmenters.sam_original import SegmentAnythingEngine
from mmseg_llm.segmenters.simple_click import SimpleClickEnvironment
from mmseg_llm.structures import Click
from segmenters.test_lock_step import photo, photos, random_click, region
from segmenters.tiny_sam import make_engine


@hypothesis.settings(max_examples=10, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**16), workers=st.integers(2, 6))
def test_threads_change_no_bit_of_grabcut(seed, workers):
    rng = np.random.default_rng(seed)
    images = [photo(tuple(int(side) for side in rng.integers(20, 60, 2)), seed + i) for i in range(4)]
    clicks = [[random_click(rng, image) for image in images for _ in range(2)] for _ in range(2)]
    results = []
    for count in (1, workers):
        environment = GrabCutEnvironment(workers=count)
        shown = environment.begin([image for image in images for _ in range(2)])
        for turn in clicks:
            shown = environment.advance([state for _, state in shown], turn)
            results.append([one.mask for one, _ in shown])
    for one, other in zip(results[:2], results[2:], strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_fine_parts_of_a_mask_stay_where_grabcut_works_on_a_smaller_image():
    """Only what a click decides is drawn anew."""
    image, mask = photo((120, 160)), np.zeros((120, 160), bool)
    mask[90:118:2, 100:158:3] = True  # vanishes when it is reduced
    environment = GrabCutEnvironment(max_side=32)
    environment.reset(image, mask=mask)
    shown = environment.step(Click(62, 52, True))
    assert shown.mask[62, 52] and shown.mask[45:75, 40:65].mean() > 0.9
    assert np.array_equal(shown.mask[90:, 100:], mask[90:, 100:])
    shown = environment.step(Click(62, 52, False))
    assert not shown.mask[62, 52] and np.array_equal(shown.mask[90:, 100:], mask[90:, 100:])


def test_simple_click_looks_at_all_images_at_once():
    shapes: list[tuple[int, ...]] = []

    class Counting(torch.nn.Module):
        def forward(self, inputs, points):
            shapes.append(tuple(inputs.shape))
            return inputs[:, 3:] * 0 + 1

    environment = SimpleClickEnvironment(Counting(), size=32, batch_size=4, device="cpu")
    states = [state for _, state in environment.begin(photos("simple_click"))]
    environment.advance([*states, *states], [Click(3, 3, True)] * 3 + [Click(4, 4, True)] * 3)
    assert shapes == [(8, 4, 32, 32), (4, 4, 32, 32)]
    environment.begin(photos("simple_click"), [region(image) for image in photos("simple_click")])
    assert shapes[2:] == [(6, 4, 32, 32)] * 2, "two rounds of clicks into the masks"


def test_sam_decodes_equal_prompts_of_an_image_together(monkeypatch):
    environment, images = SamEnvironment(make_engine("segment_anything"), batch_size=3), photos("sam")[:2]
    calls, decode = [], SegmentAnythingEngine.decode_candidates

    def recording(engine, embedding, **asked):
        calls.append((len(asked["points"]), asked["points"].shape[1], asked["masks"] is not None))
        return decode(engine, embedding, **asked)

    environment.reset(images[0], box=(5, 5, 30, 30))
    boxed = environment.snapshot()
    monkeypatch.setattr(SegmentAnythingEngine, "decode_candidates", recording)
    masks = [None, None, region(images[0])]
    first, second, started = (state for _, state in environment.begin([*images, images[0]], masks))
    states = [first, second, started, boxed] * 2 + [first] * 2
    clicks = [Click(i, i, True) for i in range(10)]
    after = [state for _, state in environment.advance(states, clicks)]
    assert calls == [(3, 1, False), (1, 1, False), (2, 1, False), (2, 1, True), (2, 1, True)]
    calls.clear()
    environment.advance([*after[:3], first], [Click(20, 20, True)] * 4)
    assert calls == [(2, 2, True), (1, 2, True), (1, 1, False)]


def test_sam_encodes_an_image_once_while_a_state_refers_to_it():
    environment, image = SamEnvironment(make_engine("segment_anything")), photo()
    encoded, embed = [], environment.engine.embed
    environment.engine.embed = lambda image: (encoded.append(image), embed(image))[1]
    kept = environment.begin([image, image.copy()])
    environment.reset(photo(seed=1))
    environment.reset(image)
    assert len(encoded) == 2 and environment.snapshot().image is kept[0][1].image
