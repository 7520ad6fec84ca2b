"""Multiple choice: which option a free answer means, by the rules of each benchmark, and the score from it, in [0, 1].

The rules are those of the public evaluation harness (lmms-eval) and of the benchmarks' authors, quirks included. Where those
draw an option at random because the rules find none, the score here is the chance that the draw is right: their figure on
average, without its noise.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterator, Sequence

from .metrics import NUMBER_WORDS, exact_match

LETTERS = string.ascii_uppercase


def lettered(options: Sequence[str]) -> dict[str, str]:
    """{"A": first option, "B": second, ...}"""
    return dict(zip(LETTERS, options, strict=False))


# --- AI2D, RealWorldQA, SEED -------------------------------------------------------------------------------------------------


def ai2d(prediction: str, answers: Sequence[str], options: Sequence[str] = ()) -> float:
    """1 for the right letter alone or in front of a full stop ("B. the leaf"); "B) the leaf" counts as wrong."""
    return exact_match(option_letter(prediction), answers)


def option_letter(prediction: str) -> str:
    """The letter of a prediction that starts like "B. the leaf", else the prediction as it is ("A) leaf" stays)."""
    match = re.match(r"\s*([A-Z])\.", prediction)
    return match.group(1) if match else prediction


def realworldqa(prediction: str, answers: Sequence[str], options: Sequence[str] = ()) -> float:
    """Exact match after `option_letter_from_text`."""
    return exact_match(option_letter_from_text(prediction, options), answers)


def option_letter_from_text(prediction: str, options: Sequence[str]) -> str:
    """The letter of the option whose text comes first in the prediction; without one the prediction without punctuation.

    As published, case counts ("right" is not "Right"), an option with punctuation of its own ("Left.") is never found, and only
    a prediction that is nothing but a number word becomes a digit ("Two" is "2", "Two." stays).
    """
    text = re.sub(r"[^\w\s]", "", NUMBER_WORDS.get(prediction.lower(), prediction)).strip()
    found = [(text.find(option), letter) for letter, option in lettered(options).items() if option and option in text]
    return min(found)[1] if found else text


def listed_options(question: str) -> list[str]:
    """What stands behind "A. ", "B. " and so on to the end of the line: "A. Left" gives "Left"."""
    return [option.strip() for option in re.findall(r"\b[A-Z]\.\s+([^\n]*)", question)]


def seed(prediction: str, answers: Sequence[str], options: Sequence[str] = ()) -> float:
    """SEED-Bench: 1 if the first character is the right letter, in either case."""
    return exact_match(prediction.strip()[:1], answers)


# --- MMMU --------------------------------------------------------------------------------------------------------------------


def mmmu(prediction: str, answers: Sequence[str], options: Sequence[str] = ()) -> float:
    """MMMU (Yue et al. 2024): `mmmu_choice` against the letter; without options `mmmu_open`.

    The official score draws one of n options where no rule applies: 1/n here.
    """
    if not options:
        return mmmu_open(prediction, answers)
    letter = mmmu_choice(prediction, options)
    return 1 / len(options) if letter is None else float(letter in answers)


def mmmu_choice(prediction: str, options: Sequence[str]) -> str | None:
    """The first rule that finds an option decides: "(A)"; "A "; "A."; and of answers longer than five words the option's text.

    Several options found by one rule: the one that is mentioned last.
    """
    for mark in ",.!?;:'":  # one after the other: "A,." keeps its comma
        prediction = prediction.strip(mark)
    text = f" {prediction} "
    choices = lettered(options)
    for pattern, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = [letter for letter in choices if pattern.format(letter) in text]
        if found:
            return max(found, key=lambda letter: text.rfind(place.format(letter)))
    lower = text.lower()
    found = [letter for letter, option in choices.items() if len(text.split()) > 5 and option.lower() in lower]
    return max(found, key=lambda letter: lower.rfind(choices[letter].lower()), default=None)


def mmmu_open(prediction: str, answers: Sequence[str]) -> float:
    """1 if a reference text is part of a key phrase of the prediction, or a number in one equals a reference to two decimals.

    Key phrases are what follows "is", "so", "answer" and the like in a line, or everything where no line has such a word.
    """
    references = {form for answer in answers for form in _comparable(answer)}
    texts = {form for form in references if isinstance(form, str)}
    for phrase in _key_phrases(prediction):
        for part in (phrase, *_numbers(phrase)):
            for form in _comparable(part):
                if form in references or (isinstance(form, str) and any(text in form for text in texts)):
                    return 1.0
    return 0.0


_ANSWER_FOLLOWS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")


def _key_phrases(text: str) -> list[str]:
    lines = text.strip().strip(".").lower().split("\n")
    phrases = []
    for number, line in enumerate(lines, 1):
        marks = (*_ANSWER_FOLLOWS, "=") if number == len(lines) else _ANSWER_FOLLOWS  # an equation counts as the last line
        shortest = ""
        for tail in (line.split(mark)[-1].strip() for mark in marks if mark in line):
            if not shortest or len(tail) < len(shortest):
                shortest = tail
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            phrases.append(shortest)
    return phrases or ["\n".join(lines)]


def _numbers(text: str) -> Iterator[str]:
    yield from re.findall(r"-?\b\d{1,3}(?:,\d{3})+\b", text)  # 12,345
    yield from re.findall(r"-?\d+(?:\.\d+)?[eE][+-]?\d+", text)  # 1.2e-3
    yield from re.findall(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])", text)  # 12, 1.2, .2


def _comparable(text: str) -> list[float | str]:
    """A number rounded to two decimals, else the lower-case text; a single letter only with a space beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


# --- MMBench -----------------------------------------------------------------------------------------------------------------

# What may surround a letter that stands as a word of its own.
_AROUND = [("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ")."), (":", ""), (":", ","), (":", ".")]
_AROUND += [(":", ")"), (":", ").")]


def mmbench(prediction: str, answers: Sequence[str], options: Sequence[str] = ()) -> float:
    """MMBench (Liu et al. 2023) of one rotation of a question's options: `mmbench_choice` against the letter.

    Where no rule applies the harness asks a language model behind an API, and without one draws among A to E: 1/5 here. A
    question counts only if every rotation is right: `comp.data.batch.Sample.group`.
    """
    letter = mmbench_choice(prediction, options)
    return 1 / 5 if letter is None else float(letter in answers)


def mmbench_choice(prediction: str, options: Sequence[str]) -> str | None:
    """The only letter among the words ("A" in more than three words may be an article and does not count), or the only one
    in punctuation such as "(B)." or "B:", or the only option among the first four whose text occurs in the answer."""
    words = prediction.split()
    found = [letter for letter in LETTERS[:5] if letter in words]
    if len(found) == 1 and not ("A" in words and len(words) > 3):
        return found[0]
    for before, after in _AROUND:
        found = [letter for letter in LETTERS[:5] if before + letter + after in words]
        if len(found) == 1:
            return found[0]
    text = prediction.lower()
    found = [letter for letter, option in lettered(options[:4]).items() if option.lower() in text]
    return found[0] if len(found) == 1 else None


CHOICE_METRICS: dict[str, Callable[[str, Sequence[str], Sequence[str]], float]] = {
    "ai2d": ai2d,
    "realworldqa": realworldqa,
    "seed": seed,
    "mmmu": mmmu,
    "mmbench": mmbench,
}
"""Metrics that are also given the options of the question."""
