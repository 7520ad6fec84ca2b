"""Relaxed accuracy and ANLS against those of the public evaluation harness, on odd predictions."""

import ast
import itertools
import random
import types

import pytest
from harness import harness_folder

from comp.eval import metrics

PIECES = """
5 5.0 05 105 5% 0.05 -5 +5 1e3 1_000 1,000 1000 $5 5$ €1,000 2005 2010 2,005 50,000.5
0 0.0 0% % 100% 12.5% inf nan -inf ٣ ½
yes Yes YES blue Blue. the straße STRASSE ﬁne İ ŉ 猫 é é a""".split()
SPACES = ["", " ", "\n", " \n", "\t", "\r\n", "\u00a0", "\u3000", "  "]


@pytest.fixture(scope="module")
def harness():
    """Its functions by name, without the modules around them, which ask for the dependencies of every benchmark."""
    root = harness_folder()
    found = {}
    for file, names in (
        ("api/metrics.py", ("levenshtein_distance", "anls")),
        ("tasks/chartqa/utils.py", ("relaxed_correctness",)),
    ):
        functions = [n for n in ast.parse((root / file).read_text()).body if getattr(n, "name", None) in names]
        for function in functions:
            function.decorator_list = []
        exec(compile(ast.Module(functions, []), file, "exec"), found)
    return types.SimpleNamespace(**found)


def odd_texts(count=4000):
    """Single pieces with every space around them, and random joins of pieces and spaces."""
    yield from ("".join(parts) for parts in itertools.product(SPACES, PIECES, SPACES))
    draw = random.Random(0)
    for _ in range(count):
        yield "".join(draw.choice(PIECES) + draw.choice(SPACES) for _ in range(draw.randint(0, 4)))


def pairs():
    draw = random.Random(1)
    for text in odd_texts():
        yield text, [draw.choice(PIECES) + draw.choice(SPACES) for _ in range(draw.randint(1, 3))]
        yield text, [text.strip().swapcase(), draw.choice(PIECES)]


def test_relaxed_accuracy(harness):
    """The harness scores the stripped prediction (lmms_eval.api.task.ConfigurableTask.process_results), one reference."""
    for prediction, answers in pairs():
        expected = max(float(harness.relaxed_correctness(prediction.strip(), answer)) for answer in answers)
        assert metrics.relaxed_accuracy(prediction, answers) == expected, (prediction, answers)


def test_anls(harness):
    for prediction, answers in pairs():
        expected = harness.anls(answers, [prediction.strip()])["anls"]
        assert metrics.anls(prediction, answers) == pytest.approx(expected, abs=1e-12), (prediction, answers)
