"""Benchmarks read from folders that the `datasets` library itself wrote: layouts, prompts, references, images, complaints."""

import re
import sys
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from comp.config import ConfigError, SourceConfig
from comp.data.batch import BadSampleError
from comp.data.encode import load_image
from comp.data.hf_folder import lazy_image
from comp.data.mixture import open_sources
from comp.eval.benchmarks import BENCHMARKS, open_benchmark

CHOOSE = "\nAnswer with the option's letter from the given choices directly."
SHORT = "\nAnswer the question using a single word or phrase."


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The library's own copies of parquet files go with the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def picture(colour="red", size=(20, 12)):
    return Image.new("RGB", size, colour)


def images_as_features(rows):
    """Features of the rows, pictures and lists of pictures as the library's Image."""
    plain = Dataset.from_list([{k: v for k, v in row.items() if not is_image(v)} for row in rows]).features
    return Features(
        plain | {k: [ImageFeature()] if isinstance(v, list) else ImageFeature() for k, v in rows[0].items() if is_image(v)}
    )


def is_image(value):
    return isinstance(value, Image.Image) or (isinstance(value, list) and bool(value) and isinstance(value[0], Image.Image))


def write_parquet(rows, *files: Path):
    dataset = Dataset.from_list(rows, features=images_as_features(rows))
    for number, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        dataset.shard(len(files), number, contiguous=True).to_parquet(file)


CHART = [dict(type="human_test", question="How many?", answer="14", image=picture("blue", (30, 10)))]
CHART += [dict(type="augmented_test", question="Which?", answer="Yes", image=picture("red", (10, 30)))]


def check_charts(samples):
    assert [s.question_type for s in samples] == ["chartqa human", "chartqa augmented"]
    assert [s.name for s in samples] == ["chartqa[0]", "chartqa[1]"]
    assert samples[0].messages[0].text == "How many?\nAnswer the question with a single word."
    assert samples[0].answers == ["14"] and samples[0].messages[1].text == "14" and samples[0].metric == "relaxed_accuracy"
    first, second = (load_image(s.messages[0].images[0], s.name) for s in samples)
    assert (first.size, first.getpixel((0, 0))) == ((30, 10), (0, 0, 255))
    assert (second.size, second.getpixel((0, 0))) == ((10, 30), (255, 0, 0))


@pytest.mark.parametrize(
    "files",
    [
        ["data/test-00000-of-00002.parquet", "data/test-00001-of-00002.parquet"],
        ["test.parquet"],
        ["default/test/0000.parquet", "default/test/0001.parquet"],
    ],
)
def test_parquet_as_the_hub_stores_it(tmp_path, files):
    write_parquet(CHART, *(tmp_path / "hub" / file for file in files))
    for other in ("train", "test-dev"):
        write_parquet([dict(unrelated=1)], tmp_path / "hub" / "data" / f"{other}-00000-of-00001.parquet")
    check_charts(list(open_benchmark("chartqa", str(tmp_path / "hub"))))


def test_save_to_disk(tmp_path):
    dataset = Dataset.from_list(CHART, features=images_as_features(CHART))
    DatasetDict(test=dataset, train=dataset.select([0])).save_to_disk(tmp_path / "splits")
    dataset.save_to_disk(tmp_path / "one")
    check_charts(list(open_benchmark("chartqa", str(tmp_path / "splits"))))
    check_charts(list(open_benchmark("chartqa", str(tmp_path / "one"))))
    assert len(open_benchmark("chartqa", str(tmp_path / "splits"), "train")) == 1
    with pytest.raises(ConfigError, match="no split 'validation', only test, train"):
        open_benchmark("chartqa", str(tmp_path / "splits"), "validation")


@pytest.mark.parametrize("recorded", ["test", "test[:2]"])
def test_a_single_saved_split_must_be_the_one_asked_for(tmp_path, recorded):
    Dataset.from_list(CHART, features=images_as_features(CHART), split=recorded).save_to_disk(tmp_path)
    check_charts(list(open_benchmark("chartqa", str(tmp_path))))
    for other in ("validation", "tes"):
        with pytest.raises(ConfigError, match=rf"holds split '{re.escape(recorded)}' alone, not '{other}'"):
            open_benchmark("chartqa", str(tmp_path), other)


def test_chartqa_in_the_layout_of_its_first_upload(tmp_path):
    rows = [dict(human_or_machine=i, query=r["question"], label=[r["answer"]], image=r["image"]) for i, r in enumerate(CHART)]
    write_parquet(rows, tmp_path / "hub" / "data" / "test-00000-of-00001.parquet")
    check_charts(list(open_benchmark("chartqa", str(tmp_path / "hub"))))


def test_images_without_the_library_s_features(tmp_path):
    """Other writers leave {bytes, path} without saying that it is an image."""
    rows = [dict(type="human_test", question="q", answer="a", image={"bytes": png(), "path": None})]
    features = Features(type=Value("string"), question=Value("string"), answer=Value("string"))
    features["image"] = {"bytes": Value("binary"), "path": Value("string")}
    folder = tmp_path / "hub"
    folder.mkdir()
    Dataset.from_list(rows, features=features).to_parquet(folder / "test.parquet")
    (sample,) = open_benchmark("chartqa", str(folder))
    assert load_image(sample.messages[0].images[0], "x").size == (20, 12)


def png():
    import io

    file = io.BytesIO()
    picture().save(file, "png")
    return file.getvalue()


def read_one(tmp_path, name, row, folder="data", split=None):
    split = split or BENCHMARKS[name].split
    write_parquet([row], tmp_path / name / folder / f"{split}-00000-of-00001.parquet")
    (sample,) = open_benchmark(name, str(tmp_path / name))
    return sample, sample.messages[0].text


def test_documents_by_configuration(tmp_path):
    """DocVQA and InfographicVQA lie in one repository."""
    for config, answer in (("DocVQA", "1999"), ("InfographicVQA", "blue")):
        row = dict(questionId="7", question="When?", answers=[answer, "other"], image=picture())
        write_parquet([row], tmp_path / config / "validation-00000-of-00001.parquet")
    for name, answer in (("docvqa", "1999"), ("infovqa", "blue")):
        (sample,) = open_benchmark(name, str(tmp_path))
        assert sample.answers == [answer, "other"] and sample.metric == "anls" and sample.question_type == name
        assert sample.messages[0].text == "When?" + SHORT


def test_answers_of_ten_annotators(tmp_path):
    row = dict(question="what IS written?", answers=["a"] * 10, image=picture(), ocr_tokens=["x"])
    sample, text = read_one(tmp_path, "textvqa", row)
    assert text == "What is written?" + SHORT and sample.answers == ["a"] * 10 and sample.metric == "vqa_accuracy"
    sample, text = read_one(tmp_path, "okvqa", row)
    assert text == "what IS written?\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT
    objects = dict(question="q", answers=[dict(answer=f"{i}", answer_id=i) for i in range(10)], image=picture())
    sample, _ = read_one(tmp_path, "vqav2", objects)
    assert sample.answers == [str(i) for i in range(10)] and sample.metric == "vqav2_accuracy"


def test_gqa_joins_questions_and_images(tmp_path):
    questions = [dict(imageId=i, question="q?", answer="yes") for i in ("b", "a", "b")]
    images = [dict(id="a", image=picture("red")), dict(id="b", image=picture("blue"))]
    write_parquet(questions, tmp_path / "gqa" / "testdev_balanced_instructions" / "testdev-00000-of-00001.parquet")
    with pytest.raises(ConfigError, match="testdev_balanced_images"):
        open_benchmark("gqa", str(tmp_path / "gqa"))
    write_parquet(images, tmp_path / "gqa" / "testdev_balanced_images" / "testdev-00000-of-00001.parquet")
    samples = list(open_benchmark("gqa", str(tmp_path / "gqa")))
    colours = [load_image(s.messages[0].images[0], s.name).getpixel((0, 0)) for s in samples]
    assert colours == [(0, 0, 255), (255, 0, 0), (0, 0, 255)] and samples[0].messages[0].text == "q?" + SHORT
    write_parquet(
        [dict(question="q?", answer="yes")],
        tmp_path / "bare" / "testdev_balanced_instructions" / "testdev-00000-of-00001.parquet",
    )
    write_parquet(images, tmp_path / "bare" / "testdev_balanced_images" / "testdev-00000-of-00001.parquet")
    with pytest.raises(ConfigError, match="gqa needs a column imageId"):
        open_benchmark("gqa", str(tmp_path / "bare"))


def test_ai2d(tmp_path):
    sample, text = read_one(tmp_path, "ai2d", dict(question="Which?", options=["leaf", "root"], answer="1", image=picture()))
    assert text == "Which?\nA. leaf\nB. root" + CHOOSE
    assert (sample.answers, sample.metric, sample.options) == (["B"], "ai2d", ["leaf", "root"])


def test_realworldqa(tmp_path):
    question = "Where?\nA. Left\nB. Right\nPlease answer directly with only the letter of the correct option and nothing else."
    sample, text = read_one(tmp_path, "realworldqa", dict(question=question, answer=" B", image=picture()))
    assert text == question and sample.answers == ["B"] and sample.options == ["Left", "Right"]


def test_seed_has_videos_as_several_images(tmp_path):
    row = dict(question="Which?", answer="C", data_type="video", image=[picture(), picture("blue")])
    sample, text = read_one(tmp_path, "seed", row | {f"choice_{letter}": letter * 2 for letter in "abcd"})
    assert text == "Which?\nA. aa\nB. bb\nC. cc\nD. dd" + CHOOSE and sample.question_type == "seed video"
    assert [load_image(image, "x").getpixel((0, 0)) for image in sample.messages[0].images] == [(255, 0, 0), (0, 0, 255)]


def mmmu_row(**changes):
    row = dict(id="validation_Art_1", question="Is <image 2> like <image 1>?", options="['a cat', '<image 3>']", answer="B")
    row |= dict(question_type="multiple-choice", **{f"image_{k}": picture(size=(10 * k, 10)) for k in range(1, 5)})
    return row | changes


def test_mmmu_gives_every_image_that_the_text_names(tmp_path):
    sample, text = read_one(tmp_path, "mmmu", mmmu_row(), folder="Art")
    assert text == "Is <image 2> like <image 1>?\nA. a cat\nB. <image 3>\n" + CHOOSE
    assert [load_image(image, "x").size[0] for image in sample.messages[0].images] == [10, 20, 30]
    assert (sample.answers, sample.options, sample.metric) == (["B"], ["a cat", "<image 3>"], "mmmu")


@pytest.mark.parametrize(("answer", "references"), [("12", ["12"]), ("['12', '24/2']", ["12", "24/2"]), ("(a", ["(a"])])
def test_mmmu_open_question(tmp_path, answer, references):
    sample, text = read_one(tmp_path, "mmmu", mmmu_row(question_type="open", options="[]", answer=answer), folder="Art")
    assert text == "Is <image 2> like <image 1>?\n" + SHORT
    assert sample.answers == references and not sample.options


def test_mmbench_groups_rotations(tmp_path):
    row = dict(index=3, question="Who?", hint="A hint.", answer="A", A="cat", B="dog", C="nan", D="nan", image=picture())
    rows = [row, row | dict(index=1_000_003, hint="nan", answer="B", A="dog", B="cat"), row | dict(index=4, C="cow")]
    write_parquet(rows, tmp_path / "mmbench" / "en" / "dev-00000-of-00001.parquet")
    samples = list(open_benchmark("mmbench", str(tmp_path / "mmbench")))
    assert [s.group for s in samples] == ["mmbench 3", "mmbench 3", "mmbench 4"]
    assert samples[0].messages[0].text == "A hint. Who? There are several options:\nA. cat\nB. dog\n" + CHOOSE
    assert samples[1].messages[0].text == "Who? There are several options:\nA. dog\nB. cat\n" + CHOOSE
    assert [s.options for s in samples] == [["cat", "dog"], ["dog", "cat"], ["cat", "dog", "cow"]]


def test_every_benchmark_names_a_column_that_is_missing(tmp_path):
    write_parquet([dict(unrelated=1, image=picture())], tmp_path / "x.parquet")
    for name, benchmark in BENCHMARKS.items():
        (tmp_path / "x.parquet").rename(tmp_path / f"{benchmark.split}.parquet")
        with pytest.raises(ConfigError, match=rf"{name} needs a column .*, the folder has unrelated, image"):
            open_benchmark(name, str(tmp_path))
        (tmp_path / f"{benchmark.split}.parquet").rename(tmp_path / "x.parquet")


def test_splits_without_labels_and_damaged_images_are_named(tmp_path):
    rows = [dict(question="q", answers=[], image=picture()), dict(question="q", answers=["a"], image=picture())]
    dataset = Dataset.from_list(rows, features=images_as_features(rows[1:]))
    broken = dataset.cast_column("image", ImageFeature(decode=False)).map(lambda row: {"image": {"bytes": b"no", "path": None}})
    DatasetDict(validation=broken).save_to_disk(tmp_path / "docvqa")
    samples = open_benchmark("docvqa", str(tmp_path / "docvqa"))
    with pytest.raises(BadSampleError, match=r"docvqa\[0\].*reference answer.*splits for submission"):
        samples[0]
    with pytest.raises(BadSampleError, match=r"docvqa\[1\]: image"):
        load_image(samples[1].messages[0].images[0], samples[1].name)
    with pytest.raises(TypeError, match="an image cell must hold bytes or a path, got None"):
        lazy_image(None)


def test_image_cells_that_name_files_stay_in_the_folder(tmp_path):
    """Names start from the folder of the dataset; absolute ones, and those that lead out, need a word from the user."""
    folder, features = tmp_path / "docvqa", {"bytes": Value("binary"), "path": Value("string")}
    folder.mkdir()
    names = ["in.png", "../out.png", str(tmp_path / "out.png"), "link.png"]
    rows = [dict(question="q", answers=["a"], image={"bytes": None, "path": name}) for name in names]
    columns = Features(question=Value("string"), answers=[Value("string")], image=features)
    Dataset.from_list(rows, features=columns).to_parquet(folder / "validation.parquet")
    picture().save(folder / "in.png")
    picture().save(tmp_path / "out.png")
    (folder / "link.png").symlink_to(tmp_path / "out.png")

    def opened(index, **options):
        sample = open_benchmark("docvqa", str(folder), **options)[index]
        return load_image(sample.messages[0].images[0], sample.name)

    assert opened(0).size == (20, 12)
    for index in (1, 2, 3):
        with pytest.raises(BadSampleError, match=rf"docvqa\[{index}\].*leads out of .*docvqa.*images_anywhere=true"):
            opened(index)
    assert opened(2, images_anywhere=True).size == (20, 12)


def test_folders_that_hold_nothing_useful(tmp_path):
    with pytest.raises(ConfigError, match="is not a folder"):
        open_benchmark("docvqa", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="no parquet files at all"):
        open_benchmark("docvqa", str(tmp_path))
    write_parquet(CHART, tmp_path / "data" / "train-00000-of-00001.parquet")
    with pytest.raises(ConfigError, match=r"no split 'test'.*data/train-00000-of-00001.parquet"):
        open_benchmark("chartqa", str(tmp_path))
    with pytest.raises(ConfigError, match=r"benchmark must be one of chartqa, .*, got 'chart'"):
        open_benchmark("chart", str(tmp_path))


def test_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'comp-kernels\[eval\]'"):
        open_benchmark("docvqa", str(tmp_path))


def test_as_a_data_source(tmp_path):
    write_parquet(CHART, tmp_path / "hub" / "test.parquet")
    arguments = dict(name="chartqa", path=str(tmp_path / "hub"))
    source = SourceConfig(factory="comp.eval.benchmarks:open_benchmark", arguments=arguments, sampling="end:1")
    samples = open_sources([source], seed=0)
    assert len(samples) == 1 and samples[0].question_type == "chartqa augmented"
