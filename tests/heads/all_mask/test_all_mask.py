"""The all-mask head: what it builds, what it learns, and that every way of running it gives the same masks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from backbones.tiny import scenes
from PIL import Image

from mmseg_llm.backbones.codec import IGNORE_INDEX
from mmseg_llm.backbones.collate import collate
from mmseg_llm.backbones.features import gather
from mmseg_llm.backbones.internvl import InternVLBackbone
from mmseg_llm.backbones.qwen_vl import QwenVLBackbone
from mmseg_llm.heads.all_mask.grid import MaskGrid
from mmseg_llm.heads.all_mask.head import AllMaskHead
from mmseg_llm.heads.all_mask.labels import cell_labels
from mmseg_llm.heads.all_mask.prompts import NO, SEG, Prompts, fill, split_triggers
from mmseg_llm.masks import Mask
from mmseg_llm.model import PerceptionModel
from mmseg_llm.structures import Query, Sample

SHORT = Prompts(questions=("Segment {x}.", "Where is {x}?"), answers=("Here:",), stub="Here:")


def make_model(backbone=None, **settings) -> PerceptionModel:
    """An untrained model whose masks are not trivial and which says `<|seg|>` often."""
    torch.manual_seed(0)
    backbone = backbone or InternVLBackbone("internvl-tiny", template="plain")
    model = PerceptionModel(backbone, {"all_mask": AllMaskHead(prompts=SHORT, **({"max_new_tokens": 6} | settings))})
    model.eval()
    head, batch = model.head(), batch_of(model, scenes(0, 1))
    with torch.no_grad():  # the trigger gets a good share of what answers are made of, masks get both kinds of cells
        states = model.backbone(batch).states
        centre = states.mean((0, 1))
        model.backbone.lm_head.weight[head.seg_id] = 1.2 * centre / centre.norm()
        cells = gather(states, batch.dense_positions)  # their largest differences are what the classifier looks at
        spread = torch.pca_lowrank((cells - cells.mean(1, keepdim=True)).flatten(0, 1), 4, center=False)[2]  # (D, 4)
        head.classifier.weight.copy_(torch.randn(len(head.classifier.weight), 4) @ spread.T)
        head.classifier.bias.copy_(-head.classifier(cells).mean((0, 1)) + head.classifier.bias)
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


def batch_of(model, samples, seed=0):
    head, codec = model.head(), model.backbone.codec
    rng = np.random.default_rng(seed)
    return collate([head.build(sample, codec, rng) for sample in samples], codec, head.label_padding)


def same(first, second, tolerance=0.0) -> bool:
    assert len(first) == len(second)
    return all(
        a.text == b.text and a.exists == b.exists and a.mask.iou(b.mask) >= 1 - tolerance for a, b in zip(first, second)
    )


# ---- building -----------------------------------------------------------------------------------------------------------


def test_build(model):
    sample = scenes(0)[0]
    head, codec = model.head(), model.backbone.codec
    example = head.build(sample, codec, np.random.default_rng(0))
    assert len(example.suffixes) == len(sample.queries) == len(example.targets)
    for suffix, query, target in zip(example.suffixes, sample.queries, example.targets):
        assert suffix.ids[suffix.slots[0]] == head.seg_id and suffix.dense_slots == (0,)
        assert suffix.dense.token_id == head.mask_id and suffix.dense.length == 36
        supervised = [label for label in suffix.labels if label != IGNORE_INDEX]
        assert supervised == [*codec.encode("Here: ", SEG), codec.end_id]
        text = codec.decode(suffix.ids)
        assert query.text in text and ("Segment" in text or "Where is" in text)
        expected = cell_labels(query.target(sample.size), example.canvas, (6, 6), "area")
        assert np.array_equal(target, expected)


def test_collate_hangs_the_blocks_off_their_triggers(model):
    """What each mask token sees: the image, its branch up to its trigger, its block; and nobody sees mask tokens."""
    batch = batch_of(model, scenes(0, 1))
    allowed = batch.visibility.allowed()
    is_dense = torch.zeros_like(batch.ids, dtype=torch.bool).scatter_(1, batch.dense_positions.clamp(min=0), True)
    prefix = len(model.backbone.codec.image_prefix())
    for row, slot, start in zip(batch.slot_rows, batch.slot_positions, batch.dense_starts):
        block = batch.dense_positions[row, start : start + 36]
        begin = int(slot) - (batch.positions[0, row, slot] - prefix)  # where its branch starts
        expected = torch.zeros(batch.ids.shape[1], dtype=torch.bool)
        expected[:prefix] = True
        expected[begin : slot + 1] = True
        expected[block] = True
        assert (allowed[row, block] == expected).all()
        assert (batch.positions[0, row, block] == batch.positions[0, row, slot] + 1 + torch.arange(36)).all()
        others = ~is_dense[row] & (batch.visibility.block[row] >= 0)
        assert not allowed[row][others][:, block].any()
    assert (batch.labels[is_dense] == IGNORE_INDEX).all()


def test_no_target_is_an_empty_mask_or_an_answer():
    sample = scenes(7)[0]
    lost = next(i for i, query in enumerate(sample.queries) if query.is_no_target)
    by_mask, by_answer = make_model(), make_model(no_target="answer")
    for model in (by_mask, by_answer):
        example = model.head().build(sample, model.backbone.codec, np.random.default_rng(0))
        suffix, target = example.suffixes[lost], example.targets[lost]
        if model is by_mask:
            assert suffix.ids[suffix.slots[0]] == model.head().seg_id and not target.any()
        else:
            assert suffix.ids[suffix.slots[0]] == model.head().no_id
            assert target is None and suffix.dense is None and suffix.dense_slots == ()
    losses = by_answer.loss(batch_of(by_answer, [replace(sample, queries=(sample.queries[lost],))]))
    assert float(losses["bce"].detach()) == float(losses["dice"].detach()) == 0
    losses["dice"].backward()  # the classifier takes part in the graph all the same
    assert by_answer.head().classifier.weight.grad is not None


def test_a_refusal_is_an_explicit_answer():
    model = make_model(no_target="answer")
    head, sample = model.head(), scenes(0)[0]
    with torch.no_grad():  # a language model that says "<|no|>" at once
        model.backbone.lm_head.weight.zero_()
        states = model.backbone(batch_of(model, [sample])).states
        model.backbone.lm_head.weight[head.no_id] = states.mean((0, 1))
    predictions = model.predict([sample])
    assert all(p.text == str(NO) and not p.exists and p.mask.area == 0 and p.mask_logits is None for p in predictions)


def test_dialogue_with_masks(model):
    """A free-form answer: its triggers are its masks, in order; earlier turns are in the branch, unsupervised."""
    sample = scenes(0)[0]
    masks = tuple(query.target(sample.size) for query in sample.queries[:2])
    chat = Query(
        text="And now?",
        task="chat",
        answer="A <|seg|> and b <|seg|>.",
        masks=masks,
        history=(("What is there?", "A thing <|seg|>."),),
    )
    head, codec = model.head(), model.backbone.codec
    example = head.build(replace(sample, queries=(chat,)), codec, np.random.default_rng(0))
    (suffix,) = example.suffixes
    assert suffix.ids.count(head.seg_id) == 3 and len(suffix.slots) == 2  # the trigger of the history has no mask here
    assert suffix.dense_slots == (0, 1) and suffix.query_ids == (0, 0)
    supervised = [label for label in suffix.labels if label != IGNORE_INDEX]
    assert supervised == [*codec.encode("A ", SEG, " and b ", SEG, "."), codec.end_id]
    assert [target.sum() for target in example.targets] == [
        cell_labels(mask, example.canvas, (6, 6), "area").sum() for mask in masks
    ]
    losses = model.loss(collate([example], codec))
    assert all(torch.isfinite(value) for value in losses.values())


def test_dialogue_without_masks_trains_the_language_model_only(model):
    chat = Query(text="What is this?", task="chat", answer="A scene.", id="1")
    example = model.head().build(replace(scenes(0)[0], queries=(chat,)), model.backbone.codec, np.random.default_rng(0))
    losses = model.loss(collate([example], model.backbone.codec))
    assert float(losses["bce"].detach()) == 0 and float(losses["ce"].detach()) > 0 and "_seg_accuracy" not in losses


@pytest.mark.parametrize("answer, count", [("no trigger", 1), ("one <|seg|>", 2), ("two <|seg|><|seg|>", 1)])
def test_trigger_count_must_equal_mask_count(model, answer, count):
    sample = scenes(0)[0]
    masks = (sample.queries[0].target(sample.size),) * count
    query = Query(text="x", task="chat", answer=answer, masks=masks, id="q7")
    with pytest.raises(
        ValueError, match=rf"query q7 .* holds \d times <\|seg\|> but {count} masks .* one trigger per mask"
    ):
        model.head().build(replace(sample, queries=(query,)), model.backbone.codec, np.random.default_rng(0))


def test_sizes_that_do_not_fit_the_grid():
    model = make_model(QwenVLBackbone("qwen2_vl-tiny", min_pixels=96 * 96, max_pixels=128 * 128))
    head, codec = model.head(), model.backbone.codec
    query = (Query("x", masks=()),)

    def sample(height, width):
        return Sample(Image.new("RGB", (width, height)), (height, width), query, id="s3")

    with pytest.raises(ValueError, match=r"image s3 of 5 x 6 pixels .* too small .* 8 x 9 cells; enlarge the image"):
        head.build(sample(5, 6), codec, np.random.default_rng(0))
    codec.context = 100
    with pytest.raises(ValueError, match=r"s3 of 200 x 200 .* too large .* takes 100; lower max_pixels"):
        head.build(sample(200, 200), codec, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"more than 200 times as long"):
        head.build(sample(1, 300), codec, np.random.default_rng(0))


def test_settings_are_checked():
    with pytest.raises(ValueError, match="unknown label rule 'x'"):
        AllMaskHead(label_rule="x")
    for name, value in (("num_classes", 0), ("max_queries", 0), ("max_new_tokens", 0), ("max_masks", -1)):
        with pytest.raises(ValueError, match=f"{name} is {value}; it must be at least 1"):
            AllMaskHead(**{name: value})
    for name in ("label_mode", "no_target", "upsampling", "mask_attention"):  # a typo must not choose the other value
        with pytest.raises(ValueError, match=f"{name} is 'bidirectionnal'; use one of "):
            AllMaskHead(**{name: "bidirectionnal"})
    with pytest.raises(ValueError, match=r"unknown loss weights \['bcee'\]; the losses are ce, bce, dice"):
        AllMaskHead(weights={"bcee": 1.0})
    with pytest.raises(ValueError, match="needs num_classes 1"):
        AllMaskHead(no_target="answer", num_classes=3)
    with pytest.raises(ValueError, match="grid position is 'Grid'"):
        MaskGrid(position="Grid")
    with pytest.raises(ValueError, match="at least one question and one answer"):
        Prompts(answers=())
    with pytest.raises(ValueError, match="grid scale 0"):
        MaskGrid(scale=0)
    with pytest.raises(ValueError, match=r"lacks '{x}'"):
        Prompts(questions=("Segment.",))
    with pytest.raises(ValueError, match=r"need a backbone with M-RoPE"):
        make_model(grid=MaskGrid(position="grid"))
    with pytest.raises(ValueError, match="no protocol 'magic'"):
        make_model().predict(scenes(0), protocol="magic")
    with pytest.raises(ValueError, match="is empty; give an expression"):
        make_model().predict([replace(scenes(0)[0], queries=(Query(" . "),))])


def test_templates_do_not_read_expressions():
    assert fill("Segment {x}.", "the {x} box") == "Segment the {x} box."
    assert split_triggers("a <|seg|><|seg|> b") == ["a ", SEG, SEG, " b"]
    assert [type(piece) is type(SEG) for piece in split_triggers("a <|seg|>")] == [False, True]


def test_user_text_cannot_trigger(model):
    """A literal trigger in a question is text (specification, quirk 7)."""
    sample = replace(scenes(0)[0], queries=(Query("the <|seg|> thing", id="0"),))
    seen = []
    generate = model.backbone.generate

    def spy(prefix, suffixes, **arguments):
        seen.extend(index for row in suffixes for branch in row for index in branch)
        return generate(prefix, suffixes, **arguments)

    model.backbone.generate = spy
    try:
        model.predict([sample])
    finally:
        del model.backbone.generate
    assert seen and model.head().seg_id not in seen


def test_official_labels_supervise_everything(model):
    """All tokens but those of mask blocks, with their true predecessors (specification 3.1)."""
    official = make_model(label_mode="official_all_tokens", max_queries=None)
    batch = batch_of(official, scenes(0, 1))
    is_dense = torch.zeros_like(batch.ids, dtype=torch.bool).scatter_(1, batch.dense_positions.clamp(min=0), True)
    supervised = batch.labels != IGNORE_INDEX
    assert torch.equal(batch.labels[supervised], batch.ids[supervised])
    is_real = (batch.visibility.block >= 0) & ~is_dense
    left = is_real & ~supervised
    starts = [(batch.visibility.block[row, i], batch.positions[0, row, i]) for row, i in left.nonzero().tolist()]
    prefix = len(official.backbone.codec.image_prefix())
    # only the first token of the later branches, which nothing in its packed row comes right before
    assert [int(block) for block, _ in starts] == [2, 3, 4] * 2 and {int(place) for _, place in starts} == {prefix}
    assert int(supervised.sum()) > 3 * int((batch_of(model, scenes(0, 1)).labels != IGNORE_INDEX).sum())


# ---- training = inference -----------------------------------------------------------------------------------------------

VARIANTS = {
    "plain": {},
    "finer": {"grid": MaskGrid(scale=2)},
    "cells": {"grid": MaskGrid(cells=3)},
    "both": {"grid": MaskGrid(scale=2, cells=2)},
    "causal": {"mask_attention": "causal"},
    "classes": {"num_classes": 3},
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("family", ["internvl", "qwen"])
def test_packed_training_pass_equals_cached_inference(name, family):
    """Cells of the training pass = cells of a forced answer behind the cached prefix."""
    backbone = InternVLBackbone() if family == "internvl" else QwenVLBackbone()
    model = make_model(backbone, **VARIANTS[name])
    head, samples = model.head(), scenes(0, 1)
    if head.place is not None:
        torch.nn.init.normal_(head.place)
    head.prompts = Prompts(questions=SHORT.questions[:1], answers=SHORT.answers)
    batch = batch_of(model, samples)
    with torch.no_grad():
        features = backbone.encode_images(batch.pixels, batch.canvas_sizes)
        states = backbone(batch, features, head.dense_features(features)).states
    predictions = model.predict(samples, protocol="force_segment")
    tokens = head.grid.tokens(features.grids[0])
    for slot, (row, start, query) in enumerate(
        zip(batch.slot_rows.tolist(), batch.dense_starts.tolist(), batch.slot_queries.tolist())
    ):
        places = batch.dense_positions[row, start : start + tokens[0] * tokens[1]]
        cells = head.grid.arrange(head.classifier(states[row, places][None]), features.grids[0], head.num_classes)[0]
        drawn = predictions[slot]
        assert drawn.query == samples[row].queries[query].text
        if head.num_classes == 1:
            assert np.abs(drawn.mask_logits - cells[0].detach().numpy()).max() < 1e-5
        else:
            channel = 1 + query % (head.num_classes - 1)
            is_best = cells.argmax(0) == channel
            assert np.array_equal(drawn.mask_logits > 0, is_best.numpy())


@pytest.mark.parametrize("family", [InternVLBackbone, QwenVLBackbone])
def test_cached_equals_uncached_on_a_model_of_ordinary_scale(family):
    """With weights of the usual size, the cached pass and a whole uncached one differ by rounding only."""
    torch.manual_seed(0)
    model = PerceptionModel(family(), {"all_mask": AllMaskHead(prompts=Prompts(SHORT.questions[:1], SHORT.answers))})
    head, sample = model.eval().head(), scenes(0)[0]
    batch = batch_of(model, [sample])
    with torch.no_grad():
        features = model.backbone.encode_images(batch.pixels, batch.canvas_sizes)
        states = model.backbone(batch, features, head.dense_features(features)).states
        whole = head.classifier(gather(states, batch.dense_positions))[0, :, 0]
    cached = np.concatenate([p.mask_logits.ravel() for p in model.predict([sample], protocol="force_segment")])
    error = np.abs(cached - whole.numpy()).max()
    assert error <= 1e-6 * max(1.0, float(whole.abs().max())), error


def test_every_way_of_running_gives_the_same_masks(model):
    samples = scenes(0, 1, 7)
    for protocol in model.head().protocols:
        together = model.predict(samples, protocol=protocol)
        alone = [p for sample in samples for p in model.predict([sample], protocol=protocol)]
        single = [
            p
            for sample in samples
            for query in sample.queries
            for p in model.predict([replace(sample, queries=(query,))], protocol=protocol)
        ]
        assert any(p.mask.area for p in together), protocol
        assert same(together, alone) and same(together, single), protocol


def test_expressions_and_free_questions_in_one_batch():
    """Some images are asked for masks, some to talk, some both: everyone gets their own answer."""
    model = make_model(max_chat_tokens=4, no_target="answer")
    first, second, third = scenes(0, 1, 7)
    chat = Query("What is there?", task="chat", id="c", history=(("Hello?", "Yes <|seg|>."),))
    samples = [
        replace(first, queries=first.queries[:2]),
        replace(second, queries=(chat,)),
        replace(third, queries=(chat, third.queries[0])),
    ]
    together = model.predict(samples)
    assert [p.query_id for p in together] == [*(q.id for q in first.queries[:2]), "c", "c", third.queries[0].id]
    assert same(together, [p for sample in samples for p in model.predict([sample])])
    assert all(0 <= p.score <= 1 for p in together)
    forced = model.predict(samples, protocol="force_segment")
    assert forced[2].text == together[2].text and forced[0].text == "Here: <|seg|>"  # a free question cannot be forced


def test_scores_say_whether_the_target_is_there():
    """An empty mask is no confident find: its score is the chance of its best pixel, below one half."""
    model = make_model()
    with torch.no_grad():
        model.head().classifier.bias -= 2.0
    found = model.predict(scenes(0, 1, 7), protocol="force_segment")
    there, empty = [p for p in found if p.mask.area], [p for p in found if not p.mask.area]
    model.head().classifier.bias.data -= 50.0
    empty += model.predict(scenes(0), protocol="force_segment")
    assert all(p.score >= 0.5 and p.exists for p in there)
    assert empty and all(p.score < 0.5 and not p.exists for p in empty)


def test_the_official_protocol_takes_the_first_mask():
    one, many = make_model(), make_model(max_masks=3)
    first, second = (model.predict(scenes(0, 1), protocol="official") for model in (one, many))
    assert any(p.mask.area for p in first) and [p.mask for p in first] == [p.mask for p in second]


def test_classes_that_nothing_was_asked_of_do_not_compete():
    model = make_model(num_classes=4)
    sample = replace(scenes(0)[0], queries=scenes(0)[0].queries[:1])
    (before,) = model.predict([sample], protocol="force_segment")
    with torch.no_grad():
        model.head().classifier.bias[2:] += 100.0
    (after,) = model.predict([sample], protocol="force_segment")
    assert before.mask.area and before.mask == after.mask


def test_zero_loss_is_zero_in_half_precision():
    """A batch without masks: sums that overflow must not become NaN, and every parameter takes part."""
    model = make_model().half()
    chat = Query(text="What is this?", task="chat", answer="A scene.", id="1")
    batch = batch_of(model, [replace(scenes(0)[0], queries=(chat,))])
    states = torch.full((1, batch.ids.shape[1], 128), 60000.0, dtype=torch.float16, requires_grad=True)
    losses = model.head()._mask_loss(states, batch, [(6, 6)])
    assert float(losses["bce"].detach()) == float(losses["dice"].detach()) == 0.0
    losses["dice"].backward()
    assert model.head().classifier.weight.grad is not None and not states.grad.any()


def test_images_of_different_sizes_in_one_batch():
    model = make_model(QwenVLBackbone())
    base = scenes(0)[0]
    samples = []
    for size in ((96, 96), (60, 96), (96, 50)):
        image = base.load_image().resize((size[1], size[0]))
        samples.append(Sample(image, size, (Query("the red circle", id="0"), Query("a square", id="1")), id=str(size)))
    for protocol in ("generate", "force_segment"):
        together = model.predict(samples, protocol=protocol)
        assert same(together, [p for s in samples for p in model.predict([s], protocol=protocol)])
        assert [p.size for p in together] == [s.size for s in samples for _ in s.queries]


def test_many_masks_run_in_several_passes(model, monkeypatch):
    """More masks than fit one pass: the chunks do not change a mask."""
    from mmseg_llm.heads.all_mask import passes

    sample = scenes(0)[0]
    sample = replace(sample, queries=tuple(replace(q, id=f"{q.id}-{i}") for i in range(3) for q in sample.queries))
    large = model.predict([sample], protocol="force_segment")
    monkeypatch.setattr(passes, "TOKENS_PER_PASS", 3 * 36)
    assert same(large, model.predict([sample], protocol="force_segment"))


def test_one_vision_call(model, monkeypatch):
    calls = []
    encode = model.backbone.encode_images
    monkeypatch.setattr(model.backbone, "encode_images", lambda *a: calls.append(1) or encode(*a))
    predictions = model.predict(scenes(0))
    assert len(calls) == 1 and sum(str(SEG) in p.text for p in predictions) >= 2


def test_several_masks_of_one_answer_are_united():
    one, many = make_model(max_new_tokens=5), make_model(max_new_tokens=5, max_masks=3)
    with torch.no_grad():  # says the trigger again and again
        for model in (one, many):
            states = model.backbone(batch_of(model, scenes(0))).states
            model.backbone.lm_head.weight.zero_()
            model.backbone.lm_head.weight[model.head().seg_id] = states.mean((0, 1))
    first, union = one.predict(scenes(0)), many.predict(scenes(0))
    assert first[0].text == str(SEG) and union[0].text.count(str(SEG)) == 5
    assert all((b.mask_logits >= a.mask_logits - 1e-5).all() for a, b in zip(first, union))
    assert any((b.mask_logits > a.mask_logits + 1e-3).any() for a, b in zip(first, union))


def test_official_protocol(model):
    """Nearest upsampling of the cells, the first mask, and templates that are drawn by expression, not by position."""
    samples = scenes(0, 1)
    predictions = model.predict(samples, protocol="official")
    shown = [p for p in predictions if p.mask_logits is not None]
    assert shown
    for p in shown:
        blocks = np.repeat(np.repeat(p.mask_logits > 0, 16, 0), 16, 1)  # 6 x 6 cells on 96 x 96 pixels
        assert np.array_equal(p.mask.array, blocks)
    assert same(predictions[4:], model.predict(samples[1:], protocol="official"))
    loud = [replace(s, queries=tuple(replace(q, text=q.text.upper()) for q in s.queries)) for s in samples]
    assert same(predictions, model.predict(loud, protocol="official"))
    assert [p.query for p in model.predict(loud, protocol="official")] == [q.text for s in loud for q in s.queries]


# ---- learning -----------------------------------------------------------------------------------------------------------


def disjoint(samples) -> Sample:
    """Two queries of one image whose targets share no pixel."""
    for sample in samples:
        for a in sample.queries:
            for b in sample.queries:
                first, second = a.target(sample.size), b.target(sample.size)
                if first.area and second.area and not first.intersection(second):
                    return replace(sample, queries=(a, b))
    raise AssertionError("no scene has two targets apart")


@pytest.mark.parametrize("settings", [{}, {"num_classes": 3, "weights": {"bce": 1.0}}], ids=["masks", "classes"])
def test_overfits_one_scene(settings):
    """The loss falls and the masks of the scene come out, by generation and by force."""
    grid = MaskGrid(cells=4)
    model = make_model(grid=grid, label_rule="coverage", max_queries=None, **settings).train()
    model.head().prompts = Prompts(questions=SHORT.questions[:1], answers=SHORT.answers)
    sample = disjoint(scenes(*range(8))) if "num_classes" in settings else scenes(0)[0]
    batch = batch_of(model, [sample])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    history = []
    for _ in range(60):
        losses = model.loss(batch)
        total = sum(value for name, value in losses.items() if not name.startswith("_"))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append(float(total.detach()))
    assert history[-1] < 0.25 * history[0]
    model.eval()
    for protocol in ("generate", "force_segment"):
        found = model.predict([sample], protocol=protocol)
        truth = [query.target(sample.size) for query in sample.queries]
        ious = [p.answer_mask.iou(t) for p, t in zip(found, truth)]
        assert np.mean(ious) > 0.6, (protocol, ious)


def test_mask_of_prediction_matches_its_logits(model):
    for p in model.predict(scenes(0)):
        if p.mask_logits is not None:
            assert p.mask_logits.shape == (6, 6) and p.mask_logits.dtype == np.float32
            assert (p.mask_logits > 0).any() == (p.mask.area > 0)
            assert 0 <= p.score <= 1 and p.box == p.mask.box
    assert Mask.empty((2, 2)).area == 0
