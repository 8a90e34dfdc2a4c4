"""SAM as the environment of a click policy, on tiny networks with random weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmseg_llm.segmenters import Environment, RefineError, SamEngine
from mmseg_llm.segmenters.sam_clicks import SamEnvironment
from mmseg_llm.segmenters.sam_original import SegmentAnythingEngine
from mmseg_llm.segmenters.sam_transformers import TransformersSamEngine
from mmseg_llm.structures import Click
from segmenters.tiny_sam import make_engine, make_image

KINDS = ["segment_anything", "transformers", "sam2"]
CLICKS = [Click(20, 30, True), Click(70, 100, False), Click(45, 60, True), Click(0, 0, False)]
BOX = (10.0, 20.0, 90.0, 80.0)


def make_environment(kind: str, **settings) -> SamEnvironment:
    return SamEnvironment(make_engine(kind), **settings)


def equal(first, second, tolerance: float = 0.0) -> bool:
    """Whether two observations are the same, the maps up to a tolerance."""
    return (
        first.clicks == second.clicks
        and (tolerance > 0 or np.array_equal(first.mask, second.mask))
        and float(np.abs(first.chances - second.chances).max()) <= tolerance
        and (first.score == second.score or abs(first.score - second.score) <= tolerance)
    )


def record(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What every decoder call from here on was asked."""
    calls = []
    for kind in (SegmentAnythingEngine, TransformersSamEngine):
        decode = kind.decode_candidates

        def recording(engine, embedding, decode=decode, **asked):
            calls.append(asked)
            return decode(engine, embedding, **asked)

        monkeypatch.setattr(kind, "decode_candidates", recording)
    return calls


@pytest.mark.parametrize("kind", KINDS)
def test_steps_have_the_size_of_the_image(kind: str):
    environment, image = make_environment(kind), make_image()
    first = environment.reset(image)
    assert isinstance(environment, Environment)
    assert first.mask.shape == (90, 120) and not first.mask.any() and first.score is None and first.clicks == ()
    for i, click in enumerate(CLICKS):
        observation = environment.step(click)
        assert observation.mask.shape == observation.chances.shape == (90, 120)
        assert observation.mask.dtype == bool and observation.chances.dtype == np.float32
        assert np.array_equal(observation.mask, observation.chances > 0.5)
        assert isinstance(observation.score, float) and observation.clicks == tuple(CLICKS[: i + 1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_state_steps_like_a_fresh_replay(kind: str):
    environment, image = make_environment(kind), make_image()
    environment.reset(image)
    environment.step(CLICKS[0])
    state = environment.snapshot()
    kept = state.logits.clone()
    expected = environment.step(CLICKS[1])
    environment.step(CLICKS[2])
    environment.restore(state)
    assert equal(environment.step(CLICKS[1]), expected)
    assert torch.equal(state.logits, kept)  # nothing wrote to it
    environment.reset(image)
    environment.step(CLICKS[0])
    assert equal(environment.step(CLICKS[1]), expected)
    environment.reset(image)  # states outlive an episode on the same image
    environment.restore(state)
    assert equal(environment.step(CLICKS[1]), expected)


@pytest.mark.parametrize("box", [None, BOX], ids=["empty", "box"])
@pytest.mark.parametrize("kind", KINDS)
def test_many_steps_are_the_same_one_by_one(kind: str, box, monkeypatch: pytest.MonkeyPatch):
    environment = make_environment(kind)
    environment.reset(make_image(), box=box)
    environment.step(CLICKS[0])
    before = environment.snapshot()
    expected = Environment.advance(environment, [before] * 3, CLICKS[1:])
    calls = record(monkeypatch)
    tried = environment.step_many([*CLICKS[1:], CLICKS[1]])
    assert len(calls) == 1 and len(calls[0]["points"]) == 3  # a click that comes twice is decoded once
    assert environment.snapshot() is before
    assert tried[-1] is tried[0]
    for (observation, state), (wanted, wanted_state) in zip(tried, expected):
        assert equal(observation, wanted, 1e-4)
        assert float((state.logits - wanted_state.logits).abs().max()) < 1e-4
        assert state.clicks == wanted_state.clicks and state.box == wanted_state.box == box
    environment.restore(tried[1][1])
    assert equal(environment.step(CLICKS[3]), step_after(environment, expected[1][1], CLICKS[3]), 1e-4)


def step_after(environment: SamEnvironment, state, click: Click):
    environment.restore(state)
    return environment.step(click)


def test_many_steps_in_batches(monkeypatch: pytest.MonkeyPatch):
    environment = make_environment("segment_anything", batch_size=2)
    environment.reset(make_image())
    calls = record(monkeypatch)
    assert environment.step_many([]) == []
    assert len(environment.step_many(CLICKS[:3])) == 3
    assert [len(call["points"]) for call in calls] == [2, 1]


def test_both_libraries_agree():
    environments = [make_environment(kind) for kind in KINDS[:2]]
    for environment in environments:  # their image encoders differ: the decoder is compared
        environment.engine.embed = lambda image, kind=environment.engine: embedding_of(kind)
    results = [[env.reset(make_image(), box=BOX), *map(env.step, CLICKS)] for env in environments]
    for first, second in zip(*results):
        assert equal(first, second, 1e-4)


def embedding_of(engine: SamEngine):
    embedding = torch.randn((1, 32, 8, 8), generator=torch.Generator().manual_seed(1))
    return [embedding] if type(engine).__name__.startswith("Transformers") else embedding


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_an_episode(kind: str, monkeypatch: pytest.MonkeyPatch):
    environment = make_environment(kind)
    calls = record(monkeypatch)
    observation = environment.reset(make_image(), box=BOX)
    assert observation.clicks == () and observation.score is not None
    assert calls[0]["points"] is None and calls[0]["masks"] is None
    scale = (64 / 120, 64 / 90) if kind == "sam2" else (128 / 120, 128 / 120)
    assert calls[0]["boxes"].tolist() == [pytest.approx([value * scale[i % 2] for i, value in enumerate(BOX)])]
    previous = environment.snapshot().logits
    environment.step(CLICKS[0])
    environment.step(CLICKS[1])
    assert torch.equal(calls[1]["masks"][0], previous)
    assert all(torch.equal(call["boxes"], calls[0]["boxes"]) for call in calls)
    assert calls[2]["labels"].tolist() == [[1, 0]]
    assert calls[2]["points"][0, 1].tolist() == pytest.approx([100 * scale[0], 70 * scale[1]])
    assert all(call["is_multimask"] for call in calls)


def test_first_only_asks_for_one_mask_where_nothing_is_ambiguous(monkeypatch: pytest.MonkeyPatch):
    environment, image = make_environment("segment_anything", multimask="first_only"), make_image()
    calls = record(monkeypatch)
    environment.reset(image)
    environment.step(CLICKS[0])
    environment.step(CLICKS[1])
    environment.reset(image, box=BOX)
    environment.step(CLICKS[0])
    assert [call["is_multimask"] for call in calls] == [True, False, False, False]


def test_without_feed_back_no_mask_is_asked(monkeypatch: pytest.MonkeyPatch):
    environment = make_environment("transformers", feed_back=False)
    calls = record(monkeypatch)
    environment.reset(make_image())
    environment.step(CLICKS[0])
    environment.step(CLICKS[1])
    assert [call["masks"] for call in calls] == [None, None]
    assert "feed_back=False" in repr(environment)


def test_the_best_candidate_is_kept(monkeypatch: pytest.MonkeyPatch):
    environment = make_environment("segment_anything")
    side = environment.engine.mask_side
    logits = torch.stack([torch.full((side, side), value) for value in (-1.0, 1.0, -2.0)])[None]
    found = (logits, torch.tensor([[0.1, 0.9, 0.5]]))
    monkeypatch.setattr(environment.engine, "decode_candidates", lambda *args, **asked: found)
    environment.reset(make_image())
    observation = environment.step(CLICKS[0])
    assert observation.mask.all() and observation.score == pytest.approx(0.9)
    assert torch.equal(environment.snapshot().logits, logits[0, 1])


@pytest.mark.parametrize("kind", KINDS)
def test_start_from_a_mask(kind: str, monkeypatch: pytest.MonkeyPatch):
    environment = make_environment(kind)
    mask = np.zeros((90, 120), bool)
    mask[20:60, 30:80] = True
    calls = record(monkeypatch)
    observation = environment.reset(make_image(), mask=mask)
    assert np.array_equal(observation.mask, mask) and not calls
    environment.step(CLICKS[0])
    assert calls[0]["masks"] is not None
    assert float(calls[0]["masks"].max()) > 5 > -5 > float(calls[0]["masks"].min())


def test_an_image_is_encoded_once():
    environment, image = make_environment("segment_anything"), make_image()
    encoded, embed = [], environment.engine.embed
    environment.engine.embed = lambda image: (encoded.append(image.size), embed(image))[1]
    for shown in (image, image.copy(), make_image(60, 60), image):
        environment.reset(shown)
    assert encoded == [(120, 90), (60, 60), (120, 90)]


def test_errors():
    environment, image = make_environment("segment_anything"), make_image()
    with pytest.raises(ValueError, match="call reset"):
        environment.step(CLICKS[0])
    with pytest.raises(ValueError, match="call reset"):
        environment.restore(environment.snapshot())
    environment.reset(image)
    for wrong in (Click(90, 0, True), Click(0, -1, True)):
        with pytest.raises(ValueError, match="lies outside of an image"):
            environment.step(wrong)
        with pytest.raises(ValueError, match="lies outside of an image"):
            environment.step_many([CLICKS[0], wrong])
    with pytest.raises(ValueError, match="does not fit an image"):
        environment.reset(image, box=(0, 0, 121, 90))
    with pytest.raises(ValueError, match="does not fit the image"):
        environment.reset(image, mask=np.zeros((5, 5), bool))
    with pytest.raises(ValueError, match="feed_back=False"):
        make_environment("transformers", feed_back=False).reset(image, mask=np.ones((90, 120), bool))
    with pytest.raises(ValueError, match="multimask is 'never'"):
        SamEnvironment(multimask="never")
    with pytest.raises(ValueError, match="batch_size is 0"):
        SamEnvironment(batch_size=0)
    with pytest.raises(ValueError, match="belongs to model vit_b"):
        SamEnvironment(model="facebook/sam-vit-huge", checkpoint="sam.pth")
    with pytest.raises(RefineError, match="set `checkpoint`"):
        SamEnvironment().reset(image)


def test_values_that_are_not_finite_are_no_empty_mask(monkeypatch: pytest.MonkeyPatch):
    environment = make_environment("segment_anything")
    environment.reset(make_image())
    nothing = (torch.full((1, 3, 32, 32), float("nan")), torch.zeros((1, 3)))
    monkeypatch.setattr(environment.engine, "decode_candidates", lambda *args, **asked: nothing)
    before = environment.snapshot()
    with pytest.raises(RefineError, match="not finite"):
        environment.step(CLICKS[0])
    assert environment.snapshot() is before
