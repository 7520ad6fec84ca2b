"""Data: LLaVA records, mixtures, order, encoding under limits, packing, collation, steps over ranks, unusable samples."""

import json
import multiprocessing
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from toy import ColouredRectangles, make_sample_encoder
from transformers import BloomConfig, GPT2Config, LlamaConfig, MambaConfig, MptConfig

from comp.config import ConfigError, SourceConfig
from comp.data.batch import BadSampleError, ImageBytes, Message, Sample
from comp.data.datasets import LlavaDataset
from comp.data.encode import SampleEncoder, reference_answers
from comp.data.loader import StepDataset, iterate_steps
from comp.data.mixture import SampleOrder, choose_indices, open_sources
from comp.data.packing import EncodedSample, collate, empty_batch, pack, pad_right, share_out
from comp.limits import NO_LIMIT, count_positions, position_limit
from comp.model.mrope import mrope_position_ids
from comp.train.prior import count_words


def record(question, answer="red", **fields):
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **fields}


def write_llava(folder, records, name="data.json"):
    path = folder / name
    if name.endswith("l"):
        path.write_text("\n".join(json.dumps(r) for r in records) + "\n\n")
    else:
        path.write_text(json.dumps(records))
    return path


# --- LLaVA format ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_llava_records_become_samples(tmp_path, name):
    path = write_llava(
        tmp_path,
        [
            record("<image>\nWhat is it?", image="a.png", id="x7"),
            record(
                "Compare <image> with <image>", image=["a.png", "b.png"], answers=["red", "crimson"], question_type="colour"
            ),
            record("No picture here"),
            record("A picture without marker", image="a.png"),
            record("All else is null", image=None, images=[], answers=None, metric=None, question_type=None),
        ],
        name,
    )
    one, two, text, unmarked, nulls = (LlavaDataset(path)[i] for i in range(5))
    assert one.name == f"{name}[0] x7" and one.messages[0].text == "What is it?"
    assert one.messages[0].images == [str(tmp_path / "a.png")]
    assert two.messages[0].images == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    assert two.messages[0].text == "Compare  with" and two.question_type == "colour"
    assert reference_answers(two) == ["red", "crimson"] and reference_answers(one) == ["red"]
    assert text.messages[0].images == [] and unmarked.messages[0].images == [str(tmp_path / "a.png")]
    assert (nulls.metric, nulls.question_type, nulls.messages[0].images) == (None, "all", [])
    assert len(LlavaDataset(path)) == 5


def two_turns(first, second):
    values = (("human", first), ("gpt", "a"), ("human", second), ("gpt", "b"))
    return [{"from": speaker, "value": value} for speaker, value in values]


def test_images_of_later_turns_stay_there(tmp_path):
    turns = two_turns("<image> <image> First", "<image> Second")
    path = write_llava(tmp_path, [{"image": ["1.png", "2.png", "3.png"], "conversations": turns}])
    messages = LlavaDataset(path, images="/pictures")[0].messages
    assert messages[0].images == ["/pictures/1.png", "/pictures/2.png"]
    assert messages[2].images == ["/pictures/3.png"]


def test_images_without_any_marker_come_first_and_in_order(tmp_path):
    path = write_llava(tmp_path, [{"image": ["1.png", "2.png"], "conversations": two_turns("First", "Second")}])
    assert LlavaDataset(path, images="/pictures")[0].messages[0].images == ["/pictures/1.png", "/pictures/2.png"]


@pytest.mark.parametrize("turns", [("<image> q", "r"), ("q", "<image> r"), ("<image> q", "<image> r")])
def test_fewer_markers_than_images_are_refused(tmp_path, turns):
    """Texts say "the first picture": a picture left over would stand in the wrong place without a word."""
    path = write_llava(tmp_path, [{"image": ["1.png", "2.png", "3.png"], "conversations": two_turns(*turns)}])
    with pytest.raises(BadSampleError, match="fewer <image> markers than its 3 images"):
        LlavaDataset(path)[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"conversations": [{"from": ["human"], "value": "x"}, {"from": "gpt", "value": "y"}]}', 'a turn needs "from"'),
        ('{"conversations": [{"from": "human", "value": "x\\ud800"}, {"from": "gpt", "value": "y"}]}', "half a character"),
        ('{"answers": ["\\ud800"], "conversations": [{"from": "human", "value": "x"}]}', "half a character"),
        ("[" * 100_000 + "]" * 100_000, "not valid JSON"),
    ],
    ids=["role", "value", "answers", "depth"],
)
def test_odd_records_are_named(tmp_path, line, message):
    (tmp_path / "odd.jsonl").write_text(line + "\n")
    with pytest.raises(BadSampleError, match=message):
        LlavaDataset(tmp_path / "odd.jsonl")[0]


def test_brackets_too_deep_for_the_reader_name_the_file(tmp_path):
    (tmp_path / "odd.json").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(ConfigError, match=r"odd.json must hold a JSON list"):
        LlavaDataset(tmp_path / "odd.json")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"image": "a.png"}, 'list "conversations"'),
        (record("<image> <image>", image="a.png"), "more <image> markers than its 1 images"),
        ({"conversations": [{"from": "human", "value": "q"}]}, "must alternate"),
        ({"conversations": [{"from": "robot", "value": "q"}]}, 'a turn needs "from"'),
        (record("q", answer=""), "every answer is empty"),
        (record("q", answer="<image>", image="a.png"), "only allowed in user turns"),
        (record("q", image={"bytes": ""}), '"image" must be a list of texts'),
        (record("q", images=["a.png"]), 'pictures belong in "image" (a text or a list), got "images"'),
        (record("q", video="a.mp4"), 'pictures belong in "image"'),
        (record("q", answers=[3]), '"answers" must be a list of texts'),
        (record("q", question_type=["a"]), '"question_type" must be a text'),
    ],
)
def test_unusable_records_are_named(tmp_path, bad, message):
    path = write_llava(tmp_path, [record("fine"), bad])
    with pytest.raises(BadSampleError) as caught:
        LlavaDataset(path)[1]
    assert str(caught.value).startswith("data.json[1]") and message in str(caught.value)


def test_wrong_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="not a file"):
        LlavaDataset(tmp_path / "none.json")
    (tmp_path / "object.json").write_text("{}")
    with pytest.raises(ValueError, match="must hold a JSON list"):
        LlavaDataset(tmp_path / "object.json")
    for name in ("pointer.json", "pointer.jsonl"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        with pytest.raises(ConfigError, match=rf"{name} is a pointer of git-lfs"):
            LlavaDataset(tmp_path / name)


@pytest.mark.parametrize(
    "text", ["[]", " [ ] ", '[{"a": [1, "]"]} , {"b": "x\\"]"}]\n', "\ufeff[{}\t,\r\n{}]", '["\u00e9\\ud800"]'], ids=repr
)
def test_a_list_is_cut_into_its_elements(tmp_path, text):
    (tmp_path / "list.json").write_text(text)
    records = LlavaDataset(tmp_path / "list.json")._records
    assert [json.loads(records[i]) for i in range(len(records))] == json.loads(text.lstrip("\ufeff"))


@pytest.mark.parametrize("text", ["", "[", "[1", "[1,", "[1,]", "[,1]", "[1 2]", "[1]]", "[1] x", "{}", "null", "[1}", "1"])
def test_what_is_no_list_is_refused(tmp_path, text):
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(ConfigError, match=r"list\.json must hold a JSON list: "):
        LlavaDataset(tmp_path / "list.json")


@pytest.mark.parametrize("name", ["twice.json", "twice.jsonl"])
def test_a_field_given_twice_is_named(tmp_path, name):
    """A reader of JSON keeps the last: one of the pictures would be gone."""
    text = '{"image": "a.png", "conversations": [], "image": "b.png"}'
    (tmp_path / name).write_text(f"[{text}]" if name.endswith(".json") else text)
    with pytest.raises(BadSampleError, match=rf"{name}\[0\]: not valid JSON \(twice the field 'image'\)"):
        LlavaDataset(tmp_path / name)[0]


# --- mixtures and order ---------------------------------------------------------------------------------------------------


def test_sampling_strategies():
    rng = np.random.default_rng(0)
    assert choose_indices(5, "all", rng).tolist() == [0, 1, 2, 3, 4]
    assert choose_indices(5, "first:2", rng).tolist() == [0, 1]
    assert choose_indices(5, "end:2", rng).tolist() == [3, 4]
    assert choose_indices(5, "end:0", rng).tolist() == []
    assert choose_indices(5, "first:50%", rng).tolist() == [0, 1, 2], "a share rounds up"
    drawn = choose_indices(1000, "random:30%", rng).tolist()
    assert len(set(drawn)) == 300 and drawn != sorted(drawn) and max(drawn) > 900
    with pytest.raises(ValueError, match="asks for 6 samples of a source that has 5"):
        choose_indices(5, "first:6", rng)


def test_yaml_mixture_joins_files(tmp_path):
    write_llava(tmp_path, [record(f"a{i}", image="x.png") for i in range(4)], "a.json")
    write_llava(tmp_path, [record(f"b{i}", image="x.png") for i in range(4)], "b.jsonl")
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(
        "datasets:\n- {json_path: a.json, sampling_strategy: 'end:1'}\n"
        "- {json_path: b.jsonl, sampling_strategy: 'first:50%', images: pictures}\n"
    )
    samples = open_sources(
        [SourceConfig(path=str(mixture)), SourceConfig(factory="toy:ColouredRectangles", arguments={"size": 2})], 0
    )
    assert [samples[i].messages[0].text for i in range(3)] == ["a3", "b0", "b1"] and len(samples) == 5
    assert samples[1].messages[0].images == [str(tmp_path / "pictures" / "x.png")]
    assert samples[3].name == "rectangle 0"
    with pytest.raises(IndexError):
        samples[5]


def test_mixture_mistakes_are_named(tmp_path):
    (tmp_path / "m.yaml").write_text("datasets:\n- {json: a.json}\n")
    with pytest.raises(ValueError, match=r"datasets\[0\]: needs json_path"):
        open_sources([SourceConfig(path=str(tmp_path / "m.yaml"))], 0)
    with pytest.raises(ValueError, match=r"cannot be imported"):
        open_sources([SourceConfig(factory="toy:Missing")], 0)
    with pytest.raises(ValueError, match="no sample"):
        open_sources([SourceConfig(factory="toy:ColouredRectangles", arguments={"size": 0})], 0)
    with pytest.raises(ConfigError, match="does not take the arguments"):
        open_sources([SourceConfig(factory="toy:ColouredRectangles", arguments={"length": 1})], 0)
    (tmp_path / "torn.yaml").write_text("datasets: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        open_sources([SourceConfig(path=str(tmp_path / "torn.yaml"))], 0)


def test_places_tell_samples_apart_and_know_them_again(tmp_path):
    """Files of one name in two folders; one file by two paths and strategies."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_llava(tmp_path / folder, [record(str(i)) for i in range(3)])
    files = [f"{tmp_path}/a/data.json", f"{tmp_path}/b/data.json", f"{tmp_path}/b/../a/data.json"]
    samplings = ["all", "end:1", "first:1"]
    mixture = open_sources([SourceConfig(path=p, sampling=s) for p, s in zip(files, samplings)], 0)
    places = [mixture.place(i) for i in range(5)]
    assert places == [*(f"{tmp_path}/a/data.json[{i}]" for i in range(3)), f"{tmp_path}/b/data.json[2]", places[0]]
    factories = [SourceConfig(factory="toy:ColouredRectangles", arguments={"size": 2, "first": i}) for i in range(2)]
    mixture = open_sources(factories, 0)
    assert len({mixture.place(i) for i in range(4)}) == 4


def test_random_draw_follows_the_seed():
    def names(seed):
        source = SourceConfig(factory="toy:ColouredRectangles", arguments={"size": 50}, sampling="random:5")
        samples = open_sources([source], seed)
        return [samples[i].name for i in range(5)]

    assert names(1) == names(1) != names(2)


def test_every_epoch_visits_every_sample_in_a_new_order():
    order = SampleOrder(10, seed=3)
    first, second = ([order[i] for i in range(begin, begin + 10)] for begin in (0, 10))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert SampleOrder(10, seed=3)[17] == second[7], "a position can be entered directly"


# --- encoding -------------------------------------------------------------------------------------------------------------


def picture_sample(*sizes, text="What?", answer="red"):
    images = [Image.new("RGB", size, "red") for size in sizes]
    return Sample(name="s", messages=[Message(role="user", text=text, images=images), Message(role="assistant", text=answer)])


def test_placeholders_equal_merged_patches(template):
    encoder = make_sample_encoder(template)
    encoded = encoder.encode(picture_sample((24, 16), (8, 8)))
    assert encoded.grids == [(1, 4, 6), (1, 2, 2)]
    assert [tuple(p.shape) for p in encoded.patches] == [(24, 48), (4, 48)]
    assert encoded.input_ids.count(template.image_id) == encoded.num_visual_tokens == 7


def test_damage_that_shows_on_conversion_is_named(template, tmp_path):
    """EXIF that is none, and pixels that are no colours."""
    block = b"Exif\0\0no TIFF header"
    odd = Image.new("RGB", (8, 8))
    odd.info["exif"] = block
    images = [
        (odd, "SyntaxError"),
        (Image.new("F", (8, 8)), "no fixed range"),
        (lambda: Image.new("I", (8, 8)), "no fixed range"),
    ]
    for image, message in images:
        sample = picture_sample((8, 8))
        sample.messages[0].images = [image]
        with pytest.raises(BadSampleError, match=f"s: image .*{message}"):
            make_sample_encoder(template).encode(sample)

    Image.new("RGB", (8, 8)).save(tmp_path / "odd.jpg")
    data, segment = (tmp_path / "odd.jpg").read_bytes(), b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block
    (tmp_path / "odd.jpg").write_bytes(data[:2] + segment + data[2:])
    sample.messages[0].images = [str(tmp_path / "odd.jpg")]  # Pillow reads this one as a picture without EXIF
    assert make_sample_encoder(template).encode(sample).num_visual_tokens == 1


def test_fixed_resolution_gives_squares(template):
    encoder = make_sample_encoder(template, resolution=30)
    assert encoder.encode(picture_sample((100, 10))).grids == [(1, 8, 8)], "30 pixels round to 32"
    with pytest.raises(ValueError, match="resolution 64 gives 64 visual tokens per image, max_visual_tokens allows 16"):
        make_sample_encoder(template, resolution=64)


def test_images_of_a_sample_share_its_visual_budget(template):
    encoder = make_sample_encoder(template)
    encoded = encoder.encode(picture_sample((400, 400), (400, 400), (400, 400)))
    assert encoded.num_visual_tokens <= 16 and len(encoded.grids) == 3
    with pytest.raises(BadSampleError, match="s: 17 images of at least 1 visual tokens exceed max_visual_tokens 16"):
        encoder.encode(picture_sample(*[(8, 8)] * 17))


def test_long_samples_are_refused_not_cut(template):
    with pytest.raises(BadSampleError, match=r"s: \d+ tokens \(1 of them visual\) exceed max_text_tokens 40"):
        make_sample_encoder(template, max_text_tokens=40).encode(picture_sample((8, 8), text="long " * 50))


@pytest.mark.parametrize("mrope", [True, False])
def test_positions_are_counted_as_the_decoder_counts_them(template, mrope):
    """Images of 3 x 2 and 1 x 4 visual tokens take 3 and 4 positions, or 6 and 4."""
    sample = picture_sample((16, 24), (32, 8))
    plain = make_sample_encoder(template)
    encoded = plain.encode(sample)
    grids = [(t, h // 2, w // 2) for t, h, w in encoded.grids]
    assert grids == [(1, 3, 2), (1, 1, 4)]
    input_ids = torch.tensor([encoded.input_ids])
    exact = int(mrope_position_ids(input_ids, [grids], template.image_id).max()) + 1 if mrope else len(encoded.input_ids)
    assert exact == count_positions(len(encoded.input_ids), grids if mrope else [])
    assert len(encoded.input_ids) - exact == (6 - 3 if mrope else 0)

    def encoder(limit, answer_tokens=0):
        settings = dict(max_text_tokens=256, max_positions=limit, mrope=mrope, answer_tokens=answer_tokens)
        return SampleEncoder(template, plain.images, **settings)

    assert encoder(exact).encode(sample).input_ids == encoded.input_ids
    with pytest.raises(BadSampleError, match=f"s: {exact} positions exceed the {exact - 1} of the language model"):
        encoder(exact - 1).encode(sample)

    prompt = len(plain.encode_prompt(sample).input_ids) - len(encoded.input_ids) + exact
    assert encoder(prompt + 5, answer_tokens=5).encode_prompt(sample)
    with pytest.raises(BadSampleError, match=f"s: {prompt} positions and 5 of an answer exceed the {prompt + 4}"):
        encoder(prompt + 4, answer_tokens=5).encode_prompt(sample)


def test_the_text_of_a_page_ends_where_the_positions_do(template):
    """The language model reads it alone, for the alignment loss."""
    sample = picture_sample((8, 8))
    sample.text = "red " * 300
    images = make_sample_encoder(template).images

    def length(**settings):
        return len(SampleEncoder(template, images, max_text_tokens=256, **settings).encode(sample).answer_ids)

    assert length() > 200 == length(max_positions=200) > 90 == length(max_positions=200, max_alignment_tokens=90)


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (GPT2Config(n_positions=77), 77),
        (LlamaConfig(max_position_embeddings=88), 88),
        (MptConfig(max_seq_len=99), 99),
        (BloomConfig(), NO_LIMIT),
        (MambaConfig(), NO_LIMIT),
    ],
    ids=lambda value: type(value).__name__,
)
def test_position_limits_by_any_name(config, limit):
    assert position_limit(SimpleNamespace(config=config)) == limit


def test_damaged_images_are_named(template, tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "pointer.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    for name, cause in {"cut.png": "", "text.png": "", "absent.png": "", "pointer.png": " is a pointer of git-lfs"}.items():
        sample = picture_sample((8, 8))
        sample.messages[0].images = [str(tmp_path / name)]
        with pytest.raises(BadSampleError, match=f"s: image .*{name}.*{cause}"):
            make_sample_encoder(template).encode(sample)


# --- packing and collation ------------------------------------------------------------------------------------------------


def encoded(name, text, visual=0, answer=1):
    return EncodedSample(
        name=name,
        input_ids=[7] * text,
        labels=[-100] * (text - 1) + [7],
        answer_ids=[7] * answer,
        patches=[torch.zeros(4 * visual, 48)] if visual else [],
        grids=[(1, 2, 2 * visual)] if visual else [],
        num_visual_tokens=visual,
    )


def test_packing_by_hand():
    samples = [encoded("a", 4, 2), encoded("b", 10, 5), encoded("c", 9, 5), encoded("d", 3, 1)]
    groups = pack(samples, visual_tokens=8, text_tokens=20, padded=True)
    # longest first: b (10 text, 5 visual); c would make 10 visual; a fits b (7 visual, 2 x 10 text); d goes to c
    assert [[s.name for s in group] for group in groups] == [["b", "a"], ["c", "d"]]
    assert [[s.name for s in g] for g in pack(samples)] == [["b", "c", "a", "d"]]
    # without padding: 26 text tokens in two groups, each sample to the one that is shorter so far
    assert [[s.name for s in g] for g in pack(samples, text_tokens=16)] == [["b", "d"], ["c", "a"]]
    # even groups that break a budget are not taken: first fit instead
    wide = [encoded("a", 6, 1), encoded("b", 5, 4), encoded("c", 2, 5), encoded("d", 1, 4)]
    assert [[s.name for s in g] for g in pack(wide, visual_tokens=8, text_tokens=8)] == [["a", "c"], ["b", "d"]]


def test_packing_keeps_budgets_and_samples():
    rng = np.random.default_rng(0)
    samples = [encoded(str(i), int(rng.integers(2, 40)), int(rng.integers(0, 12))) for i in range(200)]
    for padded in (True, False):
        groups = pack(samples, visual_tokens=32, text_tokens=128, padded=padded)
        assert sorted(s.name for g in groups for s in g) == sorted(s.name for s in samples)
        for group in groups:
            assert sum(s.num_visual_tokens for s in group) <= 32
            lengths = [len(s.input_ids) for s in group]
            assert (len(group) * max(lengths) if padded else sum(lengths)) <= 128
        assert len(groups) < 80, "groups are filled, not one sample each"
    even = [sum(len(s.input_ids) for s in group) for group in pack(samples, text_tokens=256)]
    assert max(even) - min(even) <= 40, "no group is much larger than the others: the largest decides about memory"
    with pytest.raises(ValueError, match="big: 0 visual and 200 text tokens exceed the budget"):
        pack([encoded("big", 200)], text_tokens=128)


def test_collation_by_hand():
    batch = collate([encoded("a", 2, answer=2), encoded("b", 3, 2), encoded("c", 1, 1)], pad_id=0, patch_features=48)
    assert batch.input_ids.tolist() == [[7, 7, 0], [7, 7, 7], [7, 0, 0]]
    assert batch.attention_mask.tolist() == [[True, True, False], [True] * 3, [True, False, False]]
    assert batch.labels.tolist() == [[-100, 7, -100], [-100, -100, 7], [7, -100, -100]]
    assert batch.image_sample.tolist() == [1, 2] and batch.grid_thw.tolist() == [[1, 2, 4], [1, 2, 2]]
    assert batch.pixel_values.shape == (12, 48)
    assert batch.answer_ids.tolist() == [[7, 7], [7, 0], [7, 0]]
    assert batch.num_learned_tokens() == 2, "the first position has no predecessor"
    assert batch.aligned_rows().tolist() == [False, True, True] and batch.num_aligned_rows() == 2


def test_batches_without_images_or_content():
    text = collate([encoded("a", 2)], pad_id=0, patch_features=48)
    assert text.pixel_values.shape == (0, 48) and text.grid_thw.shape == (0, 3) and text.num_aligned_rows() == 0
    empty = empty_batch(pad_id=0, patch_features=48)
    assert empty.num_learned_tokens() == 0 and empty.num_aligned_rows() == 0 and empty.answer_ids.shape == (1, 1)
    assert pad_right([[], []], 0)[1].tolist() == [[False], [False]]


# --- steps ----------------------------------------------------------------------------------------------------------------


def steps(template, samples=None, **changes):
    settings = dict(batch_size=6, epochs=2, seed=5) | changes
    return StepDataset(samples or ColouredRectangles(20), make_sample_encoder(template), **settings)


def names(step_data):
    return sorted(name for batch in step_data.batches for name in batch.names)


def test_steps_cover_the_epochs(template):
    dataset = steps(template)
    assert len(dataset) == 7, "40 samples in steps of 6, the last one smaller"
    seen = [name for s in range(7) for name in names(dataset[s])]
    assert sorted(seen) == sorted([f"rectangle {i}" for i in range(20)] * 2)
    assert len(steps(template, max_steps=3)) == 3
    assert names(steps(template, seed=6)[0]) != names(dataset[0])


def test_ranks_share_a_step(template):
    whole = steps(template)[2]
    shares = [steps(template, rank=r, world_size=4)[2] for r in range(4)]
    assert sorted(n for share in shares for n in names(share)) == names(whole)
    assert [s.num_samples for s in shares] == [2, 2, 1, 1]


def test_shares_of_equal_work():
    assert share_out([5, 1, 1, 1, 1, 1], 2) == [[0], [1, 2, 3, 4, 5]]
    assert share_out([1, 1], 3) == [[0], [1], []] and share_out([0, 0, 0, 0], 2) == [[0, 2], [1, 3]]


class WithOneGiant(ColouredRectangles):
    """Files on disk, one of them 64 times as large as the others; number 3 cannot be read."""

    def __init__(self, folder):
        super().__init__(20, mixed=False, broken=(3,))
        Image.new("RGB", (8, 8)).save(folder / "small.png")
        Image.new("RGB", (64, 64)).save(folder / "large.png")
        self.folder = folder

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        if index != 3:
            sample.messages[0].images = [str(self.folder / ("large.png" if index == 7 else "small.png"))]
        return sample


def test_ranks_share_a_step_by_work(template, tmp_path):
    """Whoever gets the large picture gets little else, nothing is lost or seen twice, and all agree on who has what."""
    samples = WithOneGiant(tmp_path)
    settings = dict(batch_size=20, epochs=1, cost=lambda text, patches: sum(patches))
    shares = [
        StepDataset(samples, make_sample_encoder(template, max_visual_tokens=64), seed=5, rank=r, world_size=2, **settings)[0]
        for r in range(2)
    ]
    assert sorted(n for share in shares for n in names(share)) == sorted(f"rectangle {i}" for i in range(20) if i != 3)
    assert [len(share.skipped) for share in shares].count(1) == 1
    assert sorted(share.num_images for share in shares) == [1, 18]
    assert shares[0].shares == shares[1].shares != 0


def test_estimates_are_those_of_the_encoded_sample(template, tmp_path):
    Image.new("RGB", (40, 24)).save(tmp_path / "a.png")
    encoder = make_sample_encoder(template)
    images = [str(tmp_path / "a.png"), Image.new("RGB", (9, 30)), ImageBytes((tmp_path / "a.png").read_bytes())]
    sample = Sample(name="x", messages=[Message(role="user", text="What?", images=images)])
    text, patches = encoder.estimate(sample)
    assert text == 1 and patches == [h * w for _, h, w in encoder.encode_prompt(sample).grids]
    for image in (lambda: Image.new("RGB", (8, 8)), str(tmp_path / "absent.png"), ImageBytes(b"no image")):
        assert encoder.estimate(Sample(name="x", messages=[Message(role="user", text="", images=[image])])) == (0, [])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_any_step_can_be_entered_with_any_number_of_workers(template, num_workers):
    dataset = steps(template)
    resumed = list(iterate_steps(dataset, start=4, num_workers=num_workers))
    assert [data.step for data in resumed] == [4, 5, 6]
    for data in resumed:
        for batch, expected in zip(data.batches, dataset[data.step].batches):
            assert torch.equal(batch.pixel_values, expected.pixel_values) and torch.equal(batch.input_ids, expected.input_ids)


def test_steps_that_are_closed_end_their_workers(template):
    """They pass over SIGTERM: left alive after an exception, they would keep Python from exiting."""
    prepared = iterate_steps(steps(template), start=0, num_workers=1)
    next(prepared)
    assert multiprocessing.active_children()
    prepared.close()
    assert not multiprocessing.active_children()


def test_bad_samples_are_skipped_by_name(template):
    samples = ColouredRectangles(6, mixed=False, broken=(2, 3))
    data = steps(template, samples, epochs=1)[0]
    assert data.num_samples == 4 and len(data.skipped) == 2
    assert sorted(bad.message.split(":")[0] for bad in data.skipped) == ["rectangle 2", "rectangle 3"]
    assert sorted(bad.place for bad in data.skipped) == ["[2]", "[3]"]
    assert all("/nowhere/broken.png" in bad.message for bad in data.skipped)


def test_counts_of_a_step(template):
    data = steps(template, text_tokens=120)[0]
    assert len(data.batches) > 1
    assert data.num_images == sum(len(b.grid_thw) for b in data.batches)
    assert data.num_text_tokens == sum(int(b.attention_mask.sum()) for b in data.batches)
    assert data.num_visual_tokens == sum(int((b.input_ids == template.image_id).sum()) for b in data.batches)


def test_word_counts_are_those_of_the_answers(template):
    samples = ColouredRectangles(10, broken=(1,))
    counts = count_words(samples, template, len(template.tokenizer))
    expected = torch.zeros(len(template.tokenizer), dtype=torch.int64)
    for i in range(10):
        for token in template.encode_text(samples[i].messages[-1].text):
            expected[token] += 1
    assert torch.equal(counts, expected) and counts.sum() > 0
