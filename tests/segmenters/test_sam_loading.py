"""Where SAM weights come from: lazily, strictly, and with an error that names the file."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from mmseg_llm.segmenters import RefineError, SamRefiner, SegmentAnythingEngine, TransformersSamEngine
from segmenters.tiny_sam import SAM, SAM2, make_engine, make_image, make_logits, make_sam


def test_missing_or_foreign_weights_are_named(tmp_path):
    image, logits = make_image(), make_logits()
    with pytest.raises(RefineError, match=r"needs its weights; download sam_vit_h_4b8939\.pth"):
        SamRefiner().refine(image, logits)
    with pytest.raises(RefineError, match=r"absent\.pth does not exist; download sam_vit_b_01ec64\.pth"):
        SamRefiner(model="vit_b", checkpoint=str(tmp_path / "absent.pth")).refine(image, logits)
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(RefineError, match=r"text\.pth is no vit_b"):
        SamRefiner(model="vit_b", checkpoint=str(tmp_path / "text.pth")).refine(image, logits)
    (tmp_path / "folder").mkdir()
    with pytest.raises(RefineError, match=r"folder' cannot be read.*sam2\.1-hiera-tiny"):
        SamRefiner(model=str(tmp_path / "folder")).refine(image, logits)
    with pytest.raises(ValueError, match="no model 'vit_x'"):
        SegmentAnythingEngine("vit_x")


def test_checkpoint_is_loaded_strictly(tmp_path, monkeypatch):
    import segment_anything

    monkeypatch.setitem(segment_anything.sam_model_registry, "vit_b", lambda checkpoint: make_sam())
    state = SAM.state_dict()
    torch.save(state, tmp_path / "good.pth")
    refiner = SamRefiner(model="vit_b", checkpoint=str(tmp_path / "good.pth"), device="cpu")
    assert refiner.engine.module is None, "nothing is loaded before the first image"
    expected = SamRefiner(SegmentAnythingEngine.of(SAM)).refine(make_image(), make_logits())
    before = torch.get_rng_state()
    assert refiner.refine(make_image(), make_logits()) == expected
    assert torch.equal(torch.get_rng_state(), before)
    state.pop("mask_decoder.iou_token.weight")
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(RefineError, match=r"bad\.pth is no vit_b"):
        SamRefiner(model="vit_b", checkpoint=str(tmp_path / "bad.pth"), device="cpu").refine(
            make_image(), make_logits()
        )


@pytest.mark.parametrize("kind", ["transformers", "sam2"])
def test_transformers_folders_are_loaded(kind, tmp_path):
    engine = make_engine(kind)
    engine.module.save_pretrained(tmp_path)
    expected = SamRefiner(engine).refine(make_image(), make_logits())
    refiner = SamRefiner(model=str(tmp_path), device="cpu")
    assert refiner.refine(make_image(), make_logits()) == expected
    assert refiner.engine.is_stretched == (kind == "sam2")
    if kind == "transformers":
        assert refiner.engine.module.mask_decoder.transformer.layer_norm_final_attn.eps == 1e-5


def test_sam2_video_checkpoints_give_their_image_part(tmp_path):
    """The hub's SAM 2 files are of the video model."""
    from transformers import Sam2VideoConfig, Sam2VideoModel

    config = SAM2.config
    video = Sam2VideoConfig(
        vision_config=config.vision_config.to_dict(),
        prompt_encoder_config=config.prompt_encoder_config.to_dict(),
        mask_decoder_config=config.mask_decoder_config.to_dict(),
        memory_attention_num_layers=1,
    )
    with torch.random.fork_rng():
        Sam2VideoModel(video).save_pretrained(tmp_path)
    engine = TransformersSamEngine(str(tmp_path), device="cpu")
    engine.prepare()
    assert type(engine.module).__name__ == "Sam2Model"
    assert (engine.image_side, engine.mask_side, engine.is_stretched) == (64, 16, True)


def test_importing_the_package_imports_no_framework():
    code = (
        "import sys, mmseg_llm.segmenters as s; dir(s); "
        "print([m for m in ('torch', 'cv2', 'transformers', 'segment_anything') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
