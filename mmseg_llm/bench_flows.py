"""What `mmseg-llm bench` compares with: the flows of the reference codes, and models to run them on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from mmseg_llm.backbones.codec import IGNORE_INDEX
from mmseg_llm.structures import Prediction, Sample

if TYPE_CHECKING:
    from mmseg_llm.backbones.features import VisionFeatures
    from mmseg_llm.heads.all_mask.head import AllMaskHead
    from mmseg_llm.model import PerceptionModel
    from mmseg_llm.structures import Canvas


def untrained_model(source: str = "internvl-tiny", head_name: str = "mask_decoder") -> PerceptionModel:
    """A tiny model that always says its trigger first, so that every query costs a mask, with masks that are not trivial.

    Args:
        source: a tiny size of any family.
        head_name: `mask_decoder` or `all_mask`.

    Raises:
        ValueError: for another size or head.
    """
    from mmseg_llm.backbones import InternVLBackbone, LlavaBackbone, QwenVLBackbone
    from mmseg_llm.backbones.collate import collate
    from mmseg_llm.backbones.sizes import INTERNVL, LLAVA, QWEN_VL
    from mmseg_llm.heads import AllMaskHead, MaskDecoderHead
    from mmseg_llm.model import PerceptionModel

    families = ((INTERNVL, InternVLBackbone), (QWEN_VL, QwenVLBackbone), (LLAVA, LlavaBackbone))
    found = [family for sizes, family in families if source in sizes and "tiny" in source]
    heads = {"mask_decoder": lambda: MaskDecoderHead(heads=4, max_new_tokens=8), "all_mask": lambda: AllMaskHead()}
    if not found or head_name not in heads:
        tiny = [name for sizes, _ in families for name in sizes if "tiny" in name]
        raise ValueError(
            f"no tiny model '{head_name}' on '{source}'; heads: {', '.join(heads)}; backbones: {', '.join(tiny)}"
        )
    torch.manual_seed(0)
    model = PerceptionModel(found[0](source), {head_name: heads[head_name]()}).eval()
    head, codec = model.head(), model.backbone.codec
    sample = scenes("flat-96", 1, 1)[0]
    with torch.no_grad():  # point the row of the trigger to the states that start an answer
        batch = collate([head.build(sample, codec, np.random.default_rng(0))], codec)
        states = model.backbone(batch).states
        start = states[0, batch.labels[0].ne(-100).nonzero()[0, 0] - 1]
        model.backbone.model.get_output_embeddings().weight[codec.token_id(head.tokens[0])] = start
        if isinstance(head, AllMaskHead):  # as many cells on either side
            head.classifier.weight.normal_(std=0.2)
            head.classifier.bias.sub_(head.classifier(states[0, batch.dense_positions[0]]).median(0).values)
    return model


def scenes(level: str, images: int, queries: int) -> list[Sample]:
    """Synthetic samples with exactly `queries` expressions each (repeated where a scene has fewer)."""
    from mmseg_llm.data.synthetic import make_scene

    samples = []
    for index in range(images):
        sample = make_scene(level, seed=7, index=index).to_sample()
        texts = [sample.queries[i % len(sample.queries)] for i in range(queries)]
        samples.append(replace(sample, queries=tuple(replace(q, id=str(i)) for i, q in enumerate(texts))))
    return samples


def one_at_a_time(model: PerceptionModel, samples: Sequence[Sample]) -> list[Prediction]:
    """One expression at a time: the image is encoded and prefilled again for each of them."""
    return [
        prediction
        for sample in samples
        for query in sample.queries
        for prediction in model.predict([replace(sample, queries=(query,))])
    ]


@torch.no_grad()
def stamp_flow(model: PerceptionModel, samples: Sequence[Sample], *, is_cached: bool) -> list[Prediction]:
    """STAMP as its published code runs it, on this library's parts (specification section 2.3): one expression at a time, a
    dialogue with a cache, and for its mask the vision tower again.

    Args:
        model: with an `all_mask` head.
        samples: asked about.
        is_cached: whether the mask tokens run on the cache of the dialogue, as the published inference does; otherwise the whole
            sequence of image, dialogue and mask tokens is computed again, as its training and its plain form do.
    """
    from mmseg_llm.geometry import frame
    from mmseg_llm.heads.all_mask.answering import Said, find_triggers, finish
    from mmseg_llm.heads.all_mask.dialogue import question_of

    backbone, codec = model.backbone, model.backbone.codec
    head: AllMaskHead = model.head()  # type: ignore[assignment]
    stop = (head.seg_id, head.no_id)
    predictions = []
    for sample in samples:
        for query in sample.queries:
            one = replace(sample, queries=(query,))
            canvas = head.canvas(one, codec)
            pixels = torch.from_numpy(codec.pixels(canvas))[None].to(backbone.device, backbone.model.dtype)
            prefix = backbone.prefill(backbone.encode_images(pixels), [codec.image_prefix(canvas.size)])
            question = codec.question(question_of(head, [query], None))
            said = backbone.generate(prefix, [[question]], max_new_tokens=head.max_new_tokens, stop=stop, keep=True)
            ids = said.ids[0][0]
            masks: list[torch.Tensor] = []
            triggers = find_triggers(head, 0, said.first, ids, said.places[0][0])
            if triggers:
                features = backbone.encode_images(pixels)  # once more for the mask
                if is_cached:
                    masks = head.cell_logits(backbone, prefix, triggers, head.dense_features(features))
                else:
                    told = (*question, *ids[: ids.index(head.seg_id) + 1])
                    masks = [_uncached_mask(model, one, canvas, told, features)]
            seen = frame(canvas, codec.geometry.covered(canvas.size))
            answer = Said(0, [0], codec.decode(ids), triggers)
            predictions += [p for _, p in finish(head, one, seen, answer, masks, head.upsampling)]
    return predictions


def _uncached_mask(
    model: PerceptionModel, sample: Sample, canvas: Canvas, told: tuple[int, ...], features: VisionFeatures
) -> torch.Tensor:
    """Cells `(C, h, w)` of a dialogue that ends in its trigger, from one pass over everything."""
    from mmseg_llm.backbones.collate import collate
    from mmseg_llm.structures import DenseBlock, Example, Suffix

    backbone, codec = model.backbone, model.backbone.codec
    head: AllMaskHead = model.head()  # type: ignore[assignment]
    grid = codec.geometry.token_grid(canvas.size)
    block = DenseBlock(head.mask_id, head.grid.offsets(grid, codec.rope_axes), head.is_bidirectional)
    suffix = Suffix(told, (IGNORE_INDEX,) * len(told), (0,), (len(told) - 1,), block, (0,))
    unused = np.zeros((3, 1, 1), np.float32)  # the features are known
    example = Example(head.name, sample, canvas, unused, codec.image_prefix(canvas.size), (suffix,))
    batch = collate([example], codec).to(backbone.device)
    states = backbone(batch, features, head.dense_features(features)).states
    values = head.classifier(states[:, batch.dense_positions[0]])
    return head.grid.arrange(values, grid, head.num_classes)[0].float()
