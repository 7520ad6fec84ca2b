"""What the command lines share: types of options, and an output that takes any text."""

from __future__ import annotations

import argparse
import io
import sys


def positive_int(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def print_anything() -> None:
    """Let stdout show characters that the locale's encoding lacks as escapes, as stderr does, instead of ending the program."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
