"""The depth head: what is learnt from, what is asked, and that answers depend on nothing but the question."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from heads.depth_text.cases import CAMERA, SHORT, head, model, sample
from PIL import Image

from mmseg_llm.backbones import InternVLBackbone
from mmseg_llm.backbones.codec import IGNORE_INDEX
from mmseg_llm.backbones.collate import collate
from mmseg_llm.heads.base import NoExampleError
from mmseg_llm.heads.depth_text.prompts import DepthPrompts
from mmseg_llm.heads.depth_text.views import Augmentation
from mmseg_llm.model import PerceptionModel
from mmseg_llm.quantities import REASONS
from mmseg_llm.questions import measure
from mmseg_llm.structures import Camera, DepthPoint, Query, Sample

REFERENCES = ("text", "marker")


@pytest.fixture(scope="module")
def text_model():
    return model(head())


@pytest.fixture(scope="module")
def marker_model():
    return model(head(reference="marker"))


def built(chosen, one: Sample, seed: int = 0):
    perception = model(chosen)
    return perception, chosen.build(one, perception.backbone.codec, np.random.default_rng(seed))


def supervised(example, codec) -> list[str]:
    return [codec.decode([label for label in suffix.labels if label != IGNORE_INDEX]) for suffix in example.suffixes]


def with_points(one: Sample, *points: tuple[float, float, float | None], task: str = "depth", **fields) -> Sample:
    found = tuple(
        Query(points=(DepthPoint(*point),), task=task, id=str(i), **{"text": "", **fields})
        for i, point in enumerate(points)
    )
    return replace(one, queries=found)


# ---- training -------------------------------------------------------------------------------------------------------------


def test_text_questions_are_packed_behind_one_picture():
    """Each sees the picture and itself only: the states of an answer do not depend on what is asked beside it."""
    perception, example = built(head(max_questions=4), sample(count=5))
    codec = perception.backbone.codec
    assert len(example.suffixes) == 4 and len({suffix.query_ids for suffix in example.suffixes}) == 4
    together = collate([example], codec)
    states = perception.backbone(together).states
    start = len(example.prefix)
    for suffix in example.suffixes:
        alone = collate([replace(example, suffixes=(suffix,), targets=(None,))], codec)
        single = perception.backbone(alone).states[0, len(example.prefix) :]
        assert torch.allclose(states[0, start : start + len(suffix.ids)], single, atol=2e-5)
        start += len(suffix.ids)


@pytest.mark.parametrize("reference", REFERENCES)
def test_only_answers_are_supervised_and_say_the_label(reference):
    one = sample(3)
    perception, example = built(head(reference=reference), one)
    codec = perception.backbone.codec
    assert len(example.suffixes) == (5 if reference == "text" else 1)
    for suffix, said in zip(example.suffixes, supervised(example, codec), strict=True):
        point = one.queries[suffix.query_ids[0]].points[0]
        metres = CAMERA.convert(point.metres, np.array([point.x, point.y]), "planar", "ray")
        assert said == f"{float(metres):.2f} m"
        assert suffix.labels[-2] == codec.end_id or suffix.labels[-1] == codec.end_id


def test_labels_are_converted_or_left_alone():
    one = with_points(sample(), (40.0, 30.0, 5.0))
    stretch = float(CAMERA.stretch_of(np.array([40.0, 30.0])))
    for distance, camera, expected in (
        ("ray", CAMERA, 5 * stretch),
        ("planar", CAMERA, 5.0),
        ("unspecified", CAMERA, 5.0),
        ("planar", replace(CAMERA, distance="ray"), 5 / stretch),
        ("ray", replace(CAMERA, distance="unspecified"), 5.0),
    ):
        perception, example = built(head(distance=distance), replace(one, camera=camera))
        assert supervised(example, perception.backbone.codec) == [f"{expected:.2f} m"]


def test_marker_is_on_the_picture_and_text_is_not():
    one = with_points(sample(), (40.0, 30.0, 5.0))
    _, marked = built(head(reference="marker"), one)
    _, plain = built(head(), one)
    changed = (np.asarray(marked.canvas.image) != np.asarray(plain.canvas.image)).any(-1)
    assert changed.sum() == 9
    x, y = np.rint(plain.canvas.to_canvas(np.array([40.0, 30.0]))).astype(int)
    assert changed[y, x - 5 : x].all() and not changed[y, x]
    assert (np.asarray(marked.canvas.image)[y, x - 1] == (255, 0, 0)).all()


def test_shrunk_pictures_are_learnt_with_scaled_metres():
    """A backbone that takes 96 pixels sees everything nearer by the ratio; predictions undo it."""
    chosen = head(focal=120.0, overflow="shrink", distance="planar")
    perception = PerceptionModel(InternVLBackbone("internvl-tiny", template="plain"), {"depth": chosen})
    one = with_points(sample(), (40.0, 30.0, 5.0))
    example = chosen.build(one, perception.backbone.codec, np.random.default_rng(0))
    ratio = example.canvas.scale[0] * CAMERA.fx / 120
    assert 0.6 < ratio < 0.7
    said = float(supervised(example, perception.backbone.codec)[0].removesuffix(" m"))
    assert said == pytest.approx(5 / ratio, rel=0.01)
    found = perception.eval().predict([one])[0]
    assert found.depth == pytest.approx(float(found.text.removesuffix(" m")) * ratio, rel=0.01)


def test_unusable_points_are_not_drawn():
    points = [(40.0, 30.0, 5.0), (2.0, 30.0, 5.0), (40.0, 30.0, 0.001), (40.0, 30.0, 150.0), (-9.0, 3.0, 2.0)]
    one = with_points(sample(), *points, (41.0, 30.0, None))
    for reference, usable in (("text", {0, 1}), ("marker", {0})):
        drawn = {
            index
            for seed in range(6)
            for suffix in built(head(reference=reference), one, seed)[1].suffixes
            for index in suffix.query_ids
        }
        assert drawn == usable
    with pytest.raises(NoExampleError, match="no question of sample s0 of noise can be asked and answered"):
        built(head(), with_points(one, points[2]))


def test_a_crop_that_leaves_no_point_is_not_made():
    corner = with_points(sample(), (6.0, 6.0, 5.0))
    crops = Augmentation((30, 30), (30, 30))
    _, example = built(head(augmentation=crops), corner)
    assert example.canvas.offset == (0.0, 0.0)
    _, middle = built(head(augmentation=crops), with_points(sample(), (35.0, 28.0, 5.0)))
    assert middle.canvas.offset != (0.0, 0.0) and min(middle.canvas.size) <= 36


def test_training_refusals():
    one = sample()
    with pytest.raises(ValueError, match="has no intrinsics"):
        built(head(), replace(one, camera=None))
    with pytest.raises(ValueError, match="answers depth, planar_depth"):
        built(head(), replace(one, queries=(Query("the cat"),)))
    with pytest.raises(ValueError, match="refers to 2 points"):
        built(head(), with_points(one, (40.0, 30.0, 5.0), task="two_point_distance", value=1.0))
    with pytest.raises(ValueError, match="raise max_new_tokens from 20"):
        model(head(prompts=DepthPrompts(), max_new_tokens=20))
    for name, value in (("focal", 0.0), ("max_questions", 0), ("focal", float("nan"))):
        with pytest.raises(ValueError, match=f"{name} is"):
            head(**{name: value})
    with pytest.raises(ValueError, match="on_border is 'move'"):
        head(on_border="move")


# ---- predictions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("protocol", ["generate", "official"])
def test_neither_batch_nor_memory_changes_answers(reference, protocol, request):
    """All at once = sample by sample = question by question = little by little, for pictures of several sizes."""
    perception = request.getfixturevalue(f"{reference}_model")
    samples = [sample(0, count=7), sample(1, (40, 66), count=3), sample(2, (70, 50), count=1)]
    together = perception.predict(samples, protocol=protocol)
    assert [p.query_id for p in together] == [q.id for s in samples for q in s.queries]
    alone = [p for s in samples for p in perception.predict([s], protocol=protocol)]
    single = [
        p for s in samples for q in s.queries for p in perception.predict([replace(s, queries=(q,))], protocol=protocol)
    ]
    chosen = perception.head()
    before, chosen.max_cached = chosen.max_cached, 300
    try:
        little = perception.predict(samples, protocol=protocol)
    finally:
        chosen.max_cached = before
    for others in (alone, single, little):
        assert [(p.text, p.measurement) for p in others] == [(p.text, p.measurement) for p in together]
        assert np.allclose([p.score for p in others], [p.score for p in together], atol=1e-4)
    if protocol == "generate":
        assert all(p.depth and p.depth > 0 and 0 < p.score <= 1 for p in together)
        assert len({p.text for p in together}) > 1


def test_forced_and_free_answers_agree_once_learnt():
    """A model that knows the template says the same number whether or not the template is forced on it."""
    one = sample(5, count=3)
    chosen = head(prompts=DepthPrompts(digits=2), max_questions=3, max_new_tokens=96)
    perception = model(chosen).train()
    codec = perception.backbone.codec
    batch = collate([chosen.build(one, codec, np.random.default_rng(0))], codec)
    optimizer = torch.optim.AdamW(perception.parameters(), lr=2e-3)
    history = []
    for _ in range(60):
        loss = perception.loss(batch)["ce"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float(loss.detach()))
    assert history[-1] < 0.05 * history[0]
    perception.eval()
    forced, free = (perception.predict([one], protocol=protocol) for protocol in ("generate", "official"))
    assert [p.text for p in forced] == [p.text for p in free]
    truth = [
        float(CAMERA.convert(q.points[0].metres, np.array([q.points[0].x, q.points[0].y]), "planar", "ray"))
        for q in one.queries
    ]
    assert [p.depth for p in forced] == pytest.approx(truth, abs=0.006)


@pytest.mark.parametrize("reference", REFERENCES)
def test_points_that_cannot_be_asked_about(reference, request):
    perception = request.getfixturevalue(f"{reference}_model")
    one = with_points(
        sample(), (40.0, 30.0, None), (70.0, 3.0, None), (-1.0, 3.0, None), (math.nan, 3.0, None), (2.0, 2.0, None)
    )
    found = perception.predict([one])
    assert [p.measurement.reason for p in found] == ["", "outside_image", "outside_image", "outside_image", ""]
    assert [p.exists for p in found] == [True, False, False, False, True]
    assert [p.depth is None for p in found] == [False, True, True, True, False]
    moved = found[4].measurement
    assert moved.is_snapped == (reference == "marker")
    if reference == "marker":  # the arrow points at pixel (5, 5) of a picture that is 75 x 62 pixels wide and high
        assert moved.points == (((5 + 0.5) * 70 / 75 - 0.5, (5 + 0.5) * 56 / 62 - 0.5),)
    else:
        assert moved.points == ((2.0, 2.0),)


def test_border_rules():
    one = with_points(sample(), (2.0, 2.0, None), (40.0, 30.0, None))
    skipping = model(head(reference="marker", on_border="skip")).predict([one])
    assert [p.measurement.reason for p in skipping] == ["undrawable", ""]
    with pytest.raises(ValueError, match="set on_border to snap"):
        model(head(reference="marker", on_border="error")).predict([one])


def test_only_moved_points_are_reported_moved():
    """Of two points, one at the border; and two that would become one are not asked about."""
    perception = model(head(reference="marker"))
    one = sample()
    near, far, nearer = DepthPoint(1.0, 2.0), DepthPoint(40.0, 30.0), DepthPoint(0.0, 1.0)
    queries = tuple(
        Query("", points=points, task="two_point_distance", id=str(i))
        for i, points in enumerate([(near, far), (near, nearer)])
    )
    first, second = perception.predict([replace(one, queries=queries)])
    assert first.measurement.is_snapped and first.measurement.points[1] == (40.0, 30.0)
    assert first.measurement.points[0] != (1.0, 2.0) and first.depth is not None
    assert second.measurement.reason == "undrawable" and second.depth is None


@pytest.mark.parametrize("reference", REFERENCES)
def test_points_that_undistortion_cuts_away(reference, request):
    perception = request.getfixturevalue(f"{reference}_model")
    one = replace(sample(), camera=replace(CAMERA, distortion=(-0.3, 0.02, 0.0, 0.0)))
    found = perception.predict([with_points(one, (35.0, 28.0, None), (0.0, 0.0, None), (69.0, 55.0, None))])
    assert [p.measurement.reason for p in found] == ["", "cut_away", "cut_away"]


def test_one_picture_that_cannot_be_seen_does_not_end_the_others(text_model):
    """Too large for the backbone, or with intrinsics in other units: counted under a reason, beside answers."""
    wide = replace(sample(1), camera=replace(CAMERA, fx=20.0, fy=20.0), id="wide")
    wrong = replace(sample(2), camera=replace(CAMERA, fx=0.9, fy=1.2), id="wrong")
    found = text_model.predict([sample(0), wide, wrong, sample(3)])
    reasons = {p.sample_id: p.measurement.reason for p in found}
    assert reasons == {"s0": "", "wide": "too_large", "wrong": "bad_camera", "s3": ""}
    assert all((p.depth is None) == bool(p.measurement.reason) for p in found) and set(reasons.values()) <= {
        "",
        *REASONS,
    }
    with pytest.raises(NoExampleError, match="sample wide of noise: at a focal length of 64"):
        text_model.head().build(wide, text_model.backbone.codec, np.random.default_rng(0))


def test_answers_that_are_cut_off_are_not_taken(text_model):
    """A bound that ends an answer within its number would turn 24.31 m into 2 m."""
    chosen = head(prompts=DepthPrompts(digits=2), max_new_tokens=96)
    perception = model(chosen)
    chosen.max_new_tokens = 16  # as if templates were longer than the bound
    found = perception.predict([sample()], protocol="official")
    assert {p.measurement.reason for p in found} == {"truncated"}


def test_unasked_questions_do_not_cost_pictures(text_model, monkeypatch):
    """Points outside of the image between others: the picture is still encoded once."""
    one = sample(count=1)
    points = [(40.0, 30.0, None), (-5.0, 3.0, None)] * 40
    opened = []
    real = text_model.backbone.encode_images
    monkeypatch.setattr(
        text_model.backbone, "encode_images", lambda pixels, *a: opened.append(len(pixels)) or real(pixels, *a)
    )
    found = text_model.predict([with_points(one, *points)])
    assert sum(opened) == 1 and len({p.text for p in found[::2]}) == 1


def test_unknown_intrinsics_are_assumed_and_told(text_model):
    one = replace(sample(), camera=None)
    found = text_model.predict([one])[0].measurement
    assert found.camera.origin == "assumed" and found.camera.fx == pytest.approx(35 / math.tan(math.pi / 6))
    assert text_model.predict([sample()])[0].measurement.camera == CAMERA


def test_measurements_say_what_they_are(text_model):
    found = text_model.predict([sample()])[0]
    assert (found.measurement.unit, found.measurement.distance, found.measurement.task) == ("m", "ray", "depth")
    two = Query(points=(DepthPoint(20, 20), DepthPoint(40, 30)), task="two_point_distance", text="", id="0")
    fast = Query(points=(DepthPoint(20, 20),), task="speed", text="4.0", id="1")
    tall = Query(task="object_height", text="the red cube", id="2")
    answers = text_model.predict([replace(sample(), queries=(two, fast, tall))])
    assert [(p.measurement.unit, p.measurement.distance) for p in answers] == [
        ("m", "unspecified"),
        ("m/s", "unspecified"),
        ("m", "unspecified"),
    ]
    assert all(p.depth is not None for p in answers)
    with pytest.raises(ValueError, match="needs a number as its text"):
        text_model.predict([replace(sample(), queries=(replace(fast, text=" "),))])


def test_chains_say_distance_and_result():
    """Speed with the thinking part: two numbers, of which the last one is the answer."""
    chosen = head(prompts=DepthPrompts(digits=2), max_new_tokens=96)
    perception = model(chosen)
    points = (DepthPoint(40.0, 30.0, 5.0),)
    value = measure("speed", points, CAMERA, "2.0")
    one = replace(sample(), queries=(Query("2.0", points=points, task="speed", id="0", value=value),))
    example = chosen.build(one, perception.backbone.codec, np.random.default_rng(0))
    ray = 5 * float(CAMERA.stretch_of(np.array([40.0, 30.0])))
    assert supervised(example, perception.backbone.codec) == [
        f"<think> The point is around {ray:.2f} meters away from the camera, so the speed is {ray / 2:.2f} meters per second. "
        f"</think>\n\n<answer> {ray / 2:.2f} </answer>"
    ]
    found = perception.predict([one])[0]
    numbers = [word for word in found.text.split() if word[0].isdigit()]
    assert len(numbers) == 3 and numbers[1] == numbers[2] and found.depth == float(numbers[2])


def test_other_image_modes(text_model):
    grey = Image.fromarray(np.full((56, 70), 99, np.uint8))
    for image in (grey, grey.convert("P"), grey.convert("RGBA"), grey.convert("LA")):
        assert text_model.predict([replace(sample(), image=image)])[0].depth is not None


def test_reports_say_what_scores_depend_on(text_model):
    facts = text_model.head().describe("generate")
    assert "cells=2000" in facts["reference"] and "64 px" in facts["unified_focal"] and facts["distance"] == "ray"
    assert facts["answers"] == "forced start" and "free" in text_model.head().describe("official")["answers"]
    assert text_model.head().metric("generate", True) == "depth" and str(SHORT) == facts["prompts"]


def test_official_coordinates_are_those_of_the_reference():
    """floor(2000 x' / W') of the legacy pixel (specification C.4), with a canvas stretched to whole tokens behind it."""
    from mmseg_llm.backbones import QwenVLBackbone

    camera = Camera(559.62, 558.14, 361.87, 241.99)
    one = Sample(Image.new("RGB", (640, 480)), (480, 640), camera=camera, id="i")
    one = with_points(one, (519.0, 129.0, 2.417792019531548))
    chosen = head(focal=1000.0, geometry="legacy", distance="unspecified", prompts=DepthPrompts(), max_new_tokens=96)
    perception = PerceptionModel(QwenVLBackbone("qwen2_5_vl-tiny", max_pixels=2000 * 2000), {"depth": chosen})
    example = chosen.build(one, perception.backbone.codec, np.random.default_rng(0))
    text = perception.backbone.codec.decode(example.suffixes[0].ids)
    assert f"coordinates ({2000 * 927 // 1143}, {2000 * 230 // 857})" in text
    assert example.canvas.size == perception.backbone.codec.geometry.canvas_size((857, 1143))
    assert "around 2.42 meters" in text
