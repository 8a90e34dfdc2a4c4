"""What every model family owes the heads: one set of tests over every tiny size, so that a new family is tested by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from backbones.tiny import make_batch, resized, scenes, stock_inputs, stock_states, tables, tiny_sizes
from mmseg_llm.backbones.adapters import Lora, Trainable
from mmseg_llm.backbones.collate import collate
from mmseg_llm.backbones.features import gather
from mmseg_llm.heads.all_mask.head import AllMaskHead
from mmseg_llm.heads.all_mask.passes import Trigger
from mmseg_llm.heads.mask_decoder.head import MaskDecoderHead
from mmseg_llm.model import PerceptionModel

SIZES = tiny_sizes()
HEADS = ("mask_decoder", "all_mask")
FROZEN = Trainable(vision=False, projector=False, language=False, embeddings=False)


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def build(size: str, **settings) -> PerceptionModel:
    """A model of one size with both heads, whose answers are not trivial."""
    torch.manual_seed(0)
    heads = {"mask_decoder": MaskDecoderHead(width=64, heads=4, max_new_tokens=8), "all_mask": AllMaskHead()}
    model = PerceptionModel(SIZES[size](size, **settings), heads)
    if "lora" not in settings:
        with torch.no_grad():
            for token in ("[SEG]", "<|seg|>"):
                model.backbone.lm_head.weight[model.backbone.codec.token_id(token)].normal_(std=0.08)
    return model.eval()


@pytest.fixture(scope="module", params=SIZES)
def model(request):
    return build(request.param)


def samples_of(model: PerceptionModel):
    """Two scenes, one of which has an expression without target; of two shapes where the family keeps shapes."""
    first, second = scenes(0, 7)
    return [first, resized(second, (60, 96))] if model.backbone.codec.geometry.is_dynamic else [first, second]


def examples_of(model: PerceptionModel, name: str):
    rng = np.random.default_rng(0)
    return [model.head(name).build(sample, model.backbone.codec, rng) for sample in samples_of(model)]


def canvas_pixels(batch, row: int) -> torch.Tensor:
    height, width = batch.canvas_sizes[row]
    return batch.pixels[row, :, :height, :width]


def packed_states(model: PerceptionModel, batch):
    """Packed states, image features, and what the head adds to its dense queries."""
    head, backbone = model.head(batch.head), model.backbone
    features = backbone.encode_images(batch.pixels, batch.canvas_sizes)
    dense = head.dense_features(features) if batch.head == "all_mask" else None
    return backbone(batch, features, dense).states, features, dense


def start(model: PerceptionModel, batch):
    """Prefill of the images of a batch, and the questions of each, of unequal number."""
    backbone, codec = model.backbone, model.backbone.codec
    features = backbone.encode_images(batch.pixels, batch.canvas_sizes)
    prefix = backbone.prefill(features, [codec.image_prefix(size) for size in batch.canvas_sizes])
    counts = (2, 3)
    branches = [[codec.question(q.text) for q in s.queries[:n]] for s, n in zip(batch.samples, counts)]
    return prefix, branches


def test_every_size_has_its_adapter():
    """A new table must be taken by the module of an adapter in `backbones.__all__`; otherwise nothing below sees it."""
    named = {size for table in tables().values() for size in table if "tiny" in size}
    assert named == set(SIZES) and len(named) >= 10


# ---- the vision side --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_features_are_deterministic_and_in_raster_order(model):
    """The token, and the patch, that changes most is the one that was painted on."""
    backbone, geometry = model.backbone, model.backbone.codec.geometry
    for sample in samples_of(model):
        size = geometry.canvas_size(sample.size)
        rows, columns = geometry.patch_grid(size)
        grid, merge, side = geometry.token_grid(size), geometry.merge, geometry.patch
        assert grid[0] != grid[1] or sample.size[0] == sample.size[1]
        torch.manual_seed(1)
        plain = 0.3 * torch.randn(1, 3, *size)
        features = backbone.encode_images(plain)
        again = backbone.encode_images(plain)
        assert torch.equal(features.patches, again.patches) and torch.equal(features.tokens, again.tokens)
        assert features.grids == (grid,)
        assert features.patches.shape == (1, rows * columns, backbone.vision_width)
        assert features.tokens.shape == (1, grid[0] * grid[1], backbone.text_width)

        chosen = torch.randperm(rows * columns)[:24].tolist()
        painted = plain.repeat(len(chosen), 1, 1, 1)
        for image, patch in zip(painted, chosen):
            y, x = patch // columns * side, patch % columns * side
            image[:, y : y + side, x : x + side] += 3
        changed = (backbone.encode_images(painted).patches - features.patches).norm(dim=-1)
        assert changed.argmax(1).tolist() == chosen

        tokens = torch.randperm(grid[0] * grid[1])[:16].tolist()
        painted = plain.repeat(len(tokens), 1, 1, 1)
        for image, token in zip(painted, tokens):
            y, x = token // grid[1] * geometry.step, token % grid[1] * geometry.step
            image[:, y : y + geometry.step, x : x + geometry.step] += 3
        found = backbone.encode_images(painted)
        assert (found.tokens - features.tokens).norm(dim=-1).argmax(1).tolist() == tokens
        most = (found.patches - features.patches).norm(dim=-1).topk(merge**2).indices
        for token, patches in zip(tokens, most.tolist()):
            assert {(p // columns // merge, p % columns // merge) for p in patches} == {divmod(token, grid[1])}


def test_coordinates_round_trip(model):
    """Points of the canvas come back within half a cell through text and through the tokenizer."""
    codec = model.backbone.codec
    rng = np.random.default_rng(0)
    for sample in samples_of(model):
        height, width = size = codec.geometry.canvas_size(sample.size)
        points = rng.uniform((-0.5, -0.5), (width - 0.5, height - 0.5), (20, 2))
        text = ", ".join(codec.coordinates.write(points, size))
        assert codec.decode(codec.encode(text)) == text
        restored = codec.coordinates.read(text, size)
        half = np.array([width, height]) / (codec.coordinates.bins or np.array([width, height])) / 2
        assert (np.abs(restored - points) <= half + 1e-9).all()
        assert codec.coordinates.write(restored, size) == text.split(", ")


# ---- packed, cached and plain -----------------------------------------------------------------------------------------


def cached_states(model, examples, batch, features, dense) -> torch.Tensor:
    """States of the packed tokens `(B, N, D)` by prefill and one extension of its cache; zero at padding."""
    backbone = model.backbone
    prefix = backbone.prefill(features, [example.prefix for example in examples])
    lengths = [len(example.prefix) for example in examples]
    rests = [example.num_tokens - length for example, length in zip(examples, lengths)]
    places = torch.full((len(examples), max(rests)), -1)
    for row, (length, rest) in enumerate(zip(lengths, rests)):
        places[row, :rest] = length + torch.arange(rest)
    embeds = backbone.embed(batch.ids)
    if dense is not None:
        for row, (at, rank) in enumerate(zip(batch.dense_positions, batch.dense_index)):
            embeds[row, at[at >= 0]] += dense[row, rank[at >= 0]]
    num_branches = max(len(example.suffixes) for example in examples)
    assert prefix.open_branches(num_branches) == 1
    if dense is not None:
        hangs = [[(k, s) for k, suffix in enumerate(e.suffixes, 1) for s in suffix.dense_slots] for e in examples]
        shape = (len(examples), max(map(len, hangs)))
        parents, seen, starts = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
        for row, (example, found) in enumerate(zip(examples, hangs)):
            ends = np.cumsum([suffix.num_tokens for suffix in example.suffixes])
            for j, (k, slot) in enumerate(found):
                suffix = example.suffixes[k - 1]
                place = int(ends[k - 1]) - suffix.num_tokens + suffix.slots[slot]  # behind the prefix
                parents[row, j], seen[row, j] = k, prefix.length + place + 1
                starts[row, j] = prefix.next_position[row, 0] + suffix.slots[slot] + 1
        first = prefix.open_blocks(parents, seen, starts, bidirectional=True)
        assert first == num_branches + 1
    block = torch.where(places >= 0, batch.visibility.block.gather(1, places.clamp(min=0)), -1)
    new = backbone.extend(prefix, block, embeds=gather(embeds, places))
    out = torch.zeros(*batch.ids.shape, backbone.text_width)
    for row, (length, rest) in enumerate(zip(lengths, rests)):
        out[row, :length] = prefix.states[row, :length]
        out[row, length : length + rest] = new[row, :rest]
    return out


@torch.no_grad()
@pytest.mark.parametrize("name", HEADS)
def test_packed_equals_cached(model, name):
    batch = make_batch(model, samples_of(model), name=name)
    packed, features, dense = packed_states(model, batch)
    cached = cached_states(model, examples_of(model, name), batch, features, dense)
    real = batch.visibility.block >= 0
    assert real.sum(1).unique().numel() == 2  # rows of two lengths, so there is padding
    close(cached[real], packed[real])


@torch.no_grad()
@pytest.mark.parametrize("name", HEADS)
def test_packed_branches_equal_plain_sequences(model, name):
    """Each dialogue branch, by the stock model, from ids and pixels alone."""
    backbone = model.backbone
    batch = make_batch(model, samples_of(model), name=name)
    packed = packed_states(model, batch)[0]
    for row in range(2):
        for branch in range(1, 5):
            keep = (batch.visibility.block[row] == 0) | (batch.visibility.block[row] == branch)
            alone = stock_states(backbone, batch.ids[row, keep].tolist(), canvas_pixels(batch, row))
            close(packed[row, keep], alone)


@torch.no_grad()
def test_dense_blocks_equal_plain_sequences(model):
    """Each block of mask tokens, by the stock model under the hybrid mask of STAMP section 2.2."""
    backbone, core = model.backbone, model.backbone.model.model
    examples = examples_of(model, "all_mask")
    batch = make_batch(model, samples_of(model), name="all_mask")
    packed, _, dense = packed_states(model, batch)
    queries = zip(batch.slot_rows.tolist(), batch.slot_positions.tolist(), batch.dense_starts.tolist())
    for row, slot, first in list(queries)[::3]:
        example, block = examples[row], batch.visibility.block[row]
        count = example.suffixes[0].dense.length
        dialogue = [i for i in range(slot + 1) if block[i] in (0, block[slot])]
        places = [*dialogue, *batch.dense_positions[row, first : first + count].tolist()]
        inputs = stock_inputs(backbone, batch.ids[row, places].tolist(), canvas_pixels(batch, row))
        mask = torch.ones(len(places), len(places), dtype=torch.bool).tril()
        mask[-count:] = True
        if "mm_token_type_ids" in inputs:
            kinds, grid = inputs["mm_token_type_ids"], inputs["image_grid_thw"]
            inputs["position_ids"] = core.get_rope_index(inputs["input_ids"], kinds, image_grid_thw=grid)[0]
        added = torch.nn.functional.pad(dense[row, :count], (0, 0, len(dialogue), 0))
        hook = backbone.model.get_input_embeddings().register_forward_hook(lambda *call: call[-1] + added)
        try:
            alone = core(**inputs, attention_mask=mask[None, None]).last_hidden_state[0]
        finally:
            hook.remove()
        close(packed[row, places], alone)


@torch.no_grad()
@pytest.mark.parametrize("name", HEADS)
def test_batch_equals_single_rows(model, name):
    """Packed rows; and prefixes, of different lengths where there are different shapes, with their answers."""
    backbone, codec = model.backbone, model.backbone.codec
    batch = make_batch(model, samples_of(model), name=name)
    packed, features, _ = packed_states(model, batch)
    prefix, branches = start(model, batch)
    together = backbone.generate(prefix, branches, max_new_tokens=4)
    for row, example in enumerate(examples_of(model, name)):
        single = collate([example], codec, model.head(name).label_padding)
        states, own, _ = packed_states(model, single)
        close(packed[row, : states.shape[1]], states[0])
        for whole, part in ((features.tokens, own.tokens), (features.patches, own.patches)):
            close(whole[row, : part.shape[1]], part[0])
            assert not whole[row, part.shape[1] :].any()
        alone = backbone.prefill(own, [example.prefix])
        close(prefix.states[row, : alone.length], alone.states[0])
        answer = backbone.generate(alone, [branches[row]], max_new_tokens=4)
        assert answer.ids[0] == together.ids[row]
        for ours, theirs in zip(together.states[row], answer.states[0], strict=True):
            close(ours, theirs)


# ---- decoding ---------------------------------------------------------------------------------------------------------


def naive_greedy(backbone, prompt, pixels, steps, stop=()):
    """Recompute everything for every token, with the stock model and without a cache."""
    ids, states = list(prompt), []
    for _ in range(steps):
        states.append(stock_states(backbone, ids, pixels, use_cache=False)[-1])
        ids.append(int(backbone.lm_head(states[-1]).argmax()))
        if ids[-1] in (backbone.codec.end_id, *stop):
            break
    return ids[len(prompt) :], torch.stack(states)


@torch.no_grad()
def test_generate_equals_recomputation(model):
    backbone, codec = model.backbone, model.backbone.codec
    batch = make_batch(model, samples_of(model), name="all_mask")
    prefix, branches = start(model, batch)
    prompts = [codec.image_prefix(size) for size in batch.canvas_sizes]
    length = prefix.length

    def expected(stop):
        return [
            [naive_greedy(backbone, prompts[row] + branch, canvas_pixels(batch, row), 4, stop) for branch in found]
            for row, found in enumerate(branches)
        ]

    free = backbone.generate(prefix, branches, max_new_tokens=4)
    stop = (free.ids[0][0][1], free.ids[1][2][0])  # branches end at different steps
    halted = backbone.generate(prefix, branches, max_new_tokens=4, stop=stop)
    assert len(halted.ids[1][2]) == 1 < len(free.ids[1][2])
    for generated, reference in ((free, expected(())), (halted, expected(stop))):
        assert generated.ids == [[ids for ids, _ in row] for row in reference]
        for row, reference_row in zip(generated.states, reference):
            for states, (_, reference_states) in zip(row, reference_row, strict=True):
                close(states, reference_states)
    assert prefix.length == length == prefix.cache.get_seq_length()


@torch.no_grad()
def test_rollback_is_exact(model):
    backbone = model.backbone
    batch = make_batch(model, samples_of(model), name="all_mask")
    prefix, _ = start(model, batch)
    assert prefix.open_branches(2) == 1
    ids = batch.ids[:, 20:28]
    ones, twos = torch.ones_like(ids), torch.full_like(ids, 2)
    backbone.extend(prefix, ones, ids=ids)
    mark = prefix.mark()
    expected = backbone.extend(prefix, twos, ids=ids)
    after = prefix.mark()
    prefix.rollback(mark)
    assert prefix.length == mark.length == prefix.cache.get_seq_length()
    backbone.extend(prefix, ones, ids=ids.flip(1))
    parents, bound = torch.ones(2, 1, dtype=torch.long), torch.full((2, 1), mark.length)
    sister = prefix.open_blocks(parents, bound, torch.full((2, 1), 90), bidirectional=True)
    backbone.extend(prefix, torch.full_like(ids, sister), ids=ids)
    prefix.rollback(mark)
    assert torch.equal(backbone.extend(prefix, twos, ids=ids), expected)
    for field in ("positions", "next_position"):
        assert torch.equal(getattr(prefix, field), getattr(after, field))
    assert torch.equal(prefix.visibility.allowed(), after.visibility.allowed())


@torch.no_grad()
def test_fork_is_exact(model):
    backbone = model.backbone
    batch = make_batch(model, samples_of(model), name="all_mask")
    prefix, _ = start(model, batch)
    prefix.open_branches(1)
    ids = batch.ids[:, 20:28]
    ones = torch.ones_like(ids)
    copy = prefix.fork(torch.tensor([0, 1]))
    length = prefix.length
    expected = backbone.extend(prefix, ones, ids=ids)
    assert copy.length == length == copy.cache.get_seq_length()  # what one learns, the other does not
    assert torch.equal(backbone.extend(copy, ones, ids=ids), expected)
    rows = torch.tensor([1, 0, 1])
    mixed = prefix.fork(rows)
    close(
        backbone.extend(mixed, ones[rows], ids=ids[rows].flip(1)), backbone.extend(prefix, ones, ids=ids.flip(1))[rows]
    )
    assert mixed.features.grids == tuple(prefix.features.grids[row] for row in rows)
    assert torch.equal(mixed.features.tokens, prefix.features.tokens[rows])


@torch.no_grad()
def test_mask_pass_equals_the_packed_blocks(model):
    """Masks that hang off a forced answer, behind the cache, are those of training; the cache forgets them."""
    backbone, head = model.backbone, model.head("all_mask")
    examples = examples_of(model, "all_mask")
    batch = make_batch(model, samples_of(model), name="all_mask")
    packed = packed_states(model, batch)[0]
    prefix, branches = start(model, batch)
    mark = prefix.mark()
    prefix.open_branches(4)
    triggers = [
        Trigger(row, k, lead=suffix.ids[: suffix.slots[0] + 1])
        for row, example in enumerate(examples)
        for k, suffix in enumerate(example.suffixes, 1)
    ]
    found = head.cell_logits(backbone, prefix, triggers)
    values = head.classifier(gather(packed, batch.dense_positions))
    for trigger, logits, at in zip(triggers, found, batch.dense_starts.tolist(), strict=True):
        grid = prefix.features.grids[trigger.row]
        assert logits.shape == (1, *grid)
        close(logits.flatten(), values[trigger.row, at : at + grid[0] * grid[1], 0])
    prefix.rollback(mark)

    plain = backbone.generate(prefix, branches, max_new_tokens=4)
    kept = backbone.generate(prefix, branches, max_new_tokens=2, keep=True)
    asked = [Trigger(row, kept.first, lead=(kept.ids[row][0][-1],)) for row in range(2)]
    head.cell_logits(backbone, prefix, asked)
    last = [[tuple(ids[-1:]) for ids in row] for row in kept.ids]
    further = backbone.generate(prefix, last, max_new_tokens=2, first=kept.first)
    for row, expected in enumerate(plain.ids):
        for k, ids in enumerate(expected):
            ended = kept.ids[row][k][-1] == backbone.codec.end_id
            assert ids == kept.ids[row][k] + ([] if ended else further.ids[row][k])


# ---- attention implementations ----------------------------------------------------------------------------------------


def check_same_states(model, other):
    """Packed states of both heads and decoding are those of `model`."""
    other.load_state_dict(model.state_dict())
    for name in HEADS:
        batch = make_batch(model, samples_of(model), name=name)
        real = batch.visibility.block >= 0
        close(packed_states(other, batch)[0][real], packed_states(model, batch)[0][real])
    prefix, branches = start(model, batch)
    expected = model.backbone.generate(prefix, branches, max_new_tokens=3)
    found = other.backbone.generate(start(other, batch)[0], branches, max_new_tokens=3)
    assert found.ids == expected.ids
    close(found.states[1][2], expected.states[1][2])


@torch.no_grad()
def test_eager_equals_sdpa(model):
    other = build(model.backbone.source, attention="eager")
    assert (model.backbone.attention, other.backbone.attention) == ("sdpa", "eager")
    check_same_states(model, other)


@torch.no_grad()
def test_flex_attention_equals_sdpa(model, monkeypatch):
    """FlexAttention without its compiler, which takes five to twenty seconds per kind of mask on a CPU; see the slow test."""
    from torch.nn.attention import flex_attention as flex
    from transformers.integrations.flex_attention import WrappedFlexAttention

    calls = []

    def plain(*args, **kwargs):
        calls.append(kwargs["block_mask"])
        return flex.flex_attention(*args, **kwargs)

    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(WrappedFlexAttention, "__call__", lambda self: plain)
    other = build(model.backbone.source, attention="flex_attention")
    assert other.backbone.attention == "flex_attention"
    assert other.backbone.vision_tower.config._attn_implementation == "sdpa"
    check_same_states(model, other)
    assert calls and all(isinstance(mask, flex.BlockMask) for mask in calls)


@torch.no_grad()
def test_bfloat16_is_close(model):
    """Within the rounding of eight layers; states are up to four in size."""
    other = build(model.backbone.source, dtype="bfloat16")
    other.load_state_dict(model.state_dict())
    other.to(torch.bfloat16)  # as run folders are loaded
    batch = make_batch(model, samples_of(model), name="all_mask")
    states = packed_states(other, batch)[0]
    real = batch.visibility.block >= 0
    assert states.dtype == torch.bfloat16
    close(states.float()[real], packed_states(model, batch)[0][real], 0.25)
    losses, expected = other.loss(batch), model.loss(batch)
    assert all(losses[name] == pytest.approx(float(expected[name]), rel=0.02) for name in ("ce", "bce", "dice"))


@pytest.mark.slow
@torch.no_grad()
def test_compiled_flex_attention_equals_sdpa():
    """As a user runs it. Inference only: torch's FlexAttention has no backward pass on a CPU."""
    size = next(iter(SIZES))
    model, other = build(size), build(size, attention="flex_attention")
    other.load_state_dict(model.state_dict())
    batch = make_batch(model, samples_of(model), name="all_mask")
    real = batch.visibility.block >= 0
    close(packed_states(other, batch)[0][real], packed_states(model, batch)[0][real])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3"])
def test_attention_that_drops_a_visibility_is_refused(size, name):
    with pytest.raises(ValueError, match=rf"'{name}' ignores a visibility; .* one of sdpa, eager, flex_attention$"):
        SIZES[size](size, attention=name)


# ---- folders ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("weights", ["random", "pretrained"])
def test_saved_config_and_weights_give_the_same_states(model, weights, tmp_path):
    """As run folders hold a model (config and a state of their own), and as a stock folder does."""
    backbone = model.backbone
    backbone.save_config(tmp_path / "backbone")
    if weights == "pretrained":
        backbone.model.save_pretrained(tmp_path / "backbone")
    else:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "weights.safetensors")
    adapter = SIZES[backbone.source]
    other = PerceptionModel(
        adapter(str(tmp_path / "backbone"), weights=weights),
        {"mask_decoder": MaskDecoderHead(width=64, heads=4), "all_mask": AllMaskHead()},
    ).eval()
    assert other.num_added_tokens == 0
    if weights == "random":
        other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    for name in HEADS:
        batch, again = (make_batch(m, samples_of(m), name=name) for m in (model, other))
        assert torch.equal(batch.ids, again.ids) and torch.equal(batch.pixels, again.pixels)
        assert torch.equal(packed_states(model, batch)[0], packed_states(other, again)[0])
    codec = backbone.codec
    for field in ("geometry", "template", "coordinates", "rope_axes", "context"):
        assert getattr(other.backbone.codec, field) == getattr(codec, field)


# ---- what trains ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_lora_is_on_the_language_model_only(size):
    """Gradients reach every adapter, and of the vocabulary only the rows of the heads' tokens change."""
    model = build(size, lora=Lora(rank=2, alpha=4, dropout=0), trainable=FROZEN)
    backbone = model.backbone
    layers = len(backbone.language_model.layers)
    adapted = [name for name, _ in backbone.model.named_parameters() if "lora_A" in name]
    assert len(adapted) == 7 * layers and all("language_model.layers." in name for name in adapted)

    def vocabulary():
        ids = torch.arange(backbone.lm_head.weight.shape[0])
        with torch.no_grad():
            return backbone.embed(ids[None])[0].clone(), backbone.lm_head(torch.eye(backbone.text_width)).T.clone()

    before = vocabulary()
    for name in HEADS:
        losses = model.loss(make_batch(model, samples_of(model), name=name))
        sum(value for key, value in losses.items() if not key.startswith("_")).backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
        if "lora_B" in name:
            assert float(parameter.grad.abs().max()) > 0, name
    parts = [p for part in (backbone.vision_tower, backbone.projector) for p in part.parameters()]
    assert parts and not any(parameter.requires_grad for parameter in parts)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1).step()
    embedded, said = (set((a != b).any(1).nonzero()[:, 0].tolist()) for a, b in zip(before, vocabulary()))
    new = {backbone.codec.token_id(token) for head in model.heads.values() for token in head.tokens}
    used = {backbone.codec.token_id(token) for token in ("[SEG]", "<|seg|>", "<|mask|>")}
    assert said == new and used <= embedded <= new
