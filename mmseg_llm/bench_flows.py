"""What `mmseg-llm bench` compares with: the flows of the reference codes, and models to run them on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from mmseg_llm.structures import Prediction, Sample

if TYPE_CHECKING:
    from mmseg_llm.heads.all_mask.head import AllMaskHead
    from mmseg_llm.model import PerceptionModel


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
def stamp_reference(model: PerceptionModel, samples: Sequence[Sample]) -> list[Prediction]:
    """The flow of the published STAMP code, on this library's parts (specification section 2.3).

    Per expression a dialogue with a cache; then, for its mask, the vision tower again and one pass over the whole sequence of
    image, dialogue and mask tokens, with the full attention mask and without the cache.
    """
    from mmseg_llm.backbones.collate import collate
    from mmseg_llm.geometry import frame
    from mmseg_llm.heads.all_mask.answering import Said, finish, open_images
    from mmseg_llm.heads.all_mask.dialogue import question_of
    from mmseg_llm.heads.all_mask.passes import Trigger
    from mmseg_llm.structures import DenseBlock, Example, Suffix

    backbone, codec = model.backbone, model.backbone.codec
    head: AllMaskHead = model.head()  # type: ignore[assignment]
    predictions = []
    for sample in samples:
        for query in sample.queries:
            one = replace(sample, queries=(query,))
            prefix, _ = open_images(head, backbone, [one])
            question = codec.question(question_of(head, [query], None))
            stop = (head.seg_id, head.no_id)
            ids = backbone.generate(prefix, [[question]], max_new_tokens=head.max_new_tokens, stop=stop).ids[0][0]
            canvas = head.canvas(one, codec)
            seen = frame(canvas, codec.geometry.covered(canvas.size))
            grid = codec.geometry.token_grid(canvas.size)
            said = Said(0, [0], codec.decode(ids))
            masks: list[torch.Tensor] = []
            if head.seg_id in ids:
                end = ids.index(head.seg_id) + 1
                block = DenseBlock(head.mask_id, head.grid.offsets(grid, codec.rope_axes), head.is_bidirectional)
                told = (*question, *ids[:end])
                suffix = Suffix(told, (-100,) * len(told), (0,), (len(told) - 1,), block, (0,))
                pixels, start = codec.pixels(canvas), codec.image_prefix(canvas.size)
                batch = collate([Example(head.name, one, canvas, pixels, start, (suffix,))], codec).to(backbone.device)
                features = backbone.encode_images(batch.pixels.to(backbone.model.dtype), batch.canvas_sizes)
                states = backbone(batch, features, head.dense_features(features)).states
                values = head.classifier(states[:, batch.dense_positions[0]])
                masks = [head.grid.arrange(values, grid, head.num_classes)[0].float()]
                said.triggers = [Trigger(0, 1)]
            predictions += [p for _, p in finish(head, one, seen, said, masks, head.upsampling)]
    return predictions
