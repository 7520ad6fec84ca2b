"""Fixtures of the model tests: towers saved by transformers, a small language model."""

from pathlib import Path

import pytest
import transformers
from towers import make_tower


@pytest.fixture(scope="session")
def tower_directory(tmp_path_factory):
    """name -> directory of that tower, saved once."""
    root = tmp_path_factory.mktemp("towers")

    def directory(name: str) -> Path:
        if not (root / name).exists():
            make_tower(name).save_pretrained(root / name)
        return root / name

    return directory


@pytest.fixture
def language_model():
    """A small Qwen2 with random weights; 60 words."""
    config = transformers.Qwen2Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=60,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    return transformers.Qwen2ForCausalLM(config).eval()
