"""What all environments promise: many episodes in lock-step, states that stand for themselves, and masks to start from."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from mmseg_llm.segmenters import Environment, GrabCutEnvironment, Observation, SamEnvironment
from mmseg_llm.segmenters.fakes import DisksEnvironment, SoftEnvironment, TargetDisksEnvironment
from mmseg_llm.segmenters.simple_click import SimpleClickEnvironment
from mmseg_llm.structures import Click
from segmenters.test_simple_click_network import tiny
from segmenters.tiny_sam import make_engine

TARGET = np.zeros((48, 60), bool)
TARGET[10:40, 15:50] = True


def simple_click(**options) -> SimpleClickEnvironment:
    return SimpleClickEnvironment(tiny(5), **{"size": 64, "min_crop": 20, "device": "cpu"} | options)


MAKERS: dict[str, Callable[[], Environment]] = {
    "disks": lambda: DisksEnvironment(9, 5),
    "target_disks": lambda: TargetDisksEnvironment(TARGET, 9, 5),
    "soft": lambda: SoftEnvironment(9, 5),
    "grabcut": GrabCutEnvironment,
    "grabcut_reduced": lambda: GrabCutEnvironment(max_side=32, workers=3),
    "sam": lambda: SamEnvironment(make_engine("segment_anything")),
    "sam_transformers": lambda: SamEnvironment(make_engine("transformers"), batch_size=3),
    "sam2": lambda: SamEnvironment(make_engine("sam2"), multimask="first_only"),
    "simple_click": simple_click,
    "simple_click_direct": lambda: simple_click(init_mode="direct", batch_size=3),
}
NETWORKS = {"sam", "sam_transformers", "sam2", "simple_click", "simple_click_direct"}
every = pytest.mark.parametrize("name", MAKERS)


def photo(size: tuple[int, int] = (48, 60), seed: int = 0) -> Image.Image:
    """A disk on another colour, with noise."""
    rng = np.random.default_rng(seed)
    rows, cols = np.mgrid[: size[0], : size[1]]
    inside = (rows - size[0] // 2) ** 2 + (cols - size[1] // 3) ** 2 < (min(size) / 4) ** 2
    colours = rng.integers(40, 215, (2, 3))
    pixels = np.where(inside[..., None], *colours) + rng.integers(-20, 20, (*size, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def photos(name: str) -> list[Image.Image]:
    """Three images, of different sizes where the environment takes them."""
    sizes = [(48, 60)] * 3 if name == "target_disks" else [(48, 60), (31, 77), (70, 40)]
    return [photo(size, seed) for seed, size in enumerate(sizes)]


def region(image: Image.Image) -> np.ndarray:
    """A mask with fine parts."""
    mask = np.zeros((image.height, image.width), bool)
    mask[5:22, 8:30] = True
    mask[7:20:3, 10:14] = False
    mask[25, 20] = True
    return mask


def random_click(rng: np.random.Generator, image: Image.Image) -> Click:
    return Click(int(rng.integers(image.height)), int(rng.integers(image.width)), bool(rng.random() < 0.6))


def check(name: str, shown: Observation, expected: Observation) -> None:
    """Equal to the last bit, and for networks within what batching rounds."""
    tolerance = 1e-5 if name in NETWORKS else 0.0
    assert np.array_equal(shown.mask, expected.mask) and shown.clicks == expected.clicks
    assert shown.mask.dtype == bool
    for one, other in ((shown.chances, expected.chances), (shown.score, expected.score)):
        assert (one is None) == (other is None)
        if one is not None:
            assert np.abs(np.subtract(one, other, dtype=np.float64)).max() <= tolerance


def begun(name: str, environment: Environment) -> tuple[list[Image.Image], list, list[Image.Image]]:
    """Images, states after unequal numbers of clicks on them, from masks too, and the image of each state."""
    images, rng = photos(name), np.random.default_rng(1)
    shown = [*images, *images]
    states = [state for _, state in environment.begin(shown, [None] * 3 + [region(image) for image in images])]
    for turn in range(3):
        moved = range(turn, 6)
        after = environment.advance([states[i] for i in moved], [random_click(rng, shown[i]) for i in moved])
        for i, (_, state) in zip(moved, after):
            states[i] = state
    return images, states, shown


@every
def test_lock_step_is_one_by_one(name):
    environment = MAKERS[name]()
    _, states, shown = begun(name, environment)
    rng = np.random.default_rng(2)
    for _ in range(3):
        pairs = [(state, random_click(rng, image)) for state, image in zip(states, shown) for _ in range(2)]
        together = environment.advance(*zip(*pairs))
        alone = Environment.advance(environment, *zip(*pairs))
        for (one, _), (other, _) in zip(together, alone, strict=True):
            check(name, one, other)
        states = [state for _, state in together[::2]]


@every
def test_begin_is_reset(name):
    environment, images = MAKERS[name](), photos(name)
    masks = [region(image) for image in images]
    for given in (None, [None, masks[1], None], np.stack(masks) if name == "target_disks" else masks):
        for i, (shown, state) in enumerate(environment.begin(images, given)):
            fresh = MAKERS[name]()
            check(name, shown, fresh.reset(images[i], None if given is None else given[i]))
            click = random_click(np.random.default_rng(i), images[i])
            check(name, environment.advance([state], [click])[0][0], fresh.step(click))
    assert environment.begin([]) == [] and environment.advance([], []) == []


@every
def test_states_stand_for_themselves(name):
    """Restored on another image, a state steps like a fresh replay."""
    environment, images = MAKERS[name](), photos(name)
    clicks = [Click(20, 20, True), Click(10, 35, False), Click(28, 12, True)]
    environment.reset(images[0], mask=region(images[0]))
    environment.step(clicks[0])
    state = environment.snapshot()
    environment.reset(images[1])
    environment.step(clicks[1])
    environment.restore(state)
    assert environment.snapshot() is state
    fresh = MAKERS[name]()
    fresh.reset(images[0], mask=region(images[0]))
    fresh.step(clicks[0])
    for click in clicks[1:]:
        check(name, environment.step(click), fresh.step(click))


@every
def test_masks_to_start_from_are_shown_exactly(name):
    environment = MAKERS[name]()
    for image in photos(name):
        mask = region(image)
        for given in (mask, mask.astype(np.uint8), mask.astype(float)):
            for shown in (environment.reset(image, mask=given), environment.begin([image], [given])[0][0]):
                assert shown.mask.shape == mask.shape
                if not shown.clicks:  # SimpleClick may have clicked its way there
                    assert np.array_equal(shown.mask, mask)
                    assert shown.chances is None or np.array_equal(shown.chances, mask.astype(np.float32))
        shown = environment.reset(image, mask=np.zeros_like(mask))
        check(name, shown, environment.reset(image))
        assert not shown.mask.any()
    if name != "simple_click":
        assert not environment.reset(image, mask=mask).clicks


@every
def test_given_and_shown_arrays_belong_to_the_caller(name):
    environment, image = MAKERS[name](), photos(name)[0]
    mask, click = region(image), Click(20, 20, True)
    environment.reset(image, mask=mask.copy())
    expected = [environment.step(click), environment.step(Click(3, 3, False))]
    shown = environment.reset(image, mask=mask)
    for want in expected:
        mask[:] = shown.mask[:] = True
        if shown.chances is not None:
            shown.chances[:] = 1
        shown = environment.step(want.clicks[-1])
        check(name, shown, want)


@every
def test_the_present_episode_stays(name):
    environment, images = MAKERS[name](), photos(name)
    others = environment.begin(images)
    environment.advance([state for _, state in others], [Click(3, 3, True)] * 3)
    with pytest.raises(ValueError, match="no episode yet; call reset"):
        environment.snapshot()
    environment.reset(images[1])
    environment.step(Click(9, 9, True))
    present = environment.snapshot()
    environment.begin(images)
    environment.advance([state for _, state in others], [Click(3, 3, True)] * 3)
    environment.step_many([Click(3, 3, True), Click(4, 4, False)])
    with pytest.raises(ValueError, match="outside"):
        environment.step(Click(99, 9, True))
    assert environment.snapshot() is present


@every
def test_the_same_is_computed_once(name, monkeypatch):
    environment, images = MAKERS[name](), photos(name)
    moves, encoded = [], []
    advance, encode = environment._advance, environment._encode
    monkeypatch.setattr(environment, "_advance", lambda *pairs: (moves.append(len(pairs[0])), advance(*pairs))[1])
    monkeypatch.setattr(environment, "_encode", lambda image: (encoded.append(image), encode(image))[1])
    mask, other = region(images[1]), region(images[1])
    shown = environment.begin([*images, images[0], images[1], images[1], images[1]], [None] * 4 + [mask, mask, other])
    assert [id(image) for image in encoded] == [id(image) for image in images]
    states = [state for _, state in shown]
    assert states[3] is states[0] and states[4] is states[5] and states[4] not in (states[1], states[6])
    moves.clear()
    clicks = [Click(3, 3, True), Click(4, 3, True), Click(3, 3, False)]
    tried = environment.advance([states[0]] * 5 + [states[1]], [*clicks, Click(3, 3, True), clicks[1], clicks[0]])
    assert moves == [4]
    assert tried[3] is tried[0] and tried[4] is tried[1] and tried[5] is not tried[0]
    assert [one.clicks[-1] for one, _ in tried[:4]] == [*clicks, clicks[0]]


@every
def test_images_go_with_their_states(name):
    environment, images = MAKERS[name](), photos(name)
    states = [state for _, state in environment.begin(images)]
    after = [state for _, state in environment.advance(states, [Click(3, 3, True)] * 3)]
    assert all(one.image is other.image for one, other in zip(states, after)), "referred to, not copied"
    kept = [weakref.ref(state.image) for state in states]
    environment.reset(photo(seed=9))
    del states, after[1:]
    gc.collect()
    assert [image() is not None for image in kept] == [True, False, False]


@every
def test_errors_are_sentences(name):
    environment, other, image = MAKERS[name](), MAKERS[name](), photos(name)[0]
    other.reset(image)
    ((_, own),) = environment.begin([image])
    for state in (other.snapshot(), None, "state", (own,)):
        for attempt in (environment.restore, lambda state: environment.advance([state], [Click(1, 1, True)])):
            with pytest.raises(ValueError, match="this state is not of this environment"):
                attempt(state)
    for mask, words in (
        (np.zeros((3, 3), bool), r"mask of shape \(3, 3\) does not fit the image of size \(48, 60\)"),
        (np.full((48, 60), 0.5), r"from 0\.5 to 0\.5; give a bool mask"),
        (np.full((48, 60), 255, np.uint8), "from 255 to 255"),
    ):
        for attempt in (environment.reset, lambda image, mask: environment.begin([image], [mask])):
            with pytest.raises(ValueError, match=words):
                attempt(image, mask)
    with pytest.raises(ValueError, match="got 1 clicks for 2 states"):
        environment.advance([own, own], [Click(1, 1, True)])
    with pytest.raises(ValueError, match="got 2 masks for 1 images"):
        environment.begin([image], [None, None])
    with pytest.raises(ValueError, match="row 48, column 0 lies outside"):
        environment.advance([own, own], [Click(1, 1, True), Click(48, 0, True)])


class Plain(Environment):
    """Disks with nothing but what an environment must have."""

    def __init__(self) -> None:
        self.disks, self.steps = DisksEnvironment(9, 5), 0

    def reset(self, image, mask=None):
        return self.disks.reset(image, mask)

    def step(self, click):
        self.steps += 1
        return self.disks.step(click)

    def snapshot(self):
        return self.disks.snapshot()

    def restore(self, state):
        self.disks.restore(state)


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(data=st.data())
def test_the_loops_of_the_base_class_do_the_same(data):
    plain, fast = Plain(), DisksEnvironment(9, 5)
    images = [photo((12, 17), 1), photo((20, 9), 2)]
    chosen = data.draw(st.lists(st.sampled_from(images), max_size=4))
    masks = [data.draw(st.sampled_from([None, np.eye(image.height, image.width, dtype=bool)])) for image in chosen]
    if data.draw(st.booleans()):
        plain.reset(images[0])
        present = plain.snapshot()
    else:
        present = None
    starts = [environment.begin(chosen, masks) for environment in (plain, fast)]
    for _ in range(2):
        clicks = [Click(data.draw(st.integers(0, 8)), data.draw(st.integers(0, 8)), True) for _ in chosen]
        for (one, _), (other, _) in zip(*starts, strict=True):
            check("disks", one, other)
        starts = [env.advance([state for _, state in start], clicks) for env, start in zip((plain, fast), starts)]
    if present is not None:
        assert plain.snapshot() is present
        plain.steps = 0
        plain.step_many([Click(1, 1, True)] * 3)
        assert plain.steps == 1 and plain.snapshot() is present
