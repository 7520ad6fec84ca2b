"""Fields and marks of LLaVA records that mean something: served, refused by name, or said to be passed over."""

import json
import os
import pickle

import pytest
from PIL import Image

from comp.config import SourceConfig
from comp.data.batch import IGNORED, BadSampleError, Sample
from comp.data.datasets import LlavaDataset
from comp.data.encode import image_size, load_image
from comp.data.mixture import open_sources
from comp.data.records import sample_from_record
from comp.eval import vqa


def turn(speaker, value, **fields):
    return {"from": speaker, "value": value, **fields}


def record(question="What is it?", answer="red", **fields):
    return {"conversations": [turn("human", question), turn("gpt", answer)], **fields}


def read(record, tmp_path):
    return sample_from_record(record, "data.json[3]", tmp_path)


def refusal(record, tmp_path):
    with pytest.raises(BadSampleError) as caught:
        read(record, tmp_path)
    assert str(caught.value).startswith("data.json[3]")
    str(caught.value).encode()
    return str(caught.value)


# --- fields that would be missed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"image_path": "a.png"},
        {"imagePath": "folder/000123"},
        {"image_file": "a"},
        {"img": "a.png"},
        {"images": ["a.png"]},
        {"images": [{"bytes": "..."}]},
        {"pictures": {"path": "a.png"}},
        {"depth_map": "a.png"},
        {"file": "page.pdf"},
        {"x": ["a.jpeg?size=2"]},
        {"url": "https://example.org/a.webp"},
        {"blob": "data:image/png;base64,AAAA"},
        {"video": "a"},
        {"audio_path": "a.wav"},
        {"image_base64": "iVBORw0KGgo="},
        {"imgB64": "iVBORw0KGgo="},
        {"pixel_values": [[1, 2], [3, 4]]},
        {"screenshot": "a"},
        {"x": "IMG_0001.HEIF"},
        {"x": "scan.dcm"},
        {"x": "speech.m4a"},
    ],
    ids=str,
)
def test_pictures_in_other_fields_are_refused(tmp_path, fields):
    (field,) = fields
    assert f'pictures belong in "image" (a text or a list), got "{field}"' in refusal(record(**fields), tmp_path)


@pytest.mark.parametrize("field", ["images", "video", "audio_path", "img"])
def test_a_second_source_of_media_is_refused_beside_an_image(tmp_path, field):
    assert f'got "{field}"' in refusal(record("<image> q", image="a.png", **{field: "b.png"}), tmp_path)


@pytest.mark.parametrize("fields", [{"image": "b.png"}, {"images": ["b.png"]}, {"video": "v"}, {"mask": "m.png"}], ids=str)
def test_pictures_of_a_turn_are_refused(tmp_path, fields):
    bad = record()
    bad["conversations"][0] |= fields
    assert f'got "{next(iter(fields))}" in a turn' in refusal(bad, tmp_path)


@pytest.mark.parametrize("field", ["image", "answers", "options"])
@pytest.mark.parametrize("value", [0, False, 3.5, True, {"a": 1}, [None]], ids=str)
def test_lists_of_texts_that_are_none(tmp_path, field, value):
    assert f'"{field}" must be a list of texts' in refusal(record(**{field: value}), tmp_path)


@pytest.mark.parametrize("field", ["system_prompt", "system_message", "systemPrompt"])
def test_a_system_text_under_another_name_is_refused(tmp_path, field):
    assert f'a system text belongs in "system", got "{field}"' in refusal(record(**{field: "In French."}), tmp_path)


def test_what_is_passed_over_is_said(tmp_path):
    fields = dict(
        id="7", source="coco", width=3, image_id=5, mask="m.png", caption="red", score=0.5, weight=1, none=None, empty=[]
    )
    rich = record("<image> q", image="a.png", **fields)
    rich["conversations"][1]["bbox"] = [0, 0, 1, 1]
    assert read(rich, tmp_path).notes == [
        'data.json: field "mask" is not read',
        'data.json: field "caption" is not read',
        'data.json: field "score" is not read',
        'data.json: field "bbox" of a turn is not read',
    ]
    assert read(record(id="7", source="coco"), tmp_path).notes == []
    assert read(record(**{"\ud800": 1}), tmp_path).notes == ['data.json: field "\\ud800" is not read']


def test_notes_are_said_once(capsys):
    for note in ("a", "b", "a"):
        vqa.say_once(note)
    assert capsys.readouterr().err.split() == ["a", "b"]


# --- the system text, and which answers are learned --------------------------------------------------------------------------


def test_the_system_field_is_the_first_turn(tmp_path):
    sample = read(record(system="Answer in French."), tmp_path)
    assert (sample.messages[0].role, sample.messages[0].text) == ("system", "Answer in French.")
    for nothing in (None, ""):
        assert read(record(system=nothing), tmp_path).messages[0].role == "user"
    twice = record(system="Answer in French.")
    twice["conversations"].insert(0, turn("system", "Answer in Greek."))
    assert "the only system text" in refusal(twice, tmp_path)
    assert '"system" must be a text' in refusal(record(system=["x"]), tmp_path)
    assert "half a character" in refusal(record(system="\ud800"), tmp_path)
    assert "<image>" in refusal(record(system="<image>", image="a.png"), tmp_path)


def conversation(*answers):
    turns = [t for i, (text, fields) in enumerate(answers) for t in (turn("human", f"q{i}"), turn("gpt", text, **fields))]
    return {"conversations": turns}


@pytest.mark.parametrize("left_out", [{"weight": 0}, {"weight": 0.0}, {"loss": False}, {"train": False}, {"loss": 0}], ids=str)
def test_answers_left_out_are_not_learned(template, tmp_path, left_out):
    messages = read(conversation(("wide", {}), ("tall", left_out), ("red", {"weight": 1, "loss": True})), tmp_path).messages
    assert [m.learned for m in messages if m.role == "assistant"] == [True, False, True]
    ids, labels = template.encode(messages, [])
    end = [template.turn_end]
    assert [i for i in labels if i != IGNORED] == template.encode_text("wide") + end + template.encode_text("red") + end
    assert template.encode_text("tall")[0] in ids, "it is read all the same"
    assert template.alignment_text(Sample(name="x", messages=messages)) == "wide red"


def test_an_empty_answer_is_not_learned_as_silence(template, tmp_path):
    messages = read(conversation(("wide", {}), (" \n", {}), ("red", {})), tmp_path).messages
    _, labels = template.encode(messages, [])
    end = [template.turn_end]
    assert [i for i in labels if i != IGNORED] == template.encode_text("wide") + end + template.encode_text("red") + end
    assert template.alignment_text(Sample(name="x", messages=messages)) == "wide red"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (conversation(("red", {"weight": 0})), "no answer is learned"),
        (conversation(("", {}), ("red", {"loss": False})), "no answer is learned"),
        (conversation(("red", {"weight": 0.5})), '"weight" of a turn must be 0 or 1'),
        (conversation(("red", {"loss": "false"})), '"loss" of a turn must be 0 or 1'),
        (conversation(("red", {"weight": float("nan")})), '"weight" of a turn must be 0 or 1'),
        ({"conversations": [turn("human", "q", weight=1), turn("gpt", "a")]}, "only answers are learned"),
        (record(weight=0), '"weight" belongs to a turn'),
        (record(loss=False), '"loss" belongs to a turn'),
        (record(weight=0.3), '"weight" belongs to a turn'),
        (conversation(("red", {"loss_mask": 0})), 'is said by weight, loss, train (0 or 1), got "loss_mask": 0'),
        (conversation(("red", {"train_detail": [{"begin_offset": 0}]})), 'got "train_detail"'),
        (conversation(("red", {"loss_scale": 0.0})), 'got "loss_scale"'),
        (conversation(("red", {"training": False})), 'got "training"'),
        (conversation(("red", {"masked": True})), 'got "masked"'),
        (conversation(("red", {"mask": 0})), 'got "mask"'),
        (record(loss_mask=[0, 1]), '"loss_mask" belongs to a turn'),
        (record(train_on_input=True), '"train_on_input" belongs to a turn'),
    ],
    ids=str,
)
def test_weights_that_are_no_mask_are_refused(tmp_path, bad, message):
    assert message in refusal(bad, tmp_path)


def test_fields_of_weight_that_say_what_is_done_anyway(tmp_path):
    plain = {"conversations": [turn("human", "q", weight=0), turn("gpt", "a", weight=None)], "weight": 1}
    assert read(plain, tmp_path).messages[1].learned and read(plain, tmp_path).notes == []


# --- marks -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mark",
    "<video> <audio> <image_1> <image1> <IMAGE> <Image> <image/> <img> <|image_pad|> <|image_1|> <|image|> <|vision_start|> "
    "<|video_pad|> <|AUDIO|> <ImageHere> <IMG_CONTEXT> <start_of_image> <image_soft_token> <fake_token_around_image> [IMG] "
    "<image_placeholder> <speech> </image> <frame> <region_1> [IMAGE] [IMG_1] [IMAGE1]".split(),
)
def test_marks_of_other_formats_are_refused(tmp_path, mark):
    assert f"the mark {mark} is not read" in refusal(record(f"<image> What is {mark}?", image="a.png"), tmp_path)
    assert f"the mark {mark} is not read" in refusal(record(system=f"See {mark}."), tmp_path)


def test_a_mark_with_a_space(tmp_path):
    assert "the mark <image 1> is not read" in refusal(record("Compare <image 1> with it"), tmp_path)


@pytest.mark.parametrize(
    "text",
    ["a < b > c", "<imageUrl>", "<video src='a'>", "x<y and y>image", "<|im_end|>", "<b>", "[img]", "[IMAGERY]", "{img}"],
)
def test_other_text_stays_text(tmp_path, text):
    assert read(record(text), tmp_path).messages[0].text == text


@pytest.mark.parametrize("text", ['Explain <img src="a.png">', "See ![a plot](plots/a.png)."])
def test_pictures_that_a_text_refers_to_are_said(tmp_path, text):
    """They are not seen, but may be what is asked about."""
    sample = read(record(text), tmp_path)
    assert sample.messages[0].text == text and len(sample.notes) == 1 and "a picture that a text refers to" in sample.notes[0]
    assert read(record(answer=text), tmp_path).notes == []


def test_answers_may_hold_html_but_no_marks_of_models(tmp_path):
    assert read(record(answer="Use <video> or <img>."), tmp_path).messages[1].text == "Use <video> or <img>."
    assert "the mark <|image_pad|>" in refusal(record(answer="<|image_pad|>"), tmp_path)


# --- odd values --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "odd",
    [
        record(id="\ud800", image=3),
        record(images="\ud800.png"),
        record(question_type="\ud800"),
        record(metric="\udfff"),
        record(**{"image_\ud800": "a.png"}),
        record(options=["\ud800"]),
    ],
    ids=ascii,
)
def test_messages_can_be_printed(tmp_path, odd):
    refusal(odd, tmp_path)  # encodes the message


def test_names_can_be_printed_and_are_short(tmp_path):
    assert read(record(id="\ud800"), tmp_path).name == "data.json[3] \\ud800"
    assert len(read(record(id="x" * 10_000), tmp_path).name) < 120


def test_depth_that_shows_late(tmp_path):
    """Brackets that the JSON reader still takes, in a field whose content is looked at."""
    deep = "[" * 900 + "]" * 900
    line = f'{{"conversations": [{{"from": "human", "value": "q"}}, {{"from": "gpt", "value": "a", "x": {deep}}}]}}'
    (tmp_path / "deep.jsonl").write_text(line + "\n")
    try:
        assert LlavaDataset(tmp_path / "deep.jsonl")[0].notes
    except BadSampleError as error:
        assert "brackets" in str(error) or "not valid JSON" in str(error)


# --- image names -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    """data/images/in.png, out.png, and links within the folder to both."""
    images = tmp_path / "data" / "images"
    (images / "sub").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(images / "in.png")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "out.png")
    (images / "link_in.png").symlink_to(images / "in.png")
    (images / "link_out.png").symlink_to(tmp_path / "out.png")
    (images / "linked").symlink_to(tmp_path)
    (tmp_path / "alias").symlink_to(images)
    return tmp_path


def open_one(folders, image, images="data/images", **options):
    (folders / "data" / "d.jsonl").write_text(json.dumps(record("<image> q", image=image)) + "\n")
    sample = LlavaDataset(folders / "data" / "d.jsonl", folders / images, **options)[0]
    return load_image(sample.messages[0].images[0], sample.name)


@pytest.mark.parametrize("image", ["in.png", "./in.png", "sub/../in.png", "link_in.png"])
def test_image_names_within_their_folder(folders, image):
    assert open_one(folders, image).size == (8, 8)
    assert open_one(folders, image, "alias").size == (8, 8), "the folder itself may be a link"


@pytest.mark.parametrize(
    "image", ["{}/out.png", "{}/data/images/in.png", "../../out.png", "sub/../../../out.png", "linked/out.png", "link_out.png"]
)
def test_image_names_that_lead_out_are_refused(folders, image):
    image = image.format(folders)
    with pytest.raises(BadSampleError, match=r"d\.jsonl\[0\].*leads out of .*images.*data\.images_anywhere=true") as caught:
        open_one(folders, image)
    assert image in str(caught.value)
    assert open_one(folders, image, images_anywhere=True).size == (8, 8)


def test_the_check_travels_to_workers(folders):
    (folders / "data" / "d.jsonl").write_text(json.dumps(record("<image> q", image="link_out.png")) + "\n")
    image = LlavaDataset(folders / "data" / "d.jsonl", folders / "data" / "images")[0].messages[0].images[0]
    copy = pickle.loads(pickle.dumps(image))
    assert copy == image == str(folders / "data" / "images" / "link_out.png")
    with pytest.raises(BadSampleError, match="by a symbolic link"):
        load_image(copy, "s")


def test_the_field_reaches_files_and_mixtures(folders):
    (folders / "data" / "d.jsonl").write_text(json.dumps(record("<image> q", image="../../out.png")) + "\n")
    entry = "datasets:\n- {json_path: d.jsonl, images: images"
    (folders / "data" / "strict.yaml").write_text(entry + "}\n")
    (folders / "data" / "free.yaml").write_text(entry + ", images_anywhere: true}\n")
    (folders / "data" / "odd.yaml").write_text(entry + ", images_anywhere: perhaps}\n")
    images = str(folders / "data" / "images")

    def opens(name, **fields):
        return open_sources([SourceConfig(path=str(folders / "data" / name), **fields)], 0)[0]

    for name in ("d.jsonl", "strict.yaml"):
        with pytest.raises(BadSampleError, match="leads out"):
            opens(name, images=images)
        assert opens(name, images=images, images_anywhere=True)
    assert opens("free.yaml")
    with pytest.raises(ValueError, match="images_anywhere must be true or false, got 'perhaps'"):
        opens("odd.yaml")


def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(BadSampleError, match=r"s: image .*pipe\.png: ValueError: a named pipe"):
        load_image(str(tmp_path / "pipe.png"), "s")
    assert image_size(str(tmp_path / "pipe.png")) == (0, 0)
