"""Scores of visual question answering: a prediction against the references of one question, in [0, 1].

Every metric follows the public evaluation harness (lmms-eval) to the letter, quirks included, so that figures compare; where
a quirk surprises, the docstring says so. White space around a prediction never counts: the harness strips it before any metric
sees it. Average the values over questions for the figure that papers print.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from functools import partial

# --- relaxed accuracy (ChartQA) ----------------------------------------------------------------------------------------------


def relaxed_accuracy(prediction: str, answers: Sequence[str], tolerance: float = 0.05) -> float:
    """1 if a number lies within 5% of the reference, or a text equals it up to case (Methani et al. 2020, as used by ChartQA).

    "12%" reads as 0.12, so "5" does not match "5%". Thousands separators, currency signs and units are not understood: "1,000"
    is text. Years are numbers like others: "2005" matches "2010". A reference of 0 is compared as text, since no relative
    error exists there. Several references: the best counts.
    """
    prediction = prediction.strip()
    return _best(lambda answer: float(_relaxed_match(prediction, answer, tolerance)), answers)


def _relaxed_match(prediction: str, answer: str, tolerance: float) -> bool:
    number, target = _as_number(prediction), _as_number(answer)
    if number is not None and target:
        return abs(number - target) / abs(target) <= tolerance
    return prediction.lower() == answer.lower()


def _as_number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


# --- ANLS (DocVQA, InfographicVQA) -------------------------------------------------------------------------------------------


def anls(prediction: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity of one question (Biten et al. 2019): the best reference, 0 below `threshold`.

    The distance is between lower-cased, single-spaced texts; it is divided by the longer of the two texts in capitals with all
    their spaces, as the benchmarks' scorers do ("ß" has length 2). A similarity of exactly `threshold` counts, with the
    harness; in the paper it gives 0.
    """
    prediction = prediction.strip()
    similarity = _best(lambda answer: 1.0 - _normalised_distance(prediction, answer), answers)
    return similarity if similarity >= threshold else 0.0


def _normalised_distance(prediction: str, answer: str) -> float:
    longest = max(len(prediction.upper()), len(answer.upper()))
    distance = levenshtein(" ".join(prediction.lower().split()), " ".join(answer.lower().split()))
    return distance / longest if longest else 0.0


def levenshtein(a: str, b: str) -> int:
    """Fewest insertions, deletions and substitutions of one character that turn `a` into `b`."""
    row = list(range(len(b) + 1))  # row[j]: distance from the part of `a` seen so far to b[:j]
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


# --- exact match (GQA, and AI2D and RealWorldQA in choices.py) ---------------------------------------------------------------

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
NUMBER_WORDS = {
    word: str(i)
    for i, word in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))
}


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction equals a reference up to case and ASCII punctuation. Spaces within count."""
    text = plain(prediction.strip())
    return _best(lambda answer: float(text == plain(answer)), answers)


def plain(text: str) -> str:
    """Lower case without ASCII punctuation."""
    return text.lower().translate(_WITHOUT_PUNCTUATION)


# --- VQA accuracy (VQAv2, OK-VQA, TextVQA) -----------------------------------------------------------------------------------

_ARTICLES = ("a", "an", "the")
_VQA_NUMBERS = {"none": "0", **NUMBER_WORDS}
_VQA_PUNCTUATION = ';/[]"{}()=+\\_->@`,?!<'
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# A contraction with any one apostrophe forgotten, to the contraction; "somebody'd" is turned round in the official table.
_RESTORED = {
    word[:i] + word[i + 1 :]: word for word in _CONTRACTIONS.split() for i, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}


def vqa_accuracy(prediction: str, answers: Sequence[str], variant: str = "evalai") -> float:
    """Agreement with human annotators (Antol et al. 2015): the mean over annotators of min(1, matches among the rest / 3).

    Args:
        answers:  one per annotator, repeats included; the benchmarks have ten. Fewer than four could not reach 1: ValueError.
        variant:  "evalai" (OK-VQA, TextVQA) normalises both sides always; "vqav2" normalises the references, and drops
            punctuation and articles from the prediction, only where the annotators disagree.
    """
    if variant not in ("evalai", "vqav2"):
        raise ValueError(f"variant must be 'evalai' or 'vqav2', got {variant!r}")
    if len(answers) < 4:
        raise ValueError(
            f"answers needs at least four annotators (the benchmarks have ten), got {len(answers)}; see exact_match"
        )
    if variant == "evalai":
        prediction, answers = normalize_vqa_answer(prediction), [normalize_vqa_answer(answer) for answer in answers]
    else:
        prediction, answers = _one_line(prediction), [_one_line(answer) for answer in answers]
        if len(set(answers)) > 1:
            prediction, answers = _vqa_words(prediction), [_vqa_words(answer) for answer in answers]
    hits = [answer == prediction for answer in answers]
    return sum(min(1.0, (sum(hits) - hit) / 3) for hit in hits) / len(hits)


def normalize_vqa_answer(text: str) -> str:
    """The form in which EvalAI compares answers: no punctuation, articles or number words, contractions with apostrophes."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return _vqa_words(_one_line(text))


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _vqa_words(text: str) -> str:
    """Punctuation away where it touches a space, else to a space; then numbers, articles and contractions word by word."""
    original = text
    digit_groups = re.search(r"\d,+\d", original) is not None
    for mark in _VQA_PUNCTUATION:
        touches_space = f"{mark} " in original or f" {mark}" in original
        text = text.replace(mark, "" if touches_space or digit_groups else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = (_VQA_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


def _best(score: Callable[[str], float], answers: Sequence[str]) -> float:
    if isinstance(answers, str) or not answers:
        raise ValueError(f"answers must be a non-empty list of strings, got {answers!r}")
    return max(score(answer) for answer in answers)


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "relaxed_accuracy": relaxed_accuracy,
    "anls": anls,
    "exact_match": exact_match,
    "vqa_accuracy": vqa_accuracy,
    "vqav2_accuracy": partial(vqa_accuracy, variant="vqav2"),
}
"""Metrics of open answers; those of multiple choice are `comp.eval.choices.CHOICE_METRICS`."""
