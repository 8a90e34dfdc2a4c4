"""Decoding: constraints, forced tokens without steps of their own, and sampled branches."""

from __future__ import annotations

import pytest
import torch

from backbones.tiny import scenes
from mmseg_llm.backbones import InternVLBackbone
from mmseg_llm.backbones.generation import Sampling
from mmseg_llm.heads import ClickPolicyHead
from mmseg_llm.model import PerceptionModel


class Trie:
    """Answers that are listed."""

    def __init__(self, *answers: tuple[int, ...]) -> None:
        self.answers = answers

    def allowed(self, ids):
        count = len(ids)
        return sorted(
            {answer[count] for answer in self.answers if answer[:count] == tuple(ids) and len(answer) > count}
        )


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return PerceptionModel(InternVLBackbone("internvl-tiny"), {"click_policy": ClickPolicyHead()}).eval().backbone


def open_prefix(backbone, count=2):
    pixels = torch.stack([torch.from_numpy(backbone.codec.pixels(canvas(s, backbone))) for s in scenes(0, 3)[:count]])
    return backbone.prefill(backbone.encode_images(pixels), [backbone.codec.image_prefix()] * count)


def canvas(sample, backbone):
    from mmseg_llm.geometry import stretch

    return stretch(sample.load_image(), backbone.codec.geometry.image_size)


class Counted:
    """Counts the passes of the language model."""

    def __init__(self, backbone, monkeypatch):
        self.passes = 0
        run = backbone.extend

        def extend(*args, **kwargs):
            self.passes += 1
            return run(*args, **kwargs)

        monkeypatch.setattr(backbone, "extend", extend)


@torch.no_grad()
def naive(backbone, prompt, answers):
    """The best listed answer, token by token, every state computed anew."""
    ids, states = [], []
    while True:
        prefix = open_prefix(backbone, 1)
        block = torch.full((1, len(prompt) + len(ids)), prefix.open_branches(1))
        state = backbone.extend(prefix, block, ids=torch.tensor([[*prompt, *ids]]))[0, -1]
        allowed = Trie(*answers).allowed(ids)
        states.append(state)
        ids.append(max(allowed, key=lambda token: float(backbone.logits(state)[token])))
        if ids[-1] == backbone.codec.end_id:
            return ids, torch.stack(states)


def test_forced_tokens_cost_no_pass_and_change_nothing(backbone, monkeypatch):
    end = backbone.codec.end_id
    answers = [(7, 8, 9, 10, 20, 11, 12, end), (7, 8, 9, 10, 21, 11, 13, end), (7, 8, 9, 10, 22, end)]
    prefix, prompt = open_prefix(backbone), (5, 6)
    counted = Counted(backbone, monkeypatch)
    found = backbone.generate(
        prefix, [[prompt], [prompt, (5,)]], max_new_tokens=20, constraints=[[Trie(*answers)], [Trie(*answers)] * 2]
    )
    passes = counted.passes
    ids, states = naive(backbone, prompt, answers)
    assert found.ids[0][0] == ids and all(tuple(row) in answers for rows in found.ids for row in rows)
    assert torch.allclose(found.states[0][0], states, atol=1e-5)
    # the prompt, then one pass per decision: the fifth token, of which one leads on
    assert passes == 3
    assert prefix.length == prefix.cache.get_seq_length() == len(backbone.codec.image_prefix())


def test_kept_forced_branches_lie_where_they_say(backbone):
    end = backbone.codec.end_id
    answers = [(7, 8, 9, end), (7, 8, 10, 11, end)]
    prefix = open_prefix(backbone)
    start = prefix.length
    found = backbone.generate(
        prefix,
        [[(5, 6)], [(5, 6), (5,)]],
        max_new_tokens=9,
        constraints=[[Trie(*answers)], [Trie(*answers)] * 2],
        keep=True,
    )
    for row, branches in enumerate(found.ids):
        for branch, ids in enumerate(branches):
            places = found.places[row][branch]
            assert len(places) == len(ids) == len(found.states[row][branch])
            assert places[-1] == -1 and all(place >= start for place in places[:-1])
            assert all(prefix.visibility.block[row, place] == found.first + branch for place in places[:-1])


def test_a_bound_cuts_forced_runs(backbone):
    found = backbone.generate(
        open_prefix(backbone, 1), [[(5,)]], max_new_tokens=3, constraints=[[Trie((7, 8, 9, 10, 11))]]
    )
    assert found.ids == [[[7, 8, 9]]]


def test_what_a_branch_draws_does_not_depend_on_its_company(backbone):
    def draw(prompts, seeds, sampling=Sampling(temperature=2.0)):
        return backbone.generate(
            open_prefix(backbone, len(prompts)), prompts, max_new_tokens=6, seeds=seeds, sampling=sampling
        ).ids

    alone = draw([[(5, 6)]], [[3]])[0][0]
    together = draw([[(5, 6), (5, 6), (5, 6)], [(5, 6)]], [[None, 3, 4], [3]])
    greedy = backbone.generate(open_prefix(backbone, 1), [[(5, 6)]], max_new_tokens=6).ids[0][0]
    assert together[0] == [greedy, alone, together[0][2]]
    assert together[0][2] != alone != greedy
    nearly_greedy = draw([[(5, 6)]], [[3]], Sampling(temperature=1e-4))[0][0]
    assert nearly_greedy == greedy == draw([[(5, 6)]], [[3]], Sampling(temperature=9.0, top_p=1e-6))[0][0]


def test_draws_follow_the_softmax(backbone):
    """400 draws of one token among three, against its probability."""
    prompt = (5, 6)
    prefix = open_prefix(backbone, 1)
    plain = backbone.generate(prefix, [[prompt]], max_new_tokens=1)
    logits = backbone.logits(plain.states[0][0])[0]
    choices = logits.topk(3).indices.tolist()
    chances = (logits[choices] / 1.5).softmax(-1)
    trie = Trie(*[(choice,) for choice in choices])
    found = backbone.generate(
        *(prefix, [[prompt] * 400]),
        max_new_tokens=1, constraints=[[trie] * 400], seeds=[list(range(400))], sampling=Sampling(temperature=1.5),
    )  # fmt: skip
    counts = [sum(ids == [choice] for ids in found.ids[0]) for choice in choices]
    for count, chance in zip(counts, chances.tolist()):
        assert abs(count / 400 - chance) < 4 * (chance * (1 - chance) / 400) ** 0.5


@pytest.mark.parametrize(("settings", "message"), [({"temperature": 0}, "above 0"), ({"top_p": 1.5}, "lie in")])
def test_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)
