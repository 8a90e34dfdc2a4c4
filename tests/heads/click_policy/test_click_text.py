"""Codec, answers and prompts of the click policy."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmseg_llm.heads.click_policy.codec import CODECS, QWEN_BOX, QWEN_MILLI, UNIT_DECIMAL, ClickCodec
from mmseg_llm.heads.click_policy.prompts import QWEN_PROMPT, ClickPrompts, qwen_prompt, qwen_question
from mmseg_llm.heads.click_policy.text import Status, parse, parse_official, select_official, write, write_box
from mmseg_llm.structures import Click

POINT_CODECS = [QWEN_MILLI, UNIT_DECIMAL, ClickCodec(axis_order="xy"), ClickCodec(scale=100, decimals=1, iou_scale=1)]
SIZE = (480, 640)


# ---- codec


@pytest.mark.parametrize("codec", [*CODECS.values(), *POINT_CODECS], ids=str)
def test_every_pixel_of_small_images_comes_back(codec: ClickCodec):
    """Pixels of images no larger than the number of steps, and always inside.

    Where float64 cuts off at 999 pixels, five of them have no number: the codec gives their neighbour.
    """
    for extent in [*range(1, 40), 333, 427, 480, 500, 640, 997, 998, 999, 1000]:
        for pixel in range(extent):
            row, col = codec.decode(codec.encode(pixel, 0, (extent, 7)), (extent, 7))
            is_exact = extent <= codec.scale * 10**codec.decimals and (codec.rounding, extent) != ("truncate", 999)
            assert 0 <= row < extent and col == 0
            assert abs(row - pixel) <= (0 if is_exact else 1), (extent, pixel)


@given(st.integers(1, 5000), st.integers(1, 5000), st.data())
def test_large_images_lose_less_than_a_step(height: int, width: int, data: st.DataObject):
    row, col = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    for codec in POINT_CODECS:
        numbers = codec.encode(row, col, (height, width))
        assert all(0 <= number <= codec.largest for number in numbers)
        got = codec.decode(numbers, (height, width))
        assert abs(got[0] - row) <= max(1, height / 1000) and abs(got[1] - col) <= max(1, width / 1000)


def test_axis_order_and_clamping():
    assert QWEN_MILLI.encode(240, 64, SIZE) == (500, 100)
    assert ClickCodec(axis_order="xy").encode(240, 64, SIZE) == (100, 500)
    assert QWEN_MILLI.decode((999, 999), (480, 500)) == (479, 499)
    assert QWEN_MILLI.decode((999, 999), (480, 500), clamp=False) == (480, 500)
    assert QWEN_MILLI.decode((float("inf"), -3), SIZE) == (479, 0)
    assert QWEN_MILLI.decode((500, 500), (333, 500)) == (166, 250)  # 166.5: halves go to the even pixel


def test_boxes_come_back():
    for box in [(0, 0, 640, 480), (68, 308, 255, 400), (639, 479, 640, 480), (1, 2, 3, 4)]:
        assert QWEN_BOX.decode_box(QWEN_BOX.encode_box(box, SIZE), SIZE) == box
    assert QWEN_BOX.encode_box((-5, 0, 700, 480), SIZE) == (0, 0, 999, 999)  # cut to the image
    with pytest.raises(ValueError, match="has no pixel"):
        QWEN_BOX.encode_box((10, 10, 10, 20), SIZE)


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_metadata_round_trip(codec: ClickCodec):
    assert ClickCodec.from_metadata(json.loads(json.dumps(codec.to_metadata()))) == codec


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"axis_order": "yx"}, "axis_order is 'yx'"),
        ({"rounding": "up"}, "rounding is 'up'"),
        ({"scale": 0}, "scale is 0"),
        ({"iou_scale": 0}, "iou_scale is 0"),
        ({"decimals": -1}, "decimals is -1"),
        ({"scale": 1}, "cannot tell pixels apart"),
    ],
)
def test_codec_errors(fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        ClickCodec(**fields)


def test_more_codec_errors():
    with pytest.raises(ValueError, match="codec metadata has the fields"):
        ClickCodec.from_metadata({"scale": 1000})
    with pytest.raises(ValueError, match="outside of an image"):
        QWEN_MILLI.encode(480, 0, SIZE)
    with pytest.raises(ValueError, match=r"iou is 74; it must lie in \[0, 1\]"):
        QWEN_MILLI.write_iou(74)


# ---- answers


@given(
    st.sampled_from(POINT_CODECS),
    st.integers(0, 479),
    st.integers(0, 639),
    st.booleans(),
    st.none() | st.integers(0, 100),
    st.none() | st.tuples(st.integers(0, 300), st.integers(0, 200), st.integers(1, 300), st.integers(1, 200)),
)
def test_written_answers_are_read_back(codec, row, col, is_positive, percent, corner):
    click = Click(row, col, is_positive)
    iou = None if percent is None else percent / 100
    box = None if corner is None else (corner[0], corner[1], corner[0] + corner[2], corner[1] + corner[3])
    text = write(click, SIZE, codec, iou, box=box, expression="positive point (1, 2), finish")
    action = parse(text, SIZE, codec)
    assert (action.status, action.click, action.box, action.overshoot) == (Status.OK, click, box, 0.0), text
    assert action.iou == (None if iou is None else pytest.approx(iou)), text
    if codec == QWEN_MILLI and box is None:
        official = parse_official(text)
        assert official.is_positive == is_positive
        assert QWEN_MILLI.decode(official.point, SIZE) == (row, col)


def test_canonical_answers():
    assert write(Click(175, 483, True), (1000, 1000), iou=0.74) == "Current IOU: 74, Positive point: (175, 483)"
    assert write(None, SIZE, iou=0.9, is_finished=True) == "Current IOU: 90, Finish"
    assert write(None, SIZE, iou=1.0) == "Current IOU: 100"
    assert write(Click(240, 64, False), SIZE, UNIT_DECIMAL) == "Negative point: (0.500, 0.100)"
    box = write_box((0, 0, 320, 480), SIZE, "left man")
    assert box == "<ref>left man</ref><box>(0,0),(500,999)</box>"
    assert (
        write(Click(0, 0, True), SIZE, box=(0, 0, 320, 480), expression="left man") == f"{box} Positive point: (0, 0)"
    )
    with pytest.raises(ValueError, match="nothing to answer"):
        write(None, SIZE)
    with pytest.raises(ValueError, match="either a click or the finish"):
        write(Click(0, 0, True), SIZE, is_finished=True)


@pytest.mark.parametrize(
    ("text", "status", "point", "iou"),
    [
        (" Positive point: (200, 534)", "ok", (200, 534), None),
        ("negative POINT (200,534)", "ok", (200, 534), None),
        ("Current IOU: 74\nPositive point: (175, 483)<|im_end|>", "ok", (175, 483), 0.74),
        ("Current IOU: 85.2, Positive point: (5.0, 3)", "ok", (5, 3), 0.852),
        ("Current mIoU: 0 Negative point: ( 1 ,  2 )", "ok", (1, 2), 0.0),
        ("Current IOU: 10Positive point: (1, 1)", "ok", (1, 1), 0.1),
        ("Current IOU: 90Finish", "finish", None, 0.9),
        ("Nonpositive point: (1, 1)", "malformed", None, None),
        ("Current IOU: 62%, Positive point: (1, 1)", "ok", (1, 1), 0.62),
        ("Current IOU: 740, Positive point: (1, 1)", "ok", (1, 1), None),
        ("Positive point: (7, 8). Positive point: (7, 8).", "ok", (7, 8), None),
        ("Finish", "finish", None, None),
        ("Current IOU: 93, finished.</s>", "finish", None, 0.93),
        ("", "no_action", None, None),
        ("<|im_end|>", "no_action", None, None),
        ("Current IOU: 93", "no_action", None, 0.93),
        ("<ref>finish line</ref><box>(1,1),(9,9)</box>", "no_action", None, None),
        ("nonsense", "malformed", None, None),
        ("Positive point: (0.5, 0.3)", "malformed", None, None),
        ("Positive point: 200, 534", "malformed", None, None),
        ("Positive point: (12, 34, 56)", "malformed", None, None),
        ("Positive point: (abc, 3)", "malformed", None, None),
        ("Negative point: (10,20) and Positive point: (30,40)", "malformed", None, None),
        ("Positive point: (10, 20) Finish", "malformed", None, None),
        ("Positive point: (1200, 40)", "out_of_range", (999, 40), None),
        ("Positive point: (-5, 40)", "out_of_range", (0, 40), None),
        (f"Positive point: ({'9' * 6000}, 40)", "out_of_range", (999, 40), None),
    ],
)
def test_parser_table(text: str, status: str, point: tuple | None, iou: float | None):
    action = parse(text, (1000, 1000))
    assert action.status == status
    assert action.iou == (None if iou is None else pytest.approx(iou))
    assert (None if action.click is None else (action.click.row, action.click.col)) == point
    assert (action.overshoot > 0) == (status == "out_of_range")


def test_numbers_follow_the_codec():
    assert parse("Positive point: (0.5, 0.3)", SIZE, UNIT_DECIMAL).click == Click(240, 192, True)
    assert parse("Positive point: (1, 0)", SIZE, UNIT_DECIMAL).overshoot == pytest.approx(0.001)
    assert parse("Positive point: (500, 300)", SIZE, UNIT_DECIMAL).status is Status.OUT_OF_RANGE
    assert parse("Positive point: (1003, 300)", SIZE).overshoot == pytest.approx(0.004)
    assert parse("Current IOU: 0.85", SIZE, ClickCodec(iou_scale=1)).iou == 0.85
    assert parse("Positive point: (100, 500)", SIZE, ClickCodec(axis_order="xy")).click == Click(240, 64, True)


FRAGMENTS = st.sampled_from(
    ["Positive point", "negative point", ": ", "point: ", "(", ")", ",", " ", "\n", "Current IOU: ", "Finish", "<ref>", "</ref>",
     "<box>", "</box>", "(1,2),(3,4)", "12", "-5", "0.5", "1e9", ".", "9" * 400, "%", "<|im_end|>", "</s>", "٣", "nan", "_1"]
)  # fmt: skip


@settings(max_examples=1000, deadline=None)
@given(st.lists(FRAGMENTS | st.text(max_size=3), min_size=60, max_size=120))
def test_no_answer_raises(fragments: list[str]):
    """Ten answers per example: 10,000 in all."""
    for start in range(10):
        check_readable("".join(fragments[start::10]))


def check_readable(text: str):
    action = parse(text, SIZE)
    if action.click is None:
        assert action.status not in (Status.OK, Status.OUT_OF_RANGE)
    else:
        assert 0 <= action.click.row < SIZE[0] and 0 <= action.click.col < SIZE[1]
        assert action.status in (Status.OK, Status.OUT_OF_RANGE)
    assert action.iou is None or 0 <= action.iou <= 1
    parse_official(text)
    select_official([text, None])


def test_official_selection():
    assert select_official([]) is None
    assert select_official(["Current IOU: 10", "Current IOU: 50", "Current IOU: 50"]) == 0  # the first of equals
    assert select_official(["Current IOU: 10", "Current IOU: 50", "Current IOU: 60"]) == 1
    assert select_official(["Current IOU: 10", "Current IOU: 50", "oops"]) == 0


# ---- prompts


def test_qwen_prompt_agrees_with_its_pieces():
    caption = "the {IMAGE} {CAPTION} Man, left."
    prompt = qwen_prompt(caption, "x.jpg")
    assert prompt == QWEN_PROMPT.format(IMAGE="x.jpg", CAPTION=caption)
    assert prompt.endswith("".join(qwen_question(caption)) + "<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("index", [0, 1])
def test_questions_say_what_the_codec_does(index: int):
    prompts = ClickPrompts()
    text = prompts.question("the {colour} dog", index=index)
    for part in ("the {colour} dog", "(row, column)", "integers", "0 at the top left to 999", "green mask", "0 to 100"):
        assert part in text, part
    example = text[text.index("Current IOU") :]
    assert parse(example, SIZE).status is Status.OK
    codec = ClickCodec(axis_order="xy", scale=1, decimals=3, iou_scale=1)
    text = prompts.question("dog", codec, "blue", index=index)
    for part in ("(x, y)", "decimals", "0.000 at the top left to 0.999", "blue mask", "0 to 1.00"):
        assert part in text, part
    assert "0.483, 0.175" in text  # the column comes first


def test_prompt_errors():
    with pytest.raises(ValueError, match="at least one question"):
        ClickPrompts(())
    with pytest.raises(ValueError, match=r"lacks \{x\}, the place of the expression"):
        ClickPrompts(("{colour} {range} {iou} {example}",))
