"""Rules of multiple choice against those of the public evaluation harness, on random answers made of what rules look for."""

import importlib
import random
import sys
import types

import pytest
from harness import harness_folder

from comp.eval import choices

PACKAGES = ("tasks", "tasks._task_utils", "tasks.mmbench", "tasks.mmmu", "tasks.realworldqa", "filters")
NUM_ANSWERS = 5000
WORDS = """A B C D E (A) (B). B. C, :D :D. A) B). a b left Left left. Turn Right Up. two Two Two. 2 red car cat dog no answer
is so = 3 3.14159 1,234 1e3 -5 'x' up\n.""".split(" ")
OPTIONS = [
    ["Left", "Right", "Straight on"],
    ["cat", "red car", "two"],
    ["Turn left.", "Turn Right", "Up"],
    ["1", "2", "3", "4"],
    ["yes", "no"],
]
OPEN_ANSWERS = [["3.14"], ["1234"], ["red car", "a"], ["2", "two"], ["-5"]]


@pytest.fixture(scope="module")
def harness():
    """Its modules of rules by name, imported without their packages, which ask for the dependencies of every benchmark."""
    root = harness_folder()
    before = dict(sys.modules)
    for name in PACKAGES:
        package = types.ModuleType(f"lmms_eval.{name}")
        package.__path__ = [str(root.joinpath(*name.split(".")))]
        sys.modules[package.__name__] = package
    sys.modules["lmms_eval.verifiers"] = types.SimpleNamespace(VerificationPipeline=None)  # talks to a language model
    sys.modules["lmms_eval.verifiers.openai"] = types.SimpleNamespace(OpenAIVerifier=None)
    names = ("tasks._task_utils.mmmu_mcq_utils", "tasks.mmmu.utils", "tasks.mmbench.mmbench_evals", "tasks.realworldqa.utils")
    try:
        yield types.SimpleNamespace(**{n.split(".")[-2]: importlib.import_module(f"lmms_eval.{n}") for n in names})
    finally:
        for name in [name for name in sys.modules if name.startswith("lmms_eval.") and name not in before]:
            del sys.modules[name]


def random_answers():
    draw = random.Random(0)
    for _ in range(NUM_ANSWERS):
        yield " ".join(draw.choice(WORDS) for _ in range(draw.randint(0, 7))), draw.choice(OPTIONS), draw.choice(OPEN_ANSWERS)


def test_mmmu_choice(harness, monkeypatch):
    monkeypatch.setattr(random, "choice", lambda letters: None)  # where no rule applies
    for text, options, _ in random_answers():
        by_letter = choices.lettered(options)
        expected = harness._task_utils.parse_mmmu_multi_choice_response(text, list(by_letter), by_letter)
        assert choices.mmmu_choice(text, options) == expected, (text, options)


def test_mmmu_open(harness):
    for text, _, answers in random_answers():
        expected = harness.mmmu.eval_open(answers, harness.mmmu.parse_open_response(text))
        assert choices.mmmu_open(text, answers) == expected, (text, answers)


def test_mmbench_choice(harness):
    evaluator = harness.mmbench.MMBench_Evaluator()
    for text, options, _ in random_answers():
        expected = evaluator.can_infer(text, choices.lettered(options)) or None
        assert choices.mmbench_choice(text, options) == expected, (text, options)


def test_realworldqa(harness):
    """Its filters, which the harness published with the benchmark; its 0.7.3 reads letters alone."""
    words_to_digits = harness.realworldqa.NumberWordsToDigitsFilter()
    options_to_letters = harness.realworldqa.MultiChoiceRegexFilter()
    for text, options, _ in random_answers():
        lines = "\n".join(f"{letter}. {option}" for letter, option in choices.lettered(options).items())
        question = f"Which way?\n{lines}\nPlease answer directly with only the letter of the correct option."
        assert choices.listed_options(question) == options
        filtered = options_to_letters.apply(words_to_digits.apply([[text]], None), [{"question": question}])
        assert [choices.option_letter_from_text(text, options)] == filtered, (text, options)
