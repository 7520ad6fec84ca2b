"""Multiple choice on the edge cases where implementations differ; expected values worked out by hand from the rules."""

import pytest

from comp.eval import choices

ANIMALS = ["cat", "dog", "the black cat", "horse"]


def test_ai2d_reads_a_letter_before_a_full_stop():
    assert choices.option_letter(" B. the leaf") == "B"
    assert choices.option_letter("B") == "B"
    assert choices.option_letter("A) foo") == "A) foo"
    assert choices.option_letter("b. leaf") == "b. leaf"
    assert [choices.ai2d(text, ["B"]) for text in ("B", "b", "B. leaf", "B) leaf", "leaf")] == [1, 1, 1, 0, 0]


def test_realworldqa_reads_the_text_of_an_option():
    options = choices.listed_options("Which way?\nA. Left\n B. Straight on \nC. Right\nPlease answer.")
    assert options == ["Left", "Straight on", "Right"]
    for text, expected in {
        "You can go Straight on!": "B",
        "Right, not Left.": "C",  # what comes first in the answer
        "RIGHT.": "RIGHT",  # case counts
        "Two": "2",
        "Two.": "Two",  # more than the word alone
        "two cars": "two cars",
    }.items():
        assert choices.option_letter_from_text(text, options) == expected
    assert choices.option_letter_from_text("Turn left.", ["Turn left."]) == "Turn left"  # the answer has lost its full stop
    assert choices.realworldqa("Three", ["3"]) == 1
    assert choices.realworldqa("Right", ["C"], options) == 1
    assert choices.realworldqa("c.", ["C"], options) == 1


@pytest.mark.parametrize(("prediction", "expected"), [("B", 1), (" b)", 1), ("Because", 1), ("The B", 0), ("", 0), ("(B)", 0)])
def test_seed_reads_the_first_character(prediction, expected):
    assert choices.seed(prediction, ["B"]) == expected


CHOICES = {
    "mmmu": [
        ("B", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("(C) because (A) is not", "A"),  # the bracket mentioned last
        ("(C) not A ", "C"),  # brackets before bare letters
        ("B or D", "D"),
        ("PLAN B is it", "B"),
        ("LA is far", "A"),  # "A " inside a word, as published
        ("A.B", "B"),  # "B " before "A."
        ("A.x B.y", "A"),  # letters before full stops: the first, as published
        ("b", None),
        ("cat", None),  # the text of an option needs more than five words around it
        ("in the picture there is a horse", "D"),
        ("in the picture i see a cat or a horse", "D"),
        ("a horse next to a black dog there", "B"),
        ("it is surely the black cat there", "A"),  # "cat" stands behind "the black cat"
        ("A,.", None),  # marks are stripped one after the other, so the comma stays
        ("A.,", "A"),
        ("E", None),
        ("", None),
    ],
    "mmbench": [
        ("B", "B"),
        ("The answer is B", "B"),
        ("A dog", "A"),  # three words at most: a letter
        ("A dog on grass", "B"),  # more: an article; the text decides
        ("A big dog", "A"),
        ("the answer is A", None),
        ("B or C", None),
        ("B. dog", "B"),
        ("it is (C).", "C"),
        (": D", "D"),
        ("(B) and C.", "C"),  # "C." is tried before "(B)"
        ("B. and C.", None),
        ("E", "E"),  # A to E, whatever the number of options
        ("a horse!", "D"),
        ("the black cat", None),  # "cat" is an option too
        ("bird", None),
        ("", None),
    ],
}


@pytest.mark.parametrize(
    ("rules", "prediction", "expected"), [(rules, *case) for rules, cases in CHOICES.items() for case in cases]
)
def test_choice(rules, prediction, expected):
    assert getattr(choices, f"{rules}_choice")(prediction, ANIMALS) == expected


def test_where_no_rule_applies_the_score_is_the_chance_of_a_draw():
    assert choices.mmmu("no idea", ["B"], ANIMALS) == 1 / len(ANIMALS)
    assert choices.mmbench("bird", ["A"], ANIMALS) == 1 / 5  # A to E, whatever the number of options
    for score in (choices.mmmu, choices.mmbench):
        assert [score(text, ["B"], ANIMALS) for text in ("B", "A")] == [1, 0]


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("12", ["12"], 1),
        ("12.004", ["12"], 1),  # two decimals
        ("12.01", ["12"], 0),
        ("The answer is 1,234.", ["1234"], 1),
        ("1.2e3", ["1200"], 1),
        ("x = 5", ["5"], 1),
        ("x = 5\nso it is 6", ["5"], 0),  # an equation counts in the last line alone
        ("x = 5\nso it is 6", ["6"], 1),
        ("So the final result is Paris", ["paris"], 1),
        ("the capital of France, Paris", ["Paris"], 1),
        ("Parisian", ["Paris"], 1),  # contained
        ("Par", ["Paris"], 0),
        ("5 apples", ["5 apples"], 1),
        ("a", ["a"], 1),
        ("banana", ["a"], 0),  # a single letter needs a space beside it
        ("24 hours", ["1", "24"], 1),
        ("", ["5"], 0),
        ("seven", ["7"], 0),
    ],
)
def test_mmmu_open(prediction, answers, expected):
    assert choices.mmmu(prediction, answers) == expected
