"""Searches of scripted policies (SegAgent specification section 15, item 17)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from heads.click_policy.scripted import SIZE, Backbone, Script, answer, disk, sample

from mmseg_llm.clicks import Click
from mmseg_llm.heads import ClickPolicyHead
from mmseg_llm.heads.click_policy import search
from mmseg_llm.heads.click_policy.search import Search
from mmseg_llm.masks import Mask
from mmseg_llm.segmenters.fakes import DisksEnvironment

TARGET = disk(20, 30, 8)
GOOD, BAD = (20, 30), (8, 8)


class Counted(DisksEnvironment):
    """Counts clicks."""

    clicks = 0

    def advance(self, states, clicks):
        self.clicks += len(clicks)
        return super().advance(states, clicks)


def make_head(**fields):
    return ClickPolicyHead(environment=Counted(8, 4), max_clicks=3, search=Search(**fields))


def honest(view):
    union = (view.mask | TARGET).sum()
    return float((view.mask & TARGET).sum() / union)


def misled(view, seed):
    """Its greedy click is wrong, one of two drawn ones is right; it knows a good mask when it sees one."""
    place = BAD if seed is None else GOOD if seed % 2 else (30, 50)
    return answer(*place, iou=honest(view))


def test_three_candidates_find_what_one_misses(monkeypatch):
    Script(monkeypatch, misled)
    alone = make_head(candidates=1).predict(Backbone, [sample(TARGET)], "search")[0]
    tried = make_head(candidates=8).predict(Backbone, [sample(TARGET)], "search")[0]
    assert alone.mask.iou(Mask.from_array(TARGET)) == 0
    assert tried.mask == Mask.from_array(TARGET) and tried.score == 1.0
    assert tried.trajectory[1].click == Click(*GOOD, True)


def test_rejected_branches_leave_no_clicks(monkeypatch):
    Script(monkeypatch, misled)
    found = make_head(candidates=4, patience=None).predict(Backbone, [sample(TARGET)], "search")[0]
    replay = DisksEnvironment(8, 4)
    shown = replay.reset(sample(TARGET).load_image())
    for step in found.trajectory[1:]:
        shown = replay.step(step.click)
        assert Mask.from_array(shown.mask) == step.mask
    assert len(found.trajectory) == 4  # patience None goes on to the bound


def test_the_best_mask_is_returned_and_the_last_one_is_rated(monkeypatch):
    Script(monkeypatch, lambda view, seed: answer(*(GOOD if not view.mask.any() else BAD), iou=honest(view)))
    found = make_head(candidates=1, patience=None).predict(Backbone, [sample(TARGET)], "search")[0]
    estimates = [step.estimate for step in found.trajectory]
    assert estimates[:2] == [0.0, 1.0] and estimates[2] < 1 and estimates[-1] is not None
    assert found.mask == Mask.from_array(TARGET)


def test_stop_rules(monkeypatch):
    Script(monkeypatch, lambda view, seed: answer(*(GOOD if not view.mask.any() else BAD), iou=honest(view)))

    def play(**fields):
        found = make_head(candidates=1, **fields).predict(Backbone, [sample(TARGET)], "search")[0]
        return found.stop, len(found.trajectory) - 1

    assert play(patience=None) == ("max_clicks", 3)
    assert play(patience=1) == ("converged", 2)
    assert play(patience=None, good_enough=0.95) == ("good_enough", 1)
    assert play(patience=1, min_gain=0.999) == ("converged", 2)


def test_equal_candidates_are_clicked_once(monkeypatch):
    Script(monkeypatch, lambda view, seed: answer(*GOOD, iou=honest(view)))
    head = make_head(candidates=5, patience=None)
    head.predict(Backbone, [sample(TARGET)], "search")
    assert head.environment.clicks == 3


def test_one_candidate_clicks_like_the_greedy_policy(monkeypatch):
    rng = np.random.default_rng(0)
    places = rng.integers(0, 40, (200, 2)).tolist()
    Script(monkeypatch, lambda view, seed: answer(*places[int(view.mask.sum()) % 200], iou=honest(view)))
    head = make_head(candidates=1, patience=None)
    greedy = head.predict(Backbone, [sample(TARGET)], "reward_selected")[0]
    searched = head.predict(Backbone, [sample(TARGET)], "search")[0]
    assert [s.click for s in greedy.trajectory] == [s.click for s in searched.trajectory]
    assert greedy.mask == searched.mask


def test_beams_keep_what_looks_worse_at_first(monkeypatch):
    """The click that leads to the object looks worse than another at first."""
    first, second = Click(20, 24, True), Click(30, 50, True)

    def say(view, seed):
        has_first, has_second = view.mask[20, 24], view.mask[30, 50]
        if has_first:
            return answer(20, 34, iou=0.9 if view.mask[20, 34] else 0.3)
        if has_second:
            return answer(30, 50, iou=0.5)
        click = first if seed is None or seed % 2 else second
        return answer(click.row, click.col, iou=0.1)

    Script(monkeypatch, say)
    one = make_head(candidates=6, beams=1, patience=None).predict(Backbone, [sample(TARGET)], "search")[0]
    two = make_head(candidates=6, beams=2, patience=None).predict(Backbone, [sample(TARGET)], "search")[0]
    assert one.score == 0.5 and two.score == 0.9
    assert [step.click for step in two.trajectory][:3] == [None, first, Click(20, 34, True)]


def test_finish_competes_with_further_clicks(monkeypatch):
    def say(view, seed):
        if not view.mask.any():
            return answer(*GOOD, iou=0.0)
        return "Current IOU: 90, Finish" if seed is None else answer(*BAD, iou=0.2 if view.mask[BAD] else 0.9)

    Script(monkeypatch, say)
    found = make_head(candidates=2, patience=None).predict(Backbone, [sample(TARGET)], "search")[0]
    assert found.stop == "finish" and found.mask == Mask.from_array(TARGET) and len(found.trajectory) == 2


def test_nothing_usable_ends_the_tree(monkeypatch):
    Script(monkeypatch, lambda view, seed: "Current IOU: 10, what?")
    found = make_head(candidates=3).predict(Backbone, [sample(TARGET)], "search")[0]
    assert found.stop == "malformed" and found.mask.area == 0 and found.trajectory[0].estimate == 0.1


def test_batch_equals_single(monkeypatch):
    targets = [disk(20, 30, 8), disk(10, 12, 6), disk(30, 50, 5)]

    def say(view, seed):
        rng = np.random.default_rng([0 if seed is None else seed, int(view.mask.sum()), int(view.expression[-1])])
        return answer(int(rng.integers(0, SIZE[0])), int(rng.integers(0, SIZE[1])), iou=float(rng.random()))

    Script(monkeypatch, say)
    together = make_head(candidates=3, beams=2).predict(Backbone, [sample(*targets), sample(targets[2])], "search")
    for i in range(3):
        one = sample(*targets)
        (alone,) = make_head(candidates=3, beams=2).predict(
            Backbone, [replace(one, queries=(one.queries[i],))], "search"
        )
        assert alone == together[i]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"candidates": 0}, "candidates is 0"),
        ({"beams": 0}, "beams is 0"),
        ({"patience": 0}, "patience is 0"),
        ({"min_gain": -1}, "min_gain is -1"),
        ({"good_enough": 80}, "good_enough is 80"),
        ({"temperature": 0}, "temperature is 0"),
    ],
)
def test_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        Search(**fields)


def test_resampling_when_no_candidate_can_be_used(monkeypatch):
    Script(
        monkeypatch,
        lambda view, seed: f"Current IOU: {100 * honest(view):.0f}, what?" if seed is None else answer(*GOOD),
    )
    head = make_head(candidates=1)
    assert head.predict(Backbone, [sample(TARGET)], "search")[0].stop == "malformed"
    head.on_failure = "resample"
    assert head.predict(Backbone, [sample(TARGET)], "search")[0].mask == Mask.from_array(TARGET)
    head.on_failure = "abort"
    found = head.predict(Backbone, [sample(TARGET)], "search")[0]
    assert found.stop == "aborted" and found.mask.area == 0


def test_a_start_that_is_good_enough_is_left_alone(monkeypatch):
    Script(monkeypatch, lambda view, seed: answer(*BAD, iou=0.99))
    head = make_head(candidates=1, good_enough=0.9)
    found = head.predict(Backbone, [sample(TARGET, start=Mask.from_array(TARGET))], "search")[0]
    assert found.stop == "good_enough" and len(found.trajectory) == 1 and found.mask == Mask.from_array(TARGET)


def test_no_more_pictures_are_kept_than_are_looked_at_together(monkeypatch):
    script = Script(monkeypatch, misled)
    alive = []
    show = script.show

    def counted(head, backbone, views):
        alive.append(len(views))
        return show(head, backbone, views)

    monkeypatch.setattr(search, "show", counted)
    head = make_head(candidates=3, patience=None)
    targets = [disk(10 + i, 20 + i, 6) for i in range(12)]
    whole = head.predict(Backbone, [sample(*targets)], "search")
    head.batch_size = 6
    alive.clear()
    parts = head.predict(Backbone, [sample(*targets)], "search")
    assert parts == whole and max(alive) <= 6


def test_estimates_are_counted_as_such(monkeypatch):
    Script(monkeypatch, lambda view, seed: answer(*GOOD, iou=honest(view)))
    found = make_head(candidates=1, patience=None).predict(Backbone, [sample(TARGET)], "search")[0]
    assert [step.status for step in found.trajectory] == ["ok", "ok", "ok", "estimate"]
