"""Episodes of scripted policies: what is clicked, shown, counted, and why an episode ends."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from heads.click_policy.scripted import SIZE, Backbone, Script, answer, disk, sample
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmseg_llm.clicks import Click
from mmseg_llm.heads import ClickPolicyHead
from mmseg_llm.masks import Mask
from mmseg_llm.segmenters.fakes import DisksEnvironment
from mmseg_llm.structures import Prediction

TARGET = disk(20, 30, 8)


def make_head(**fields):
    return ClickPolicyHead(**{"environment": DisksEnvironment(8, 4), "max_clicks": 4, **fields})


def test_a_click_becomes_a_mask_and_finish_ends(monkeypatch):
    Script(monkeypatch, lambda view, seed: "Current IOU: 97, Finish" if view.mask.any() else answer(20, 30, iou=0.0))
    (found,) = make_head().predict(Backbone, [sample(TARGET)])
    assert found.mask == Mask.from_array(TARGET) and found.stop == "finish" and found.exists
    assert [step.click for step in found.trajectory] == [None, Click(20, 30, True)]
    assert [step.estimate for step in found.trajectory] == [0.0, 0.97] and found.score == 0.97
    assert [step.status for step in found.trajectory] == ["ok", "finish"]
    assert Prediction.from_json(found.to_json()).trajectory == found.trajectory


def test_the_last_mask_is_rated_and_the_clicks_are_bounded(monkeypatch):
    script = Script(monkeypatch, lambda view, seed: answer(5 + int(view.mask.sum()) % 30, 30, iou=0.4))
    (found,) = make_head(max_clicks=3).predict(Backbone, [sample(TARGET)])
    assert len(found.trajectory) == 4 and found.stop == "max_clicks" and script.shown == 4
    assert found.trajectory[-1].estimate == 0.4
    (found,) = make_head(max_clicks=3).predict(Backbone, [sample(TARGET)], protocol="official")
    assert len(found.trajectory) == 4 and script.shown == 7 and found.trajectory[-1].text == ""


def test_selection_last_reward_and_best(monkeypatch):
    ious = {0: 0.0, 1: 0.9, 2: 0.3}
    places = [(20, 20), (20, 30), (5, 55)]

    def say(view, seed):
        count = sum(bool(view.mask[place]) for place in places)
        return answer(*places[min(count, 2)], iou=ious.get(count, 0.6))

    Script(monkeypatch, say)
    head = make_head(max_clicks=3)
    masks = [p.mask for p in head.predict(Backbone, [sample(TARGET)])[0].trajectory]
    truth = [mask.iou(Mask.from_array(TARGET)) for mask in masks]
    assert len(masks) == 4 and max(truth) not in (truth[1], truth[3])
    chosen = {protocol: head.predict(Backbone, [sample(TARGET)], protocol)[0].mask for protocol in head.protocols}
    assert chosen["generate"] == chosen["official"] == masks[3]
    assert chosen["reward_selected"] == chosen["search"] == masks[1]
    assert chosen["oracle_best"] == masks[int(np.argmax(truth))] == masks[2]


def test_a_repeated_click_without_effect_ends_the_episode(monkeypatch):
    Script(monkeypatch, lambda view, seed: answer(20, 30, iou=0.2))
    (found,) = make_head(max_clicks=9).predict(Backbone, [sample(TARGET)])
    assert found.stop == "stuck" and len(found.trajectory) == 3


@pytest.mark.parametrize(
    ("text", "ending"),
    [
        ("", "no_action"),
        ("Current IOU: 40", "no_action"),
        ("I would click on the dog.", "malformed"),
        ("Positive point: (1005, 200)", "out_of_range"),
        ("Positive point: (-3, 200)", "out_of_range"),
        ("Positive point: (10, 20) Negative point: (1, 2)", "malformed"),
        ("Finish", "finish"),
    ],
)
def test_answers_without_a_click_end_under_their_name(monkeypatch, text, ending):
    Script(monkeypatch, lambda view, seed: text)
    (found,) = make_head(constrained=False).predict(Backbone, [sample(TARGET)])
    assert found.stop == ending and not found.exists and found.mask.area == 0 and len(found.trajectory) == 1


def test_failure_policies(monkeypatch):
    def say(view, seed):
        if seed is not None:
            return answer(20, 30) if seed % 2 else "nonsense"
        return answer(20, 30) if not view.mask.any() else "Positive point: (1004, 500)" if view.mask[20, 30] else "?"

    Script(monkeypatch, say)
    stop = make_head(on_failure="stop").predict(Backbone, [sample(TARGET)])[0]
    assert (stop.stop, len(stop.trajectory), stop.mask.area > 0) == ("out_of_range", 2, True)
    abort = make_head(on_failure="abort").predict(Backbone, [sample(TARGET)])[0]
    assert (abort.stop, len(abort.trajectory), abort.mask.area, abort.exists) == ("aborted", 2, 0, False)
    clamp = make_head(on_failure="clamp", max_clicks=2).predict(Backbone, [sample(TARGET)])[0]
    assert clamp.trajectory[-1].click == Click(SIZE[0] - 1, 30, True)
    resample = make_head(on_failure="resample", resamples=8).predict(Backbone, [sample(TARGET)])[0]
    assert resample.trajectory[-1].click == Click(20, 30, True) and resample.stop in ("stuck", "max_clicks")


def test_clamp_refuses_a_large_overshoot(monkeypatch):
    Script(monkeypatch, lambda view, seed: "Positive point: (1200, 500)")
    assert make_head(on_failure="clamp").predict(Backbone, [sample(TARGET)])[0].stop == "out_of_range"


def test_official_reads_as_the_released_code(monkeypatch):
    """Decimals fail there, a wrong first parenthesis counts, and what lies outside is taken (and moved inside here)."""
    texts = {"generate": "Positive point: (1300, 500)", "official": "Positive point: (1300, 500)"}
    Script(monkeypatch, lambda view, seed: texts["official"])
    head = make_head(max_clicks=1)
    assert head.predict(Backbone, [sample(TARGET)], "official")[0].trajectory[1].click == Click(39, 30, True)
    assert head.predict(Backbone, [sample(TARGET)], "generate")[0].stop == "out_of_range"
    texts["official"] = "Positive point: (0.5, 0.2)"
    assert head.predict(Backbone, [sample(TARGET)], "official")[0].stop == "malformed"


def test_episodes_go_on_from_a_given_mask(monkeypatch):
    start = Mask.from_array(disk(20, 30, 5))
    Script(monkeypatch, lambda view, seed: answer(20, 36, iou=0.3) if view.mask.sum() == start.area else "Finish")
    (found,) = make_head().predict(Backbone, [sample(TARGET, start=start)])
    assert found.trajectory[0].mask == start and found.trajectory[0].click is None
    assert found.mask == Mask.from_array(disk(20, 30, 5) | disk(20, 36, 8))
    with pytest.raises(ValueError, match=r"object 0.*starts from a mask of size \(4, 5\).*resize"):
        make_head().predict(Backbone, [sample(TARGET, start=Mask.empty((4, 5)))])


def test_batch_equals_single_and_equal_pictures_are_seen_by_the_same_step(monkeypatch):
    targets = [disk(20, 30, 8), disk(10, 12, 6), disk(30, 50, 5)]

    def say(view, seed):
        row, col = [(20, 30), (10, 12), (30, 50)][int(view.expression[-1])]
        return answer(row, col, iou=0.8) if not view.mask.any() else "Current IOU: 90, Finish"

    Script(monkeypatch, say)
    samples = [sample(*targets), sample(targets[1], size=SIZE)]
    together = make_head().predict(Backbone, samples)
    alone = [p for one in samples for p in make_head(batch_size=1).predict(Backbone, [one])]
    assert together == alone and len(together) == 4


def test_needs_an_environment_and_estimates():
    with pytest.raises(ValueError, match=r"nothing to click on.*--environment"):
        ClickPolicyHead().predict(Backbone, [sample(TARGET)])
    with pytest.raises(ValueError, match=r"'search' needs a policy that estimates"):
        make_head(with_iou=False).predict(Backbone, [sample(TARGET)], "search")
    with pytest.raises(ValueError, match="cannot rate masks"):
        make_head(with_iou=False).rate(Backbone, [sample(TARGET)])
    assert make_head().predict(Backbone, []) == []


PIECES = st.sampled_from(
    ["Positive point: (", "Negative point", "Current IOU: ", "Finish", "<ref>", "</ref>", "<box>(1,2),(3,4)</box>", ")", "(",
     ", ", "\n", "12", "-7", "999", "1e309", "٣", "0.5", "%", "<|im_end|>", "positive POINT:(3,4)", "inf", "nan", " "]
)  # fmt: skip


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(PIECES, max_size=7).map("".join) | st.text(max_size=30), min_size=50, max_size=50))
def test_ten_thousand_fuzzed_answers_raise_nothing(texts):
    """200 batches of 50 episodes, under every policy for failures; each ends with a known name."""
    with pytest.MonkeyPatch.context() as patch:
        left = iter(texts * 40)
        Script(patch, lambda view, seed: next(left))
        for policy in ("stop", "clamp", "abort", "resample"):
            head = make_head(on_failure=policy, max_clicks=2, resamples=1)
            found = head.predict(Backbone, [sample(*[TARGET] * 50)])
            known = {"finish", "max_clicks", "stuck", "no_action", "malformed", "out_of_range", "aborted"}
            assert len(found) == 50 and set(Counter(p.stop for p in found)) <= known


def test_what_is_said_about_the_last_mask_ends_nothing(monkeypatch):
    """It is asked for its estimate only: neither a failure nor a finish can be heard there."""
    places = iter([(20, 30), (20, 34)] * 3)
    Script(monkeypatch, lambda view, seed: answer(*next(places)) if view.mask.sum() < 250 else "Current IOU: 90, hm")
    for policy in ("stop", "abort", "resample"):
        (found,) = make_head(max_clicks=2, on_failure=policy).predict(Backbone, [sample(TARGET)])
        assert (found.stop, found.mask.area > 0, found.trajectory[-1].estimate) == ("max_clicks", True, 0.9)
        assert found.trajectory[-1].status == "estimate"


class Creeping(DisksEnvironment):
    """Becomes surer with each click, and shows a mask only when it is sure."""

    def _add(self, maps, squares, click):
        return (np.minimum(1, maps[0] + np.float32(0.2) * (squares <= 64)).astype(np.float32),)


def test_a_segmenter_that_moves_below_its_threshold_is_not_stuck(monkeypatch):
    Script(monkeypatch, lambda view, seed: answer(20, 30) if not view.mask.any() else "Finish")
    head = make_head(environment=Creeping(8, 4), max_clicks=5)
    (found,) = head.predict(Backbone, [sample(TARGET)])
    assert found.mask == Mask.from_array(TARGET) and found.stop == "finish" and len(found.trajectory) == 4


def test_official_is_never_stuck_and_others_do_not_count_an_answer_twice(monkeypatch):
    script = Script(monkeypatch, lambda view, seed: answer(20, 30, iou=0.2))
    (found,) = make_head(max_clicks=6).predict(Backbone, [sample(TARGET)], "official")
    assert found.stop == "max_clicks" and len(found.trajectory) == 7
    script.asked = 0
    (found,) = make_head(max_clicks=6).predict(Backbone, [sample(TARGET)])
    assert found.stop == "stuck" and script.asked == len(found.trajectory) == 3


def test_a_given_mask_is_what_is_seen_and_answered(monkeypatch):
    """Whatever the segmenter makes of it: SimpleClick only comes near."""

    class Near(DisksEnvironment):
        def begin(self, images, masks=None):
            return super().begin(images, [None if m is None else m & (np.arange(60) < 30) for m in masks])

    seen = []
    Script(monkeypatch, lambda view, seed: seen.append(view.mask.copy()) or "Current IOU: 99, Finish")
    start = Mask.from_array(TARGET)
    (found,) = make_head(environment=Near(8, 4)).predict(Backbone, [sample(TARGET, start=start)])
    assert found.mask == start and np.array_equal(seen[0], TARGET)


def test_what_is_drawn_depends_on_the_picture_and_not_on_its_name(monkeypatch):
    Script(monkeypatch, lambda view, seed: "?" if seed is None else answer(seed % 40, seed % 60))
    head = make_head(on_failure="resample", resamples=1, max_clicks=1)
    one = sample(TARGET)
    first, second = head.predict(Backbone, [one, replace(one, id="another")])
    assert first.trajectory[1].click == second.trajectory[1].click
    other = replace(one, image=one.load_image().point(lambda v: v + 1))
    assert head.predict(Backbone, [other])[0].trajectory[1].click != first.trajectory[1].click


def test_oracle_best_does_not_count_ignored_pixels(monkeypatch):
    ignored = Mask.from_array(np.arange(60)[None].repeat(40, 0) >= 39)
    places = [(20, 30), (20, 47)]
    Script(monkeypatch, lambda view, seed: answer(*places[int(view.mask.any())], iou=0.5))
    wide = disk(20, 30, 8) | disk(20, 47, 8) & (np.arange(60) < 41)
    (plain,) = make_head(max_clicks=2).predict(Backbone, [sample(wide)], "oracle_best")
    (kept,) = make_head(max_clicks=2).predict(Backbone, [sample(wide, ignore=ignored)], "oracle_best")
    assert plain.mask == plain.trajectory[1].mask and kept.mask == kept.trajectory[1].mask


def test_data_workers_get_neither_segmenter_nor_grammar():
    head = make_head()
    head.environment.lock = (_ for _ in ())  # nothing can pickle a generator
    light = pickle.loads(pickle.dumps(head.for_workers()))
    assert light.environment is None and light.codec == head.codec and head.environment is not None


def test_the_protocol_says_what_scores_depend_on():
    head = make_head(max_clicks=9, on_failure="clamp")
    facts = head.describe("generate")
    assert facts["max_clicks"] == 9 and facts["environment"] == "DisksEnvironment(positive_radius=8, negative_radius=4)"
    assert "clamp" in facts["answers"] and "constrained=True" in facts["answers"] and "scale=1000" in facts["codec"]
    assert "constrained=False" in head.describe("official")["answers"]
    assert "candidates=1" in head.describe("search")["search"] and "search" not in facts
