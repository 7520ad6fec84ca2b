"""Toy pre-trained models and the toy's chat template, made once per test session; memory that nobody wrote shows as NaN."""

import pytest
from toy import make_tokenizer, save_toy_models
from unwritten_memory import unwritten_memory_is_nan

from comp.data.template import ChatTemplate, load_tokenizer

__all__ = ["unwritten_memory_is_nan"]


@pytest.fixture(scope="session")
def toy_models(tmp_path_factory):
    """A folder with vision/ and language/ in Hugging Face layout."""
    folder = tmp_path_factory.mktemp("toy")
    save_toy_models(folder)
    return folder


@pytest.fixture
def toy_folder(toy_models, tmp_path):
    """A fresh folder that sees the toy models; runs go to its runs/."""
    for name in ("vision", "language"):
        (tmp_path / name).symlink_to(toy_models / name)
    return tmp_path


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return ChatTemplate(load_tokenizer(str(folder)))
