"""The export of a stage, opened to be asked."""

from __future__ import annotations

from pathlib import Path

from ..build import loading
from ..config import ConfigError
from ..data.template import ChatTemplate, load_tokenizer
from ..model import CoMP


def check_export(folder: str | Path) -> None:
    """ConfigError where `folder` does not look like the export of a stage."""
    if not all((Path(folder) / part).is_dir() for part in ("vision", "language")):
        raise ConfigError(f"a model must be a folder with vision/ and language/ as a stage exports it, got {folder}")


def load(folder: str | Path) -> tuple[CoMP, ChatTemplate]:
    """The model of an exported folder and the chat template of its tokenizer."""
    check_export(folder)
    with loading(str(folder)):
        return CoMP.from_pretrained(folder), ChatTemplate(load_tokenizer(str(Path(folder) / "language")))
