"""Public benchmarks as datasets of `Sample`s, read from Hugging Face `datasets` folders: prompt, images, references, metric.

    open_benchmark("chartqa", "/data/ChartQA")         # for answer_questions, python -m comp.eval.evaluate, ...
    eval.data=[{factory: "comp.eval.benchmarks:open_benchmark", arguments: {name: docvqa, path: /data/DocVQA}}]

Column names, prompts and metrics are those of the public evaluation harness (lmms-eval) and its copies of the data.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..data.batch import BadSampleError, Message, Sample
from ..data.hf_folder import images_inside, lazy_image, open_folder
from .choices import LETTERS, lettered, listed_options

Row = dict[str, Any]

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


@dataclass(kw_only=True, frozen=True)
class Benchmark:
    """How the rows of one benchmark are read."""

    read: Callable[[str, Row], Sample]
    """(name of the sample, row) -> sample."""
    columns: str
    """Columns that `read` needs; "question|query": either, given to `read` under the first name."""
    split: str
    """The split that papers report."""
    max_new_tokens: int
    """Longest answer."""
    config: str | None = None
    """Configuration of the dataset: a subfolder."""
    images_config: str | None = None
    """Configuration that holds the images by id, where the questions have none."""


class BenchmarkDataset:
    """The questions of one benchmark."""

    def __init__(
        self,
        name: str,
        path: str | Path,
        split: str | None = None,
        cache_dir: str | Path | None = None,
        images_anywhere: bool = False,
    ):
        if name not in BENCHMARKS:
            raise ConfigError(f"benchmark must be one of {', '.join(BENCHMARKS)}, got {name!r}")
        self.name = name
        self.folder, self.images_anywhere = Path(path), images_anywhere
        self.benchmark = BENCHMARKS[name]
        rows_of = partial(open_folder, path, split=split or self.benchmark.split, cache_dir=cache_dir)
        self._rows = rows_of(config=self.benchmark.config)
        self._images: dict[str, int] = {}
        images_config = self.benchmark.images_config
        if "image" not in self._rows.column_names and images_config is not None:
            if not (Path(path) / images_config).is_dir():
                raise ConfigError(f"{name} needs a column image or a folder {images_config} beside the questions, in {path}")
            self._image_rows = rows_of(config=images_config)
            self._image_ids = self._find(["imageId"])
            self._images = {key: index for index, key in enumerate(self._image_rows["id"])}
        self._names = {column: self._find(column.split("|")) for column in self.benchmark.columns.split()}

    def _find(self, names: Sequence[str]) -> str:
        columns = self._rows.column_names
        found = next((name for name in names if name in columns), None)
        if found is None:
            raise ConfigError(f"{self.name} needs a column {' or '.join(names)}, the folder has {', '.join(columns)}")
        return found

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        row = dict(self._rows[index])
        row |= {column.split("|")[0]: row[name] for column, name in self._names.items()}
        name = f"{self.name}[{index}]"
        try:
            if self._images:
                row["image"] = self._image_rows[self._images[row[self._image_ids]]]["image"]
            row = {column: images_inside(value, self.folder, anywhere=self.images_anywhere) for column, value in row.items()}
            return self.benchmark.read(name, row)
        except (TypeError, ValueError, LookupError) as error:
            raise BadSampleError(f"{name}: {type(error).__name__}: {error}") from error


def open_benchmark(
    name: str, path: str, split: str | None = None, cache_dir: str | None = None, images_anywhere: bool = False
) -> BenchmarkDataset:
    """The questions of a benchmark as `Sample`s; also for the `factory` of a data source.

    Args:
        name:  a key of `BENCHMARKS`: chartqa, docvqa, infovqa, textvqa, okvqa, vqav2, gqa, ai2d, realworldqa, seed, mmmu or
            mmbench.
        path:  a folder of the Hugging Face `datasets` library: parquet files as on the hub, or what save_to_disk wrote.
        split:  None: the one that papers report.
        cache_dir:  where the library keeps its memory-mapped copy of parquet files; None: its own default.
        images_anywhere:  image cells that name a file may lead out of the folder; otherwise such a sample is unusable.

    Raises ConfigError for an unknown name, a folder in neither layout, and missing columns.
    """
    return BenchmarkDataset(name, path, split, cache_dir, images_anywhere)


def _sample(
    name: str,
    kind: str,
    text: str,
    images: Sequence[Any],
    answers: Any,
    metric: str,
    options: Sequence[str] = (),
    group: str | None = None,
) -> Sample:
    """answers: the references, a text or several; none (a split without labels) raises ValueError."""
    references = [answers] if isinstance(answers, str) else list(answers or [])
    if not references or not all(isinstance(reference, str) for reference in references):
        raise ValueError(f"needs a reference answer, got {answers!r}; splits for submission have none")
    return Sample(
        name=name,
        messages=[
            Message(role="user", text=text, images=[lazy_image(image) for image in images]),
            Message(role="assistant", text=references[0]),
        ],
        answers=references,
        question_type=kind,
        metric=metric,
        options=list(options),
        group=group,
    )


# --- open questions ----------------------------------------------------------------------------------------------------------


def _chartqa(name: str, row: Row) -> Sample:
    kind = row["type"]
    if isinstance(kind, int):  # a class label: 0 human, 1 machine
        kind = ("human", "augmented")[kind]
    text = row["question"] + "\nAnswer the question with a single word."
    kind = "chartqa human" if kind.startswith("human") else "chartqa augmented"
    return _sample(name, kind, text, [row["image"]], row["answer"], "relaxed_accuracy")


def _document(name: str, row: Row) -> Sample:
    return _sample(name, name.split("[")[0], row["question"] + SHORT, [row["image"]], row["answers"], "anls")


def _textvqa(name: str, row: Row) -> Sample:
    return _sample(name, "textvqa", row["question"].capitalize() + SHORT, [row["image"]], row["answers"], "vqa_accuracy")


def _okvqa(name: str, row: Row) -> Sample:
    text = row["question"] + "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT
    return _sample(name, "okvqa", text, [row["image"]], _annotators(row["answers"]), "vqa_accuracy")


def _vqav2(name: str, row: Row) -> Sample:
    return _sample(name, "vqav2", row["question"] + SHORT, [row["image"]], _annotators(row["answers"]), "vqav2_accuracy")


def _annotators(answers: Sequence[Any]) -> list[str]:
    """Texts, or the objects with a text "answer" that VQAv2 has."""
    return [answer["answer"] if isinstance(answer, dict) else answer for answer in answers]


def _gqa(name: str, row: Row) -> Sample:
    return _sample(name, "gqa", row["question"] + SHORT, [row["image"]], row["answer"], "exact_match")


# --- multiple choice ---------------------------------------------------------------------------------------------------------


def _option_lines(options: Sequence[str]) -> str:
    return "\n".join(f"{letter}. {option}" for letter, option in lettered(options).items())


def _ai2d(name: str, row: Row) -> Sample:
    options = list(row["options"])
    text = f"{row['question']}\n{_option_lines(options)}\n{LETTER}"
    return _sample(name, "ai2d", text, [row["image"]], LETTERS[int(row["answer"])], "ai2d", options)


def _realworldqa(name: str, row: Row) -> Sample:
    text = row["question"].strip()  # with its options and its instruction
    return _sample(name, "realworldqa", text, [row["image"]], row["answer"].strip(), "realworldqa", listed_options(text))


def _seed(name: str, row: Row) -> Sample:
    options = [row[f"choice_{letter}"] for letter in "abcd"]
    text = f"{row['question']}\n{_option_lines(options)}\n{LETTER}"
    images = row["image"] if isinstance(row["image"], list) else [row["image"]]
    return _sample(name, f"seed {row['data_type']}", text, images, row["answer"], "seed", options)


def _mmmu(name: str, row: Row) -> Sample:
    """The marks "<image k>" stay in the text; the images they name, in the order of their numbers, stand in front of it."""
    if row["question_type"] == "multiple-choice":
        options = ast.literal_eval(row["options"]) if isinstance(row["options"], str) else list(row["options"])
        text = f"{row['question']}\n{_option_lines(options)}\n\n{LETTER}"
        answers = row["answer"]
    else:
        options = []
        text = f"{row['question']}\n{SHORT}"
        answers = _literal_list(row["answer"])
    images = [row[f"image_{k}"] for k in range(1, 8) if f"<image {k}>" in text]
    return _sample(name, "mmmu", text, images, answers, "mmmu", options)


def _literal_list(text: str) -> list[str]:
    """MMMU writes several references to one question as the text of a Python list: "['0.5', '1/2']"."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return [text]
    return [str(v) for v in value] if isinstance(value, list) else [text]


def _mmbench(name: str, row: Row) -> Sample:
    """Rows whose index differs by millions are one question with its options rotated."""
    options = [row[letter] for letter in takewhile(lambda letter: _is_given(row.get(letter)), "ABCDE")]
    hint = f"{row['hint']} " if _is_given(row["hint"]) else ""
    text = f"{hint}{row['question']} There are several options:\n{_option_lines(options)}\n\n{LETTER}"
    group = f"mmbench {int(row['index']) % 1_000_000}"
    return _sample(name, "mmbench", text, [row["image"]], row["answer"], "mmbench", options, group)


def _is_given(text: str | None) -> bool:
    return text not in (None, "", "nan")


# Texts that can equal a reference are short, and SEED reads one letter: where the harness sets no limit, 64 tokens score alike.
BENCHMARKS = {
    "chartqa": Benchmark(
        read=_chartqa, columns="question|query answer|label type|human_or_machine image", split="test", max_new_tokens=16
    ),
    "docvqa": Benchmark(
        read=_document, columns="question answers image", split="validation", max_new_tokens=32, config="DocVQA"
    ),
    "infovqa": Benchmark(
        read=_document, columns="question answers image", split="validation", max_new_tokens=32, config="InfographicVQA"
    ),
    "textvqa": Benchmark(read=_textvqa, columns="question answers image", split="validation", max_new_tokens=64),
    "okvqa": Benchmark(read=_okvqa, columns="question answers image", split="val2014", max_new_tokens=64),
    "vqav2": Benchmark(read=_vqav2, columns="question answers image", split="validation", max_new_tokens=16),
    "gqa": Benchmark(
        read=_gqa,
        columns="question answer",
        split="testdev",
        max_new_tokens=16,
        config="testdev_balanced_instructions",
        images_config="testdev_balanced_images",
    ),
    "ai2d": Benchmark(read=_ai2d, columns="question options answer image", split="test", max_new_tokens=16),
    "realworldqa": Benchmark(read=_realworldqa, columns="question answer image", split="test", max_new_tokens=16),
    "seed": Benchmark(
        read=_seed,
        columns="question answer choice_a choice_b choice_c choice_d data_type image",
        split="test",
        max_new_tokens=64,
    ),
    "mmmu": Benchmark(
        read=_mmmu, columns="question options answer question_type image_1", split="validation", max_new_tokens=16
    ),
    "mmbench": Benchmark(
        read=_mmbench, columns="index question hint answer A B image", split="dev", max_new_tokens=1024, config="en"
    ),
}
"""By name; MME, whose score is no mean over questions, is left to the harness (`comp.eval.lmms_adapter`)."""
