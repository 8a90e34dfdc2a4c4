"""Loading: shares of ranks, seeds, and what a data config offers."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mmseg_llm.backbones import InternVLBackbone
from mmseg_llm.backbones.collate import collate
from mmseg_llm.data.base import SampleDataset
from mmseg_llm.data.synthetic import make_scene
from mmseg_llm.heads import MaskDecoderHead
from mmseg_llm.heads.base import NoExampleError
from mmseg_llm.model import PerceptionModel
from mmseg_llm.training import PerceptionDataModule, PerceptionModule
from mmseg_llm.training.data import EpochSampler, _Rendered
from mmseg_llm.training.module import Optimization


class Scenes(SampleDataset):
    """Scenes made on the fly."""

    def __init__(self, count: int = 4) -> None:
        self.count, self.name, self.skipped = count, "scenes", {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        return make_scene("flat-96", 0, index).to_sample()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    head = MaskDecoderHead(heads=4, dropout=0.0, max_new_tokens=8)
    return PerceptionModel(InternVLBackbone("internvl-tiny", template="plain"), {"mask_decoder": head})


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_an_epoch_without_duplicates(world):
    samplers = [EpochSampler(11, seed=5, rank=rank, world=world) for rank in range(world)]
    shares = [[index for index, _ in sampler] for sampler in samplers]
    together = [index for share in shares for index in share]
    assert len(set(together)) == len(together) == 11 // world * world
    for sampler in samplers:
        sampler.set_epoch(1)
    assert [[index for index, _ in sampler] for sampler in samplers] != shares


def test_too_few_samples_for_the_processes():
    with pytest.raises(ValueError, match="2 samples cannot feed 3 processes"):
        EpochSampler(2, 0, 0, 3)


def test_rendering_depends_on_seed_epoch_and_index_only(model):
    head, codec = model.head(), model.backbone.codec
    rendered = _Rendered(Scenes(), head, codec, seed=3)
    first, again, later = rendered[(1, 0)], rendered[(1, 0)], rendered[(1, 1)]
    assert first.suffixes == again.suffixes
    np.testing.assert_array_equal(first.pixels, again.pixels)
    assert first.prefix == later.prefix


def test_missing_split_is_named():
    with pytest.raises(ValueError, match=r"data\.test"):
        PerceptionDataModule(train=Scenes()).dataset("test")


@pytest.mark.parametrize(
    ("dtype", "precision"), [("float32", "32-true"), ("bfloat16", "bf16-mixed"), ("float32", "bf16-true")]
)
def test_trains_in_every_precision_of_a_cpu(dtype, precision, tmp_path):
    from lightning import Trainer

    torch.manual_seed(0)
    module = PerceptionModule(
        InternVLBackbone("internvl-tiny", template="plain", dtype=dtype, gradient_checkpointing=True),
        {"mask_decoder": MaskDecoderHead(heads=4, dropout=0.0, max_new_tokens=4)},
        Optimization(lr=1e-3),
    )
    trainer = Trainer(
        max_steps=2, accelerator="cpu", precision=precision, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        accumulate_grad_batches=2, default_root_dir=tmp_path,
    )  # fmt: skip
    before = module.model.head().decoder.conv2.weight.detach().clone()
    trainer.fit(module, datamodule=PerceptionDataModule(train=Scenes(), val=Scenes(2), batch_size=2, num_workers=0))
    assert trainer.global_step == 2
    assert not torch.equal(before, module.model.head().decoder.conv2.weight.detach().to(before.dtype))
    assert np.isfinite(float(trainer.callback_metrics["train/loss"]))
    assert "val/cIoU" in trainer.callback_metrics


def test_optimizer_groups():
    module = PerceptionModule(
        InternVLBackbone("internvl-tiny", template="plain"),
        {"mask_decoder": MaskDecoderHead(heads=4)},
        Optimization(lr=1.0, head_lr=2.0, weight_decay=0.1),
    )
    module._trainer = SimpleNamespace(estimated_stepping_batches=100)
    model = module.model
    optimizer = module.configure_optimizers()["optimizer"]
    rates = {group["initial_lr"] for group in optimizer.param_groups}
    assert rates == {1.0, 2.0}
    for group in optimizer.param_groups:
        assert group["weight_decay"] == 0 or all(p.dim() > 1 for p in group["params"])
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    assert count == len(list(model.parameters()))


def test_official_and_clean_padding_labels(model):
    head, codec = model.head(), model.backbone.codec
    rng = np.random.default_rng(0)
    examples = [head.build(Scenes()[i], codec, rng) for i in range(3)]
    clean, official = collate(examples, codec), collate(examples, codec, label_padding=0)
    padding = clean.visibility.block < 0
    assert padding.any()
    assert (clean.labels[padding] == -100).all()
    assert (official.labels[padding] == 0).all()
    assert torch.equal(clean.labels[~padding], official.labels[~padding])


class _Picky:
    """A head that learns from even samples only."""

    name, label_padding = "picky", -100

    def for_workers(self):
        return self

    def build(self, sample, codec, rng):
        if sample % 2:
            raise NoExampleError(f"sample {sample} is odd")
        return sample


class _Numbers(SampleDataset):
    name, skipped = "numbers", {}

    def __init__(self, *numbers):
        self.numbers = numbers

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index):
        return self.numbers[index]


def test_samples_without_an_example_are_replaced_and_told():
    rendered = _Rendered(_Numbers(*range(10)), _Picky(), None, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rendered[4, 0] == 4
    with pytest.warns(UserWarning, match="another sample is taken: sample"):
        first = rendered[3, 0]
    with pytest.warns(UserWarning):
        assert first % 2 == 0 and rendered[3, 0] == first
    with (
        pytest.warns(UserWarning, match="sample 1 is odd"),
        pytest.raises(
            ValueError, match="100 samples of numbers in a row cannot be learnt from; the last: sample 1 is odd"
        ),
    ):
        _Rendered(_Numbers(1, 1), _Picky(), None, seed=0)[0, 0]
