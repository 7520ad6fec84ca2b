"""The metrics on the edge cases where implementations differ; expected values worked out by hand from the definitions."""

import random

import pytest

from comp.eval import metrics

SCORES = {
    "relaxed_accuracy": [
        ("105", ["100"], 1),  # exactly 5% off
        ("105.01", ["100"], 0),
        ("95", ["100"], 1),
        ("-95", ["-100"], 1),
        ("95", ["-100"], 0),
        ("5", ["5%"], 0),  # the per cent sign divides by 100
        ("5.1%", ["5%"], 1),
        ("0.05", ["5%"], 1),
        ("0", ["0"], 1),  # a zero reference is compared as text ...
        ("0.0", ["0"], 0),
        ("0%", ["0"], 0),
        ("0", ["3"], 0),  # ... a zero prediction is a number
        ("1,000", ["1000"], 0),  # no thousands separators, no units
        ("1,000", ["1,000"], 1),
        ("5 kg", ["5"], 0),
        (" 5 ", ["5"], 1),  # float() forgives spaces
        ("5% ", ["5%"], 1),  # spaces around the prediction do not count ...
        ("Blue\r\n", ["blue"], 1),
        ("5%", ["5% "], 0),  # ... around the reference they do
        ("$5", ["5"], 0),
        ("2005", ["2010"], 1),  # a year is a number
        ("Blue", ["blue"], 1),
        ("blue.", ["blue"], 0),
        ("nan", ["nan"], 0),  # parses as a number that equals nothing
        ("%", ["%"], 1),
        ("", [""], 1),
        ("seven", ["7"], 0),
        ("7", ["8", "seven", "7"], 1),  # the best reference counts
    ],
    "anls": [
        ("hello", ["hello"], 1),
        ("HeLLo", ["hello"], 1),
        ("  a   b ", ["a b"], 1),
        ("abcd", ["abcf"], 0.75),
        ("abcd", ["abef"], 0.5),  # the threshold itself counts
        ("abcd", ["axyz"], 0),
        ("", [""], 1),
        ("", ["a"], 0),
        ("a    b", ["ac"], 1 - 2 / 6),  # distance of "a b" to "ac" is 2, divided by the length 6 with all spaces
        ("abcd \n", ["abcf"], 0.75),  # spaces around the prediction do not count ...
        ("abcd", ["abcf  "], 1 - 1 / 6),  # ... around the reference they do
        ("ß", ["ss"], 0),
        ("ßß", ["ßs"], 1 - 1 / 4),  # lengths are those of "SSSS" and "SSS"
        ("kitten", ["sitting", "mitten"], 1 - 1 / 6),
    ],
    "exact_match": [
        ("The Leaf.", ["the leaf"], 1),
        ("A", ["a"], 1),
        ("it's", ["its"], 1),
        ("the  leaf", ["the leaf"], 0),
        (" leaf\n", ["leaf"], 1),
        ("leaf", [" leaf"], 0),
        ("b", ["a", "B."], 1),
    ],
}


@pytest.mark.parametrize(
    ("metric", "prediction", "answers", "expected"), [(metric, *case) for metric, cases in SCORES.items() for case in cases]
)
def test_score(metric, prediction, answers, expected):
    assert metrics.METRICS[metric](prediction, answers) == pytest.approx(expected)


def test_levenshtein_against_the_recursion():
    def distance(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))

    draw = random.Random(0)
    for _ in range(60):
        a, b = ("".join(draw.choices("ab", k=draw.randint(0, 5))) for _ in range(2))
        assert metrics.levenshtein(a, b) == distance(a, b)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Two  dogs", "2 dogs"),
        ("none", "0"),
        ("don't", "don't"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),  # two apostrophes missing: not in the table
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("dog's tail", "dog 's tail"),
        ("1,000", "1000"),
        ("3.5", "3.5"),  # a decimal point stays
        ("u.s.", "us"),
        ("red/blue", "red blue"),  # between letters: a space
        ("red / blue", "red blue"),
        ("t-shirt", "t shirt"),
        ("- t-shirt", "tshirt"),  # one dash beside a space removes every dash
        ("yes?\n", "yes"),
        ("", ""),
    ],
)
def test_vqa_normalisation(text, expected):
    assert metrics.normalize_vqa_answer(text) == expected


@pytest.mark.parametrize(
    ("matches", "expected"),
    [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)],  # 1: nine annotators see 1/3, itself sees 0
)
def test_vqa_accuracy_by_number_of_agreeing_annotators(matches, expected):
    answers = ["yes"] * matches + [f"other {i}" for i in range(10 - matches)]
    assert metrics.vqa_accuracy("Yes.", answers) == pytest.approx(expected)


def test_vqav2_variant_leaves_unanimous_answers_as_they_are():
    assert metrics.vqa_accuracy("the dog", ["dog"] * 10) == 1
    assert metrics.vqa_accuracy("the dog", ["dog"] * 10, variant="vqav2") == 0
    assert metrics.vqa_accuracy("the dog", ["dog"] * 9 + ["cat"], variant="vqav2") == 1
    assert metrics.vqa_accuracy("the dog", ["the dog"] * 10, variant="vqav2") == 1


@pytest.mark.parametrize("metric", ["relaxed_accuracy", "anls", "exact_match"])
@pytest.mark.parametrize("answers", [[], "a string"])
def test_answers_must_be_a_non_empty_list(metric, answers):
    with pytest.raises(ValueError, match="answers"):
        metrics.METRICS[metric]("x", answers)


def test_vqa_accuracy_needs_several_annotators():
    with pytest.raises(ValueError, match="annotators"):
        metrics.vqa_accuracy("x", ["x"])
    with pytest.raises(ValueError, match="variant"):
        metrics.vqa_accuracy("x", ["x"] * 10, variant="v3")
