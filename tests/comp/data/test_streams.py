"""Streams: rows of parquet and webdataset shards as samples, lanes, weights, exact positions, bad rows."""

import io
import itertools
import json
import tarfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy import ColouredRectangles, make_sample_encoder

from comp.config import ConfigError, SourceConfig
from comp.data.batch import BadSampleError, ImageBytes, Sample
from comp.data.encode import load_image
from comp.data.loader import StreamSteps, iterate_steps
from comp.data.streams import CAPTION_QUESTION, Lane, Streams, needs_lanes, sample_from_row

datasets = pytest.importorskip("datasets")
LANES = 4


def png(colour="red", size=(16, 8)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Four parquet files of 11 rows with a picture and a conversation each; row 5 of the second is no conversation."""
    folder = tmp_path_factory.mktemp("shards")
    for number in range(4):
        rows = []
        for row in range(11):
            turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": f"{number}-{row}"}]
            rows.append(dict(id=f"{number}-{row}", image={"bytes": png(), "path": None}, conversations=turns))
        if number == 1:
            rows[5]["conversations"] = [{"from": "gpt", "value": "alone"}]
        features = datasets.Features(
            id=datasets.Value("string"),
            image=datasets.Image(decode=False),
            conversations=[{"from": datasets.Value("string"), "value": datasets.Value("string")}],
        )
        datasets.Dataset.from_list(rows, features=features).to_parquet(folder / f"part-{number}.parquet")
    return folder


def source(shards, **fields):
    return SourceConfig(path=f"{shards}/*.parquet", shuffle=3, **fields)


def names(lane, count):
    """Of the samples, or the message of a bad one."""
    items = [next(lane)[1] for _ in range(count)]
    return [item.messages[-1].text if not isinstance(item, BadSampleError) else "bad" for item in items]


def test_lanes_cover_a_stream_once_per_epoch_in_another_order(shards):
    streams = Streams([source(shards)], lanes=LANES, seed=0)
    first = [names(Lane(streams, n), 22) for n in range(LANES)]
    everything = {f"{a}-{b}" for a in range(4) for b in range(11)} - {"1-5"} | {"bad"}
    assert set().union(*(lane[:11] for lane in first)) == everything
    for lane in first:
        assert sorted(lane[:11]) == sorted(lane[11:]) and lane[:11] != lane[11:]
    assert first[0] == names(Lane(streams, 0), 22), "the same again"
    assert first[0] != names(Lane(Streams([source(shards)], lanes=LANES, seed=1), 0), 22)


@pytest.mark.parametrize("lanes", [2, 4, 8])
@pytest.mark.parametrize("at", [0, 1, 4, 9, 11, 13, 30])
def test_a_lane_goes_on_exactly_where_it_stood(shards, lanes, at):
    """Within windows, between them, and in later epochs; the state is JSON. More lanes than shards share their rows."""
    sources = [source(shards, weight=2), SourceConfig(factory="toy:ColouredRectangles", arguments=dict(size=7))]
    streams = Streams(sources, lanes=lanes, seed=0)
    unbroken = names(Lane(streams, 1), at + 20)
    lane = Lane(streams, 1)
    names(lane, at)
    state = json.loads(json.dumps(lane.state()))
    again = Lane(Streams(sources, lanes=lanes, seed=0), 1, state)
    assert names(again, 20) == unbroken[at:]
    assert state == json.loads(json.dumps(lane.state())), "reading on from a copy changes nothing here"


def test_weights_mix(shards):
    sources = [source(shards, weight=3), SourceConfig(factory="toy:ColouredRectangles", arguments=dict(size=7), weight=1)]
    seen = names(Lane(Streams(sources, lanes=1, seed=0), 0), 400)
    share = sum("-" in text or text == "bad" for text in seen) / 400
    assert abs(share - 0.75) < 0.07  # three standard errors
    assert needs_lanes(sources[1:]) and not needs_lanes([SourceConfig(path="a.json")])


def all_steps(shards, template, world_size=1, num_workers=0, start=0, states=None, count=6):
    streams = Streams([source(shards)], lanes=LANES, seed=0)
    ranks = [
        StreamSteps(streams, make_sample_encoder(template), batch_size=8, num_steps=count, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    shares = [list(iterate_steps(rank, start=start, num_workers=num_workers, states=states)) for rank in ranks]
    found = []
    for step in zip(*shares):
        samples = sorted(name for data in step for batch in data.batches for name in batch.names)
        skipped = sorted(bad for data in step for bad in data.skipped)
        found.append((step[0].step, samples, skipped, {lane: state for data in step for lane, state in data.lanes.items()}))
    return found


def test_steps_are_the_same_for_any_number_of_processes_and_workers(shards, template):
    one = all_steps(shards, template)
    assert all_steps(shards, template, world_size=2, num_workers=2) == all_steps(shards, template, world_size=4) == one
    assert [len(samples) + len(skipped) for _, samples, skipped, _ in one] == [8] * 6
    bad = [place for _, _, skipped, _ in one for place, _ in skipped]
    assert len(bad) == 1 and "lane 1[" in bad[0]
    _, _, _, states = one[2]
    on_two = all_steps(shards, template, world_size=2, start=3, states=json.loads(json.dumps(states)))
    assert on_two == one[3:], "resumed on other processes"


def test_lanes_that_cannot_be_shared_out_are_refused(shards, template):
    with pytest.raises(ConfigError, match="lanes must divide batch_size and be divided by the number of processes"):
        all_steps(shards, template, world_size=3)
    with pytest.raises(ConfigError, match="num_workers must divide the lanes of a process"):
        all_steps(shards, template, num_workers=3)


def test_webdataset_shards(tmp_path):
    record = {"conversations": [{"from": "human", "value": "Which colour?"}, {"from": "gpt", "value": "blue"}]}
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for key, suffix, data in (
            ("0", "png", png("red")),
            ("0", "json", json.dumps(record).encode()),
            ("1", "png", png("blue")),
            ("1", "json", b'{"conversations": []}'),
        ):
            info = tarfile.TarInfo(f"{key}.{suffix}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    streams = Streams([SourceConfig(path=f"{tmp_path}/*.tar")], lanes=1, seed=0)
    lane = Lane(streams, 0)
    items = dict(next(lane) for _ in range(2))
    good = next(item for item in items.values() if not isinstance(item, BadSampleError))
    assert good.messages[0].text == "Which colour?" and good.messages[0].images[0]().size == (16, 8)
    assert sum(isinstance(item, BadSampleError) for item in items.values()) == 1


def test_a_dataset_by_name_or_folder(shards, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-00000-of-00001.parquet").write_bytes((shards / "part-0.parquet").read_bytes())
    streams = Streams([SourceConfig(hub=str(tmp_path))], lanes=1, seed=0)
    assert sorted(names(Lane(streams, 0), 11)) == sorted(f"0-{row}" for row in range(11))


CELL = {"bytes": png(), "path": None}


@pytest.mark.parametrize(
    ("row", "question", "answer", "images"),
    [
        (dict(images=[CELL, CELL], texts=[dict(user="What?", assistant="red", source="x")]), "What?", "red", 2),
        (dict(image=CELL, messages=[dict(role="user", content="<image>What?"), dict(role="assistant", content="red")]),
         "What?", "red", 1),
        (dict(jpg=CELL, txt="a red field\n"), CAPTION_QUESTION, "a red field", 1),
        (dict(jpg=CELL, json=json.dumps(dict(image="00/a.jpg", caption="red"))), CAPTION_QUESTION, "red", 1),
        (dict(image=None, conversations=[{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]), "1+1?", "2", 0),
    ],
)  # fmt: skip
def test_rows_of_the_usual_forms(row, question, answer, images):
    sample = sample_from_row(row, "x[0]", Path())
    assert [m.text for m in sample.messages] == [question, answer]
    assert len(sample.messages[0].images) == images and all(isinstance(i, ImageBytes) for i in sample.messages[0].images)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (dict(image=CELL), r'x\[0\]: needs an object with a list "conversations"'),
        (dict(image="a.png", txt="a"), r"x\[0\]: an image cell must hold bytes or a path"),
        (dict(json=b"{"), r"x\[0\]: json: not valid JSON"),
        (dict(jpg=CELL, json=b'{"image": ["a.jpg", "b.jpg"], "txt": "a"}'), r"x\[0\]: json names 2 images, beside it are 1"),
        (dict(json=b'{"image": {"path": "/a.png"}, "txt": "a"}'), r"x\[0\]: json names 1 images, beside it are 0"),
        (dict(texts=[dict(user="What?", assistant=None)]), r'a turn needs "from"'),
        (dict(texts=[dict(user="What?", assistant="red"), "blue"]), r'a turn needs "from".*got blue'),
        (dict(img=CELL, texts=[dict(user="What?", assistant="red")]), r'x\[0\]: pictures belong in "image".*got "img"'),
        (dict(image_path="a.png", messages=[dict(role="user", content="a")]), r'got "image_path": a.png'),
        (dict(BMP=png(), texts=[dict(user="What?", assistant="red")]), r'got "BMP"'),
        (dict(json=b'{"picture": "a.png", "txt": "a"}'), r'got "picture": a.png'),
        (dict(image=CELL, video=CELL, txt="a"), r'got "video"'),
        ({"__key__": "a", "bmp": png(), "txt": "a"}, r'got "bmp"'),
        (dict(text="a document", url="b.html"), r"x\[0\]: a caption and no picture in image, .*; the row has text, url"),
        (dict(messages=3, txt="a"), r'x\[0\]: needs an object with a list "conversations"'),
        (dict(texts=2.0), r'x\[0\]: needs an object with a list "conversations"'),
        (dict(messages=np.array([[1, 2]])), r'a turn needs "from"'),
        (dict(messages=[dict(role="user", content="a", images=["a.png"])]), r'pictures belong in "image"'),
    ],
)
def test_rows_that_cannot_be_used_are_named(row, message):
    with pytest.raises(BadSampleError, match=message):
        sample_from_row(row, "x[0]", Path())


def test_an_answer_that_a_message_leaves_out_is_not_learned():
    """In a table every message has the field, null where it says nothing."""
    texts = ("What?", "red", None), ("Sure?", "blue", 0.0)
    turns = [
        dict(role=role, content=text, weight=weight)
        for *pair, weight in texts
        for role, text in zip(("user", "assistant"), pair)
    ]
    turns[2]["weight"] = None
    sample = sample_from_row(dict(image=CELL, messages=turns), "x[0]", Path())
    assert [m.text for m in sample.messages if m.role == "assistant" and m.learned] == ["red"]


def readable(count, **source):
    """Captions of those of the first rows whose picture can be read."""
    found = set()
    for place, sample in itertools.islice(Lane(Streams([SourceConfig(**source)], lanes=1, seed=0), 0), count):
        with suppress(BadSampleError):
            if isinstance(sample, Sample):
                load_image(sample.messages[0].images[0], place)
                found.add(sample.messages[-1].text)
    return found


def test_cells_that_name_files_stay_below_the_shards(tmp_path):
    """Or below `images`; all others need a word from the user."""
    data = tmp_path / "data"
    names = [
        "in/a.png", "../b.png", "c.png", str(tmp_path / "b.png"), str(data / "in" / "a.png")
    ]  # fmt: skip
    inside, _, link, absolute, home = names
    (data / "in").mkdir(parents=True)
    for path in (data / inside, tmp_path / "b.png"):
        path.write_bytes(png())
    (data / link).symlink_to(tmp_path / "b.png")
    rows = [dict(image={"bytes": None, "path": name}, caption=name) for name in names]
    text = datasets.Value("string")
    features = datasets.Features(image={"bytes": datasets.Value("binary"), "path": text}, caption=text)
    datasets.Dataset.from_list(rows, features=features).to_parquet(data / "part.parquet")
    for path in (data / "part.parquet", tmp_path / "*" / "part.parquet"):
        expected = {inside, home} if path.parent == data else {absolute, home}
        assert readable(5, path=str(path)) == expected
    assert readable(5, path=str(data / "*.parquet"), images=str(tmp_path)) == {absolute, home}
    assert readable(5, path=str(data / "*.parquet"), images_anywhere=True) == set(names)
    with pytest.raises(BadSampleError, match=r"x\[0\]: /etc/a.png leads out of .*images_anywhere=true"):
        sample_from_row(dict(jpg={"path": "/etc/a.png"}, txt="a"), "x[0]", data)


def test_a_folder_of_pictures(tmp_path):
    """The library gives absolute names."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "a.png").write_bytes(png())
    (pictures / "metadata.jsonl").write_text('{"file_name": "a.png", "caption": "red"}\n')
    (tmp_path / "link").symlink_to(pictures)
    assert readable(1, hub=str(pictures)) == readable(1, hub=str(tmp_path / "link")) == {"red"}


def test_wrong_sources_are_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    for path, message in ((f"{tmp_path}/*.tar", "matches no file"), (f"{tmp_path}/a.parquet", "cannot be read")):
        with pytest.raises(ConfigError, match=message):
            Streams([SourceConfig(path=path)], lanes=1, seed=0)
    with pytest.raises(ConfigError, match="exactly one of path, hub and factory"):
        SourceConfig(path="a.json", hub="a/b")
    with pytest.raises(ConfigError, match=r"data\.sampling of .*a\.parquet must be all, got 'first:3'"):
        Streams([SourceConfig(path=f"{tmp_path}/a.parquet", sampling="first:3")], lanes=1, seed=0)
    for field, source in (
        ("subset", dict(path="a.parquet", subset="b")),
        ("arguments", dict(hub="a", arguments=dict(size=1))),
        ("images", dict(factory="a:b", images="c")),
    ):
        with pytest.raises(ConfigError, match=rf"data\.{field} is for a"):
            SourceConfig(**source)


def test_rectangles_have_answers_without_a_dash():
    """What tells the two sources of the mixtures apart."""
    assert all("-" not in ColouredRectangles(7)[i].messages[-1].text for i in range(7))
