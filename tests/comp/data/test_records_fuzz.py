"""Records that nobody thought of: read as a plain definition reads them, or refused by name, and never anything else."""

import json

import pytest
from fuzzing import budget
from hypothesis import example, given
from hypothesis import strategies as st
from toy import make_tokenizer

from comp.data.batch import IGNORED, BadSampleError
from comp.data.datasets import LlavaDataset
from comp.data.encode import ImageSettings, SampleEncoder, reference_answers
from comp.data.records import sample_from_record
from comp.data.template import ChatTemplate, load_tokenizer

PLACE = "data.json[3]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("records")


@pytest.fixture(scope="module")
def encoder(folder):
    make_tokenizer().save_pretrained(folder)
    settings = dict(patch_size=4, merge_size=2, mean=(0.5,) * 3, std=(0.5,) * 3, resolution=None)
    images = ImageSettings(**settings, min_visual_tokens=1, max_visual_tokens=16)
    return SampleEncoder(ChatTemplate(load_tokenizer(str(folder))), images, max_text_tokens=100_000)


# --- against a plain definition ----------------------------------------------------------------------------------------------

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
FOREIGN = ("<video>", "<image_1>", "<|image_pad|>", "<Image>")
words = st.sampled_from(["<image>", "<image>", "red", " ", "\n", "é", "<b>", "<", "image>", *FOREIGN[:2]])
texts = st.lists(words, max_size=4).map("".join) | st.sampled_from(["What?", "red", "wide", "", " "])
flags = st.sampled_from([0, 1, True, False, 0.0, 1.0, None, 0.5, "1"])
weights = st.dictionaries(st.sampled_from(["weight", "loss", "train"]), flags, max_size=1)


@st.composite
def conversations(draw):
    """Mostly alternating, now and then in any order."""
    if draw(st.integers(0, 9)) == 0:
        speakers = draw(st.lists(st.sampled_from(list(ROLES)), max_size=4))
    else:
        speakers = ["human", "gpt"] * draw(st.integers(1, 3))
        speakers = ["system", *speakers] if draw(st.booleans()) else speakers
    chance = draw(st.integers(0, 3))
    return [{"from": s, "value": draw(texts), **(draw(weights) if chance == 0 else {})} for s in speakers]


@st.composite
def records(draw):
    record = {"conversations": draw(conversations()), "image": [f"{i}.png" for i in range(draw(st.integers(0, 3)))]}
    if draw(st.integers(0, 3)) == 0:
        record["system"] = draw(texts | st.none() | st.just(3))
    return record


def plain_reading(record):
    """[(role, text, images, learned)], or None where the record is refused: the rules one after another."""
    turns = list(record["conversations"])
    system = record.get("system")
    if system not in (None, ""):
        if not isinstance(system, str) or "<image>" in system or any(t["from"] == "system" for t in turns):
            return None
        turns.insert(0, {"from": "system", "value": system})
    roles = [ROLES[t["from"]] for t in turns]
    answers = roles[1:] if roles[:1] == ["system"] else roles
    if not answers or len(answers) % 2 or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(answers)):
        return None
    for turn, role in zip(turns, roles):
        text = turn["value"].replace("<image>", "")
        if role != "user" and "<image>" in turn["value"]:
            return None
        if any(mark in text for mark in (FOREIGN if role != "assistant" else FOREIGN[2:3])):
            return None
        for value in (turn.get(field) for field in ("weight", "loss", "train")):
            if value is not None and (isinstance(value, str) or value not in (0, 1) or (value and role != "assistant")):
                return None
    images, marked = list(record["image"]), sum(t["value"].count("<image>") for t in turns)
    if marked not in (0, len(images)):
        return None
    result, first = [], True
    for turn, role in zip(turns, roles):
        shown = turn["value"].count("<image>")
        if not marked and role == "user" and first:
            shown, first = len(images), False
        learned = role == "assistant" and all(turn.get(f) is None or turn[f] == 1 for f in ("weight", "loss", "train"))
        text = turn["value"].replace("<image>", "").strip()
        result.append((role, text, [images.pop(0) for _ in range(shown)], learned and text != ""))
    return result if any(learned for *_, learned in result) else None


@budget(400)
@given(record=records())
def test_records_are_read_as_defined(record, folder, encoder):
    expected = plain_reading(record)
    try:
        sample = sample_from_record(record, PLACE, folder)
    except BadSampleError as error:
        assert expected is None, (str(error), expected)
        return
    assert expected is not None, sample
    learned = [m.role == "assistant" and m.learned and m.text != "" for m in sample.messages]
    found = [(m.role, m.text, [image.name for image in m.images], flag) for m, flag in zip(sample.messages, learned)]
    assert found == expected

    template = encoder.template
    ids, labels = template.encode(sample.messages, [2] * len(record["image"]))
    assert len(ids) == len(labels) and ids.count(template.image_id) == 2 * len(record["image"])
    answers = [template.encode_text(text) + [template.turn_end] for _, text, _, flag in expected if flag]
    assert [i for i in labels if i != IGNORED] == [i for answer in answers for i in answer]
    assert all(label in (IGNORED, i) for i, label in zip(ids, labels))
    assert template.alignment_text(sample) == " ".join(text for _, text, _, flag in expected if flag)


# --- any JSON, and any bytes -------------------------------------------------------------------------------------------------

any_text = st.text(st.characters(exclude_categories=()), max_size=6)  # halves of characters too
names = st.sampled_from(
    "from value weight loss train image images system id answers options metric question_type conversations source mask url "
    "video path bytes".split()
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text | texts | st.just("a.png"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names | any_text, inner, max_size=3),
    max_leaves=8,
)


@st.composite
def odd_records(draw):
    """A record with one or two values replaced or added, on any level."""
    record = draw(records())
    for _ in range(draw(st.integers(1, 2))):
        places = [record, *(t for t in record["conversations"] if isinstance(t, dict))] if _is_record(record) else [{}]
        draw(st.sampled_from(places))[draw(names | any_text)] = draw(anything)
    return record


def _is_record(record):
    return isinstance(record.get("conversations"), list)


def check_reading(dataset, encoder):
    """Every record of the file is a sample that can be encoded and named, or refused by name; nothing else is raised."""
    for index in range(len(dataset)):
        place = f"{dataset.path.name}[{index}]"
        try:
            sample = dataset[index]
            assert sample.name.startswith(place)
            for text in (sample.name, sample.question_type, sample.metric or "", *sample.notes, *reference_answers(sample)):
                text.encode()
            for message in sample.messages:
                message.images.clear()
            encoded = encoder.encode(sample)
            assert any(label != IGNORED for label in encoded.labels)
            encoder.encode_prompt(sample)
        except BadSampleError as error:
            assert str(error).startswith(place)
            str(error).encode()


@budget(300)
@given(odd=st.lists(odd_records() | anything, min_size=1, max_size=3), lines=st.booleans())
@example(odd=[{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "\ud800"}]}], lines=True)
def test_any_json_is_read_or_refused_by_name(odd, lines, folder, encoder):
    path = folder / ("odd.jsonl" if lines else "odd.json")
    path.write_text("\n".join(map(json.dumps, odd)) if lines else json.dumps(odd))
    dataset = LlavaDataset(path)
    assert len(dataset) == len(odd)
    check_reading(dataset, encoder)


@budget(300)
@given(record=odd_records() | records(), cut=st.integers(0, 400), paste=st.binary(max_size=3))
def test_any_bytes_are_read_or_refused_by_name(record, cut, paste, folder, encoder):
    """A line whose middle was overwritten."""
    line = json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass")
    cut = cut % len(line)
    (folder / "bytes.jsonl").write_bytes(line[:cut] + paste + line[cut + len(paste) :] + b"\n")
    check_reading(LlavaDataset(folder / "bytes.jsonl"), encoder)
