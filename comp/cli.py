"""Types of command line options that the evaluation commands share."""

from __future__ import annotations

import argparse


def positive_int(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
