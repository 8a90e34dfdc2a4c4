"""Conversations: both layouts, masks per trigger, what is left out, what is refused."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from mmseg_llm.backbones import QwenVLBackbone
from mmseg_llm.backbones.collate import collate
from mmseg_llm.data import Concat, DialogueDataset
from mmseg_llm.heads import AllMaskHead
from mmseg_llm.model import PerceptionModel
from mmseg_llm.structures import Mask

SIZE = (24, 30)
SQUARE = [[2, 2, 10, 2, 10, 8, 2, 8]]
SEG = "<|seg|>"


@pytest.fixture
def root(tmp_path):
    """A folder with an image and masks of all kinds."""
    folder = tmp_path / "images"
    (folder / "a").mkdir(parents=True)
    Image.new("RGB", SIZE[::-1], (200, 10, 10)).save(folder / "a/7.jpg")
    mask = np.zeros(SIZE, np.uint8)
    mask[3:9, 4:12] = 255
    Image.fromarray(mask).save(folder / "a/7_0.png")
    Image.fromarray(mask).convert("1").save(folder / "bits.png")
    Image.fromarray(mask // 255).save(folder / "ones.png")
    Image.fromarray(mask // 2).save(folder / "gray.png")
    Image.fromarray(mask[:-1]).save(folder / "small.png")
    Image.fromarray(mask).convert("RGB").save(folder / "rgb.png")
    Image.fromarray(mask // 255).convert("P").save(folder / "palette.png")
    (folder / "broken.png").write_bytes((folder / "a/7_0.png").read_bytes()[:60])
    (folder / "text.png").write_text("no image")
    return folder


def llava(*texts, **more):
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": "7", "image": "a/7.jpg", "conversations": turns} | more


def typed(*contents, **more):
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"images": ["a/7.jpg"], "masks": None, "messages": turns} | more


def read(root, *records, **arguments):
    path = root.parent / "talk.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return DialogueDataset(path, root, **arguments)


def test_llava(root):
    rle = Mask.from_coco(SQUARE, SIZE).to_coco()
    texts = (
        "<image>\nWhat is this?",
        "A square.",
        "Where?",
        f"Here {SEG} and {SEG}.",
        "More?",
        f"No: {SEG}",
        "Ok?",
        "Ok.",
    )
    dataset = read(root, llava(*texts, masks=[SQUARE, "a/7_0.png", []]), llava("Hi\n<image>", "Hello"))
    assert len(dataset) == 2 and dataset.skipped == {}
    sample = dataset[0]
    assert (sample.id, sample.size, sample.source, sample.image) == ("a/7.jpg", SIZE, "talk", root / "a/7.jpg")
    first, second, third, fourth = sample.queries
    assert (first.text, first.answer, first.history, first.masks) == ("What is this?", "A square.", (), None)
    assert all(query.task == "chat" for query in sample.queries)
    assert second.history == (("What is this?", "A square."),) and len(third.history) == 2
    assert second.masks[0].to_coco() == rle and second.masks[1].area == 48
    assert third.masks == (Mask.empty(SIZE),) and third.is_no_target and fourth.masks is None
    assert [query.id for query in sample.queries] == ["7-0", "7-1", "7-2", "7-3"]
    other = dataset[-1]
    assert (other.queries[0].text, other.queries[0].id) == ("Hi", "7.2-0"), "a repeated id stays distinct"
    facts = dataset.describe()
    assert (facts["samples"], facts["images"], facts["queries"]) == (2, 1, 5)
    assert (facts["no_target"], facts["multi_target"]) == (1, 1)
    assert sample.load_image().size == SIZE[::-1]
    with pytest.raises(IndexError):
        dataset[2]


def test_last_turn_and_count(root):
    record = llava("a", f"b {SEG}", "c", f"d {SEG}", masks=["a/7_0.png", SQUARE])
    dataset = read(root, record, record, turns="last", max_samples=1, name="last")
    (query,) = dataset[0].queries
    assert len(dataset) == 1 and dataset.name == "last" and list(dataset.query_counts()) == [("a/7.jpg", 1)]
    assert query.history == (("a", f"b {SEG}"),) and query.masks == (Mask.from_coco(SQUARE, SIZE),)


def test_typed_chat_in_jsonl(root):
    text = {"type": "text", "text": "Where is it?"}
    records = [
        typed([{"type": "image"}, text], f"Here: {SEG}", masks=["bits.png"]),
        typed(
            [{"image": "a/7.jpg"}, {"text": "Two "}, {"text": "parts"}], [{"type": "text", "text": "Yes"}], images=None
        ),
        typed("plain", "answer"),
    ]
    path = root.parent / "talk.jsonl"
    path.write_text("\n".join([json.dumps(record) for record in records] + [""]), encoding="utf-8")
    dataset = DialogueDataset(path, root)
    queries = [sample.queries[0] for sample in dataset]
    assert [query.text for query in queries] == ["Where is it?", "Two parts", "plain"]
    assert [query.id for query in queries] == ["0-0", "1-0", "2-0"]
    assert queries[0].masks[0].area == 48 and queries[1].masks is None and queries[1].answer == "Yes"
    path.write_text(f"{json.dumps(records[2])}\n{{oops\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"talk\.jsonl: line 2 is not valid JSON"):
        DialogueDataset(path, root)


def test_left_out_records_are_counted(root):
    several = [llava("<image> <image> Compare", "ok"), typed("x", "y", images=["a/7.jpg", "a/8.jpg"])]
    several.append(typed([{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Compare"}], "ok"))
    text_only = [llava("Hi", "Hello", image=None), {"id": "t", "conversations": [{"from": "gpt", "value": "Hi"}]}]
    dataset = read(root, *several, llava("a", "b"), *text_only)
    assert len(dataset) == 1
    assert dataset.skipped == {"several images": 3, "no image": 2} == dataset.describe()["skipped"]


@pytest.mark.parametrize(
    ("bad", "reason", "message"),
    [
        (llava("a", "b", "c"), "no answer", "record 7: its last question has no answer"),
        (llava("<image>", "b"), "empty turn", "record 7: its turn 0 has no text"),
        (
            typed("a", "b", messages=[{"role": "system", "content": "s"}]),
            "order of turns",
            "record number 1: .*'system'",
        ),
        (llava("a", f"b {SEG}"), "number of masks", r"0 masks for 1 <\|seg\|>"),
        (llava("a", "b", masks=["a/7_0.png"]), "number of masks", r"1 masks for 0 <\|seg\|>"),
        (llava("a", f"b {SEG}", masks="a/7_0.png"), "number of masks", "one per trigger"),
        (llava("a", f"b {SEG}", masks=[[1, 2, 3]]), "unknown mask", r"mask '\[1, 2, 3\]' is no RLE"),
        (llava("a", f"b {SEG}", masks=["../x.png"]), "path outside", "'../x.png' leads out of the folder"),
        (llava("a", "b", image="a/../../x.jpg"), "path outside", "leads out of"),
        (llava("a", "b", image="/etc/passwd"), "path outside", "leads out of"),
        (llava("a", "b", image="a\0.jpg"), "path outside", "leads out of"),
        (llava("a", "b", image="a/8.jpg"), "missing file", "a/8.jpg does not exist"),
        (llava("a", "b", image={"bytes": 1}), "image path", "give the path of a file"),
        (llava(3, "b"), "unknown content", "content '3', which is neither"),
        (llava(), "no conversation", "no turns under"),
        (["x"], "no record", "record number 1: it is not a JSON object"),
    ],
)
def test_broken_record(root, bad, reason, message):
    with pytest.raises(ValueError, match=message) as error:
        read(root, llava("a", "b"), bad, check_files=True)
    assert "talk.json: record" in str(error.value) and "on_error='skip'" in str(error.value)
    dataset = read(root, llava("a", "b"), bad, check_files=True, on_error="skip")
    assert len(dataset) == 1 and dataset.skipped == {reason: 1}


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ("ones.png", "has the value 1; masks are 0 outside and 255 inside, so multiply"),
        ("gray.png", "has the value 127"),
        ("small.png", "is 23x30 .* but its image 24x30"),
        ("rgb.png", "has the mode RGB; save it as 8-bit gray"),
        ("palette.png", "has the mode P"),
        ("broken.png", "cannot be decoded"),
        ("text.png", "cannot be decoded"),
        ("none.png", "none.png does not exist"),
        ({"size": [5, 5], "counts": [25]}, "RLE size"),
        ({"counts": "x"}, "an RLE needs"),
        ([[1, 2]], "no polygon with at least 3 points"),
    ],
)
def test_unusable_mask(root, mask, message):
    dataset = read(root, llava("a", f"b {SEG}", masks=[mask]))
    with pytest.raises(ValueError, match=message) as error:
        dataset[0]
    assert "talk.json: record 7: " in str(error.value)


def test_unusable_image_and_arguments(root):
    for image, message in [("a/8.jpg", "a/8.jpg does not exist"), ("text.png", "text.png cannot be decoded")]:
        with pytest.raises(ValueError, match=f"record 7: .*{message}"):
            read(root, llava("a", "b", image=image))[0]
    inside = read(root, llava("a", "b", image=str(root / "a/7.jpg")), llava("a", "b", image="a/../a/7.jpg"))
    assert [sample.size for sample in inside] == [SIZE, SIZE], "what stays within the folder is no escape"
    cases = [
        ({"turns": "first"}, "turns is 'first'; use 'all' or 'last'"),
        ({"on_error": "ignore"}, "use 'raise' or 'skip'"),
        ({"path": root / "none.json"}, "none.json does not exist"),
        ({"path": root / "none.jsonl"}, "none.jsonl does not exist"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            DialogueDataset(**{"path": root.parent / "talk.json", "images": root} | change)
    (root / "dict.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="is not a list of conversations"):
        DialogueDataset(root / "dict.json", root)


def test_masks_of_their_own_folder_and_workers(root):
    own = root.parent / "masks"
    own.mkdir()
    (root / "bits.png").rename(own / "bits.png")
    dataset = read(root, llava("a", f"\ud83d {SEG} \u00e9", masks=["bits.png"]), masks=own, check_files=True)
    copy = pickle.loads(pickle.dumps(dataset))  # what a spawned worker gets
    assert copy[0].queries[0].masks[0].area == 48 and copy[0].queries[0].answer.endswith("\u00e9")


def test_dialogues_train_with_the_head(root):
    """Batches with and without triggers leave a gradient in every parameter, as DDP without a search for unused ones needs."""
    head = AllMaskHead()
    model = PerceptionModel(QwenVLBackbone("qwen2_vl-tiny"), {"all_mask": head})
    talk = read(
        root, llava("What is it?", "It is red.", "Where?", f"Here {SEG} and {SEG}.", masks=[SQUARE, "a/7_0.png"])
    )
    plain = read(root, llava("What is it?", "It is red."), name="plain")
    dataset = Concat([talk, plain], repeats=(1, 2))
    codec, rng = model.backbone.codec, np.random.default_rng(0)
    examples = [head.build(sample, codec, rng) for sample in dataset]
    assert [len(example.targets) for example in examples] == [2, 0, 0]
    for chosen in (examples, examples[1:]):
        model.zero_grad()
        losses = model.loss(collate(chosen, codec, head.label_padding))
        sum(value for name, value in losses.items() if not name.startswith("_")).backward()
        assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert (losses["dice"] > 0) == (chosen is examples)
