"""The mask decoder head: network, prompts, examples, losses, decoding and whether it learns."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from backbones.tiny import make_batch, make_model, scenes
from PIL import Image

from mmseg_llm.backbones.codec import IGNORE_INDEX
from mmseg_llm.heads.mask_decoder.decoder import MaskDecoder
from mmseg_llm.heads.mask_decoder.dysample import DySample
from mmseg_llm.heads.mask_decoder.head import MaskDecoderHead, gather
from mmseg_llm.heads.mask_decoder.losses import clean_mask_loss, official_mask_loss
from mmseg_llm.heads.mask_decoder.prompts import OFFICIAL, REJ, SEG, AnswerStyle, Prompts, clean_expression
from mmseg_llm.structures import Mask, Query, Sample


def randomised(decoder: MaskDecoder) -> MaskDecoder:
    """Biases, norms and statistics that are not trivial."""
    with torch.no_grad():
        for tensor in decoder.parameters():
            if tensor.ndim == 1:
                tensor.add_(0.2 * torch.randn_like(tensor))
        norm = decoder.conv1[1]
        norm.running_mean.normal_(std=0.2)
        norm.running_var.uniform_(0.5, 1.5)
    return decoder.eval()


@pytest.fixture
def decoder() -> MaskDecoder:
    torch.manual_seed(0)
    return randomised(MaskDecoder(vision_width=48, text_width=32, patch=4, width=64, heads=4))


@pytest.fixture(scope="module")
def model():
    return make_model()


# ---- network ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [None, 64])
@torch.no_grad()
def test_cached_equals_uncached(width):
    torch.manual_seed(0)
    decoder = randomised(MaskDecoder(vision_width=48, text_width=32, patch=4, width=width, heads=4))
    patches, states, queries = torch.randn(2, 64, 48), torch.randn(2, 16, 32), torch.randn(5, 32)
    rows = torch.tensor([0, 0, 1, 1, 1])
    cached = decoder.decode(decoder.encode_image(patches, states)[rows], queries)

    fused, _ = decoder.fuse(patches, states)
    features = decoder.ca_layer_vl(fused[rows], decoder.text_down(queries)[:, None])
    grid = features.transpose(1, 2).reshape(5, -1, 8, 8)
    channels = decoder.conv1(grid)  # (Q, 16, 8, 8)
    pixels = channels.view(5, 1, 4, 4, 8, 8).permute(0, 1, 4, 2, 5, 3).reshape(5, 1, 32, 32)
    torch.testing.assert_close(cached, decoder.conv2(pixels)[:, 0], rtol=0, atol=5e-6)
    one = decoder.decode(decoder.encode_image(patches, states)[1:], queries[3:4])
    torch.testing.assert_close(one, cached[3:4], rtol=0, atol=5e-6)


def test_query_and_key_rows_of_the_single_key_attention_get_no_gradient(decoder):
    fused, _ = decoder.fuse(torch.randn(1, 64, 48), torch.randn(1, 16, 32))
    text = decoder.text_down(torch.randn(3, 32))[:, None]
    whole = decoder.ca_layer_vl(fused.expand(3, -1, -1), text)
    whole.square().sum().backward()
    attention = decoder.ca_layer_vl.decoder.layers[0].multihead_attn
    gradient = attention.in_proj_weight.grad  # the fused kernel of torch leaves rounding noise
    assert gradient[:128].abs().max() < 1e-6 * gradient[128:].abs().max()
    decoder.zero_grad()
    cache = decoder.encode_image(torch.randn(1, 64, 48), torch.randn(1, 16, 32)).expand(3, -1, -1)
    decoder.decode(cache, torch.randn(3, 32)).square().sum().backward()
    assert (attention.in_proj_weight.grad[:128] == 0).all() and (attention.in_proj_weight.grad[128:] != 0).any()


@torch.no_grad()
def test_dysample_without_offsets_is_bilinear():
    module = DySample(8)
    module.offset.weight.zero_()
    module.offset.bias.zero_()
    x = torch.randn(2, 8, 5, 7)
    plain = functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(module(x), plain, rtol=0, atol=1e-5)
    for in_float32 in (True, False):
        half = DySample(8, grid_in_float32=in_float32).to(torch.bfloat16)(x[:1].bfloat16())
        assert half.dtype == torch.bfloat16 and torch.isfinite(half).all()
    with pytest.raises(ValueError, match="cannot be split"):
        DySample(6)


def test_initialisation():
    """Specification section 3.3, T15."""
    torch.manual_seed(0)
    decoder = MaskDecoder(vision_width=1024, text_width=64)
    offset = decoder.upsample_adapter_l.offset
    assert float(offset.weight.detach().std()) == pytest.approx((2 / (1024 + 32)) ** 0.5, rel=0.03)
    assert (offset.bias == 0).all()
    layer = decoder.ca_layer_vl.decoder.layers[0]
    for bias in (layer.self_attn.in_proj_bias, layer.multihead_attn.out_proj.bias, layer.linear1.bias):
        assert (bias == 0).all(), "attention and feed-forward biases start at zero"
    small = MaskDecoder(vision_width=64, text_width=32, offset_init=0.001)
    assert float(small.upsample_adapter_l.offset.weight.detach().abs().max()) < 0.01


# ---- prompts ----------------------------------------------------------------------------------------------------------

QUESTIONS = (
    "Can you segment the red cube, Cat in this image?",
    "Please segment the red cube, Cat in this image.",
    "What are the red cube, Cat in this image? Please respond with segmentation masks.",
    "What are the red cube, Cat in this image? Please output segmentation masks.",
)
ANSWERS = (
    "The segmentation results are the red cube [SEG], Cat [REJ].",
    "Sure, they are the red cube:[SEG], Cat:[REJ].",
    "Sure, the mask of the red cube is [SEG], the mask of Cat is [REJ].",
    "Sure, the segmentation of the red cube is [SEG], the segmentation of Cat is [REJ].",
    "Sure, the referred the red cube is [SEG], the referred Cat is [REJ].",
)


def test_prompts_are_those_of_the_specification():
    prompts = Prompts()
    combinations = list(itertools.product(prompts.questions, prompts.answers))
    assert len(combinations) == 20
    names = ["the red cube", "Cat"]
    for (question, style), (expected_question, expected) in zip(combinations, itertools.product(QUESTIONS, ANSWERS)):
        assert question.format(x=", ".join(names)) == expected_question
        assert "".join(style.parts(names, [SEG, REJ])) == expected
    question = OFFICIAL.questions[0].format(x="the red cube, cat")
    assert question == " What are the red cube, catin this image? Please output segmentation masks."
    assert (
        "".join(OFFICIAL.answers[0].parts(["the red cube", "cat"], [SEG, REJ])) == "Sure,the red cube:[SEG], cat:[REJ]."
    )


def test_prompts_keep_placeholders_of_the_user_as_text():
    for style in Prompts().answers:
        parts = style.parts(["a {slot} and {c}"], [SEG])
        assert parts.count(SEG) == 1 and "a {slot} and {c}" in "".join(parts)
        assert "".join(parts) == "".join(style.parts(["@"], [SEG])).replace("@", "a {slot} and {c}")


def test_bad_templates_are_refused():
    with pytest.raises(ValueError, match="lacks"):
        Prompts(questions=("Segment it.",))
    with pytest.raises(ValueError, match="once"):
        Prompts(answers=(AnswerStyle("Sure,", "{c}"),))


def test_empty_expressions_are_refused(model):
    assert clean_expression(" .the red cube. ") == "the red cube"
    for text in ("", "  ", " . ", "..."):
        with pytest.raises(ValueError, match="is empty"):
            clean_expression(text)
    sample = Sample(Image.new("RGB", (96, 96)), (96, 96), (Query(" . "),))
    for protocol in ("generate", "per_expression", "official"):
        with pytest.raises(ValueError, match="is empty"):
            model.predict([sample], protocol=protocol)


# ---- examples ---------------------------------------------------------------------------------------------------------


def build(model, sample, seed=0, **settings):
    head = MaskDecoderHead(**settings)
    head.name = "mask_decoder"
    return head.build(sample, model.backbone.codec, np.random.default_rng(seed))


def test_build_gives_one_branch_per_expression(model):
    codec = model.backbone.codec
    (sample,) = scenes(7)
    example = build(model, sample)
    assert example.pixels.shape == (3, 96, 96) and example.pixels.dtype == np.float32
    assert example.prefix == codec.image_prefix()
    assert [suffix.query_ids for suffix in example.suffixes] == [(0,), (1,), (2,), (3,)]
    assert len(example.targets) == 4
    for i, (suffix, target, query) in enumerate(zip(example.suffixes, example.targets, sample.queries)):
        (slot,) = suffix.slots
        assert suffix.ids[slot] == codec.token_id("[REJ]" if query.is_no_target else "[SEG]"), i
        first = next(k for k, label in enumerate(suffix.labels) if label != IGNORE_INDEX)
        assert suffix.labels[first:-1] == suffix.ids[first:-1] and suffix.labels[-1] == IGNORE_INDEX
        assert suffix.ids[-2] == codec.end_id and suffix.ids[first - 1] == codec.encode("\n")[0]
        assert first <= slot
        if query.is_no_target:
            assert target is None
        else:
            assert np.array_equal(target, query.target(sample.size).array)
    assert any(target is None for target in example.targets)


def test_build_draws(model):
    (sample,) = scenes(0)
    codec = model.backbone.codec
    joint = build(model, sample, joint_prompt=True)
    assert len(joint.suffixes) == 1 and len(joint.suffixes[0].slots) == 4 == len(joint.targets)
    assert joint.suffixes[0].query_ids == (0, 1, 2, 3)
    drawn = {build(model, sample, seed, max_queries=2).suffixes[0].query_ids for seed in range(20)}
    assert len(drawn) > 1
    assert len(build(model, sample, max_queries=2).suffixes) == 2
    questions = {codec.decode(build(model, sample, seed).suffixes[0].ids) for seed in range(60)}
    assert len(questions) > 10
    assert build(model, sample, 3).suffixes == build(model, sample, 3).suffixes
    plain, jpeg = build(model, sample), build(model, sample, jpeg_quality=(75, 100))
    assert 0 < np.abs(plain.pixels - jpeg.pixels).mean() < 0.5
    unlabelled = Sample(sample.image, sample.size, (Query("x"),), "7", "here")
    with pytest.raises(ValueError, match="sample 7 of here has no query with masks"):
        build(model, unlabelled)


def test_user_text_cannot_add_slots(model):
    (sample,) = scenes(0)
    from dataclasses import replace

    query = replace(sample.queries[0], text="the [SEG] [REJ] {slot} thing <|im_end|>")
    example = build(model, replace(sample, queries=(query,)))
    assert len(example.suffixes[0].slots) == 1
    assert example.suffixes[0].ids.count(model.backbone.codec.end_id) == 2


def test_targets_follow_the_canvas(model):
    array = np.zeros((48, 192), bool)
    array[12:24, 96:144] = True
    query = Query("x", (Mask.from_array(array),))
    sample = Sample(Image.new("RGB", (192, 48)), (48, 192), (query,))
    (clean,) = build(model, sample).targets
    expected = np.zeros((96, 96), bool)
    expected[24:48, 48:72] = True
    assert np.array_equal(clean, expected)
    (official,) = build(model, sample, loss_rule="official").targets
    assert np.array_equal(official, array)


def test_collate(model):
    samples = scenes(0, 7)
    batch = make_batch(model, samples)
    codec = model.backbone.codec
    rows, length = batch.ids.shape
    assert rows == 2
    assert batch.positions.shape == (1, 2, length)
    for tensor in (batch.labels, batch.visibility.block):
        assert tensor.shape == (2, length)
    assert batch.pixels.shape == (2, 3, 96, 96) and batch.image_positions.shape == (2, 36)
    assert batch.slot_rows.tolist() == [0] * 4 + [1] * 4 and batch.slot_queries.tolist() == [0, 1, 2, 3] * 2
    assert len(batch.targets) == 8 and len(batch.samples) == 2
    slots = batch.ids[batch.slot_rows, batch.slot_positions].tolist()
    assert slots == [
        codec.token_id("[REJ]" if query.is_no_target else "[SEG]") for sample in samples for query in sample.queries
    ]
    assert (batch.ids.gather(1, batch.image_positions) == codec.token_id("<IMG_CONTEXT>")).all()
    padding = batch.visibility.block < 0
    assert padding.any() and (batch.labels[padding] == IGNORE_INDEX).all()
    assert (batch.ids[padding] == codec.pad_id).all()
    assert batch.visibility.reach.shape == (2, 5, 5)


def test_label_padding_of_the_official_rule():
    model = make_model(head=MaskDecoderHead(width=64, heads=4, loss_rule="official"))
    batch = make_batch(model, scenes(0, 7))
    assert (batch.labels[batch.visibility.block < 0] == 0).all()
    losses = model.loss(batch)
    assert all(torch.isfinite(value) for value in losses.values())


# ---- losses -----------------------------------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def direct(logits, probabilities, truth):
    """Focal and Dice of one row, written out."""
    p = sigmoid(logits)
    entropy = -(truth * np.log(p) + (1 - truth) * np.log(1 - p))
    right = np.where(truth == 1, probabilities, 1 - probabilities)
    focal = (np.where(truth == 1, 0.25, 0.75) * (1 - right) ** 2 * entropy).mean()
    dice = 1 - (2 * (probabilities * truth).sum() + 1) / (probabilities.sum() + truth.sum() + 1)
    return focal, dice


def test_clean_loss_equals_the_formula():
    rng = np.random.default_rng(0)
    logits, truth = 2 * rng.standard_normal((3, 6, 8)), rng.integers(0, 2, (3, 6, 8))
    rows = [direct(x, sigmoid(x), t) for x, t in zip(logits, truth)]
    losses = clean_mask_loss(torch.from_numpy(logits), torch.from_numpy(truth))
    assert float(losses["focal"]) == pytest.approx(np.mean([row[0] for row in rows]), abs=1e-6)
    assert float(losses["dice"]) == pytest.approx(np.mean([row[1] for row in rows]), abs=1e-6)


def test_official_loss_is_the_double_sigmoid():
    rng = np.random.default_rng(1)
    logits = [torch.from_numpy(2 * rng.standard_normal((8, 8))) for _ in range(2)]
    truths = [rng.integers(0, 2, size) for size in ((12, 20), (8, 8))]
    rows = []
    for x, truth in zip(logits, truths):
        resized = functional.interpolate(x.sigmoid()[None, None], truth.shape, mode="bilinear", align_corners=False)
        probabilities = resized[0, 0].numpy()
        rows.append(direct(probabilities, probabilities, truth))  # probabilities taken for logits
    losses = official_mask_loss(logits, [torch.from_numpy(truth) for truth in truths], num_rows=3)
    assert float(losses["focal"]) == pytest.approx(sum(row[0] for row in rows) / 3, rel=1e-6)
    assert float(losses["dice"]) == pytest.approx(sum(row[1] for row in rows) / 3, rel=1e-6)


def test_loss_of_rejections_only_leaves_the_statistics_alone():
    model = make_model().train()
    sample = scenes(7)[0]
    from dataclasses import replace

    sample = replace(sample, queries=tuple(query for query in sample.queries if query.is_no_target))
    losses = model.loss(make_batch(model, [sample]))
    total = sum(value for name, value in losses.items() if not name.startswith("_"))
    total.backward()
    assert float(losses["focal"]) == float(losses["dice"]) == 0
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    gradients = {name: p.grad for name, p in model.heads.named_parameters() if p.requires_grad}
    assert all(grad is None or torch.isfinite(grad).all() for grad in gradients.values())
    # every parameter takes part, so that distributed training does not wait for it
    dead = {name for name, grad in gradients.items() if grad is None}
    assert not dead, dead


def test_loss_weights_scale_the_terms():
    plain, scaled = make_model(), make_model(head=MaskDecoderHead(width=64, heads=4, weights={"dice": 3.0, "ce": 0.0}))
    scaled.load_state_dict(plain.state_dict())
    batch = make_batch(plain, scenes(0))
    with torch.no_grad():
        first, second = plain.loss(batch), scaled.loss(batch)
    assert float(second["dice"]) == pytest.approx(3 * float(first["dice"]), rel=1e-5)
    assert float(second["focal"]) == pytest.approx(float(first["focal"]), rel=1e-5)
    assert float(second["ce"]) == 0 < float(first["ce"])
    assert 0 <= float(first["_seg_accuracy"]) <= 1


# ---- decoding ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_expression_does_not_change_the_image_side(model):
    from dataclasses import replace

    (sample,) = scenes(0)
    other = replace(sample, queries=tuple(replace(query, text="a large dog") for query in sample.queries))
    batches = [make_batch(model, [s], seed) for s, seed in ((sample, 0), (other, 5))]
    sides, slots = [], []
    for batch in batches:
        # one position early: cell 0 holds the state of <img>, cell k that of image token k - 1
        before = batch.ids.gather(1, batch.image_positions - 1)[0].tolist()
        codec = model.backbone.codec
        assert before == [codec.token_id("<img>")] + [codec.token_id("<IMG_CONTEXT>")] * 35
        output = model.backbone(batch)
        states = gather(output.states, batch.image_positions - 1)
        sides.append(model.head().decoder.encode_image(output.features.patches, states))
        slots.append(output.states[batch.slot_rows, batch.slot_positions - 1])
    torch.testing.assert_close(sides[0], sides[1], rtol=0, atol=1e-5)
    assert (slots[0] - slots[1]).abs().max() > 0.1


@pytest.mark.parametrize("protocol", MaskDecoderHead.protocols)
def test_batched_equals_single(protocol):
    model = make_model()
    with torch.no_grad():  # every state says [SEG] or [REJ]
        rows, direction = model.backbone.lm_head.weight, torch.randn(128)
        rows[model.head().seg_id], rows[model.head().rej_id] = direction, -direction
    samples = scenes(*range(8))
    small = samples[3]
    image = small.image.resize((50, 40))
    queries = tuple(Query(query.text, (Mask.empty((40, 50)),), id=query.id) for query in small.queries[:2])
    samples[3] = Sample(image, (40, 50), queries, "small")
    batched = model.predict(samples, protocol=protocol)
    single = [prediction for sample in samples for prediction in model.predict([sample], protocol=protocol)]
    assert len(batched) == len(single) == sum(len(sample.queries) for sample in samples)
    names = [(sample.id, query.id) for sample in samples for query in sample.queries]
    assert [(prediction.sample_id, prediction.query_id) for prediction in batched] == names
    for one, other in zip(batched, single, strict=True):
        assert (one.text, one.exists, one.size) == (other.text, other.exists, other.size)
        assert one.score == pytest.approx(other.score, abs=1e-4)
        assert one.mask.size == one.size
        assert int((one.mask.array != other.mask.array).sum()) == 0
    assert any(prediction.mask.area for prediction in batched)


def test_predict_edges(model):
    (sample,) = scenes(0)
    from dataclasses import replace

    assert model.predict([]) == [] == model.predict([replace(sample, queries=())])
    with pytest.raises(ValueError, match="no protocol 'beam'"):
        model.predict([sample], protocol="beam")
    with pytest.raises(ValueError, match="no head 'sam'"):
        model.predict([sample], head="sam")


def test_protocols_need_no_labels(model):
    """The text of the image's labels never reaches `generate` and `per_expression`."""
    from dataclasses import replace

    (sample,) = scenes(7)
    blind = replace(sample, queries=tuple(replace(query, masks=None) for query in sample.queries))
    for protocol in ("generate", "per_expression"):
        seen, unseen = model.predict([sample], protocol=protocol), model.predict([blind], protocol=protocol)
        assert [p.to_json() for p in seen] == [p.to_json() for p in unseen]


# ---- learning ---------------------------------------------------------------------------------------------------------


def test_learns_one_batch():
    model = make_model().train()
    batch = make_batch(model, scenes(0, 1, 7))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    history = []
    for _ in range(30):
        losses = model.loss(batch)
        total = sum(value for name, value in losses.items() if not name.startswith("_"))
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        history.append(float(total.detach()))
    print(f"{history[0]:.3f} -> {history[-1]:.3f}", {name: round(float(value), 3) for name, value in losses.items()})
    assert history[-1] < 0.4 * history[0]
