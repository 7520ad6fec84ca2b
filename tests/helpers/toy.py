"""A toy run for tests: small random SigLIP and Qwen2 models saved by transformers, and pictures made on demand."""

from __future__ import annotations

import dataclasses
import itertools
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from comp.config import (
    AlignmentConfig,
    CheckpointConfig,
    Config,
    EvalConfig,
    LanguageConfig,
    OptimConfig,
    SourceConfig,
    StageConfig,
    VisionConfig,
)
from comp.data.batch import BadSampleError, Message, Sample
from comp.data.encode import ImageSettings, SampleEncoder
from comp.data.template import ChatTemplate

COLOURS = ("red", "green", "blue", "black", "white")
QUESTIONS = {"colour": "What colour is it?", "shape": "Is it wide or tall?"}


class ColouredRectangles:
    """Sample i: a rectangle of some colour and size. Every fifth sample is text only, every seventh has two images."""

    def __init__(self, size: int, first: int = 0, mixed: bool = True, broken: tuple[int, ...] = ()):
        self.size, self.first, self.mixed, self.broken = size, first, mixed, broken

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        number = index + self.first
        colour = COLOURS[number % len(COLOURS)]
        width, height = 16 + 8 * (number % 4), 16 + 8 * (number // 4 % 3)
        kind = "colour" if number % 2 else "shape"
        answer = colour if kind == "colour" else ("wide" if width > height else "tall")
        images = [lambda: Image.new("RGB", (width, height), colour)]
        if index in self.broken:
            images = ["/nowhere/broken.png"]
        if self.mixed and number % 5 == 4:
            images = []
        elif self.mixed and number % 7 == 6:
            images = images * 2
        messages = [
            Message(role="user", text=QUESTIONS[kind], images=images),
            Message(role="assistant", text=answer),
        ]
        return Sample(name=f"rectangle {number}", messages=messages, question_type=kind, metric="exact_match")


class MostlyText(ColouredRectangles):
    """One sample in eight has an image."""

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        if index % 8:
            sample.messages[0].images = []
        return sample


class Silent(ColouredRectangles):
    """Every n-th answer has no text."""

    def __init__(self, size: int, every: int = 2):
        super().__init__(size)
        self.every = every

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        if index % self.every == 0:
            sample.messages[-1].text = ""
        return sample


class OnlyBadSamples:
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Sample:
        raise BadSampleError(f"bad {index}: on purpose")


class Albums(ColouredRectangles):
    """Every third sample has more images than any stage of the toy has visual tokens."""

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        if index % 3 == 0:
            sample.messages[0].images = [Image.new("RGB", (8, 8))] * 65
        return sample


class LongAnswers(ColouredRectangles):
    """Every other answer has more words than the toy has positions."""

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        if index % 2:
            sample.messages[-1].text = "red " * 700
        return sample


class NoLength:
    def __getitem__(self, index: int) -> Sample:
        raise NotImplementedError


class Dictionaries(ColouredRectangles):
    def __getitem__(self, index: int) -> dict:
        return {"image": None}


class OddMetric(ColouredRectangles):
    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        sample.metric = "bleu"
        return sample


def make_tokenizer(vocabulary: int = 300) -> PreTrainedTokenizerFast:
    """A byte-level BPE in the manner of Qwen's, without the vision tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([*QUESTIONS.values(), *COLOURS, "wide", "tall", "system user assistant"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def make_sample_encoder(template: ChatTemplate, **changes) -> SampleEncoder:
    """Patches of 4 x 4, two by two a token, up to 16 tokens at native size; `changes` of ImageSettings, or max_text_tokens."""
    settings = dict(
        patch_size=4,
        merge_size=2,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        resolution=None,
        min_visual_tokens=1,
        max_visual_tokens=16,
    )
    max_text_tokens = changes.pop("max_text_tokens", 256)
    return SampleEncoder(template, ImageSettings(**(settings | changes)), max_text_tokens=max_text_tokens)


def save_toy_models(folder: Path) -> None:
    """folder/vision: SigLIP of width 32, patch 4, 4 x 4 table. folder/language: Qwen2 of width 32 with its tokenizer."""
    torch.manual_seed(0)
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    SiglipVisionModel(vision).save_pretrained(folder / "vision")
    tokenizer = make_tokenizer()
    language = Qwen2Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen2ForCausalLM(language).save_pretrained(folder / "language")
    tokenizer.save_pretrained(folder / "language")


def export_toy_model(folder: Path, **language: Any) -> Path:
    """folder/export, as a stage exports it, from the models in `folder`; its answers depend on question and images."""
    from comp.build import build_model, save_processor

    torch.manual_seed(0)
    config = toy_config(folder)
    config.language = dataclasses.replace(config.language, **language)
    model, template = build_model(config)
    model.encoder.pos_mode = "abs+rope"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_proj" in name or "adapter.fc2" in name:  # at their initial size the last token alone decides
                parameter.mul_(6)
    model.save_pretrained(folder / "export")
    save_processor(model, template, folder / "export")
    return folder / "export"


def toy_config(folder: Path, **changes) -> Config:
    """All four stages on rectangles, two or three steps each."""
    data = [SourceConfig(factory="toy:ColouredRectangles", arguments=dict(size=24))]
    common = dict(
        data=data, batch_size=8, max_visual_tokens=64, max_text_tokens=256, forward_visual_tokens=None, forward_text_tokens=None
    )
    align = AlignmentConfig(weight=0.05, epsilon=0.05, temperature=0.05)
    optim = OptimConfig(lr_vision=1e-3, lr_adapter=1e-2, lr_language=1e-3)
    stages = [
        StageConfig(
            name="I",
            trainable=("adapter",),
            rope=False,
            resolution="pretrain",
            optim=OptimConfig(lr_adapter=1e-2),
            alignment=align,
            **common,
        ),
        StageConfig(name="II-a", resolution=32, optim=optim, alignment=align, **common),
        StageConfig(name="II-b", resolution=None, optim=optim, alignment=align, **common),
        StageConfig(name="III", resolution=None, optim=optim, alignment=None, max_steps=2, **common),
    ]
    held_out = [SourceConfig(factory="toy:ColouredRectangles", arguments=dict(size=6, first=100, mixed=False))]
    config = Config(
        name="toy",
        output_dir=str(folder / "runs"),
        vision=VisionConfig(path=str(folder / "vision")),
        language=LanguageConfig(path=str(folder / "language")),
        stages=stages,
        eval=EvalConfig(data=held_out, max_new_tokens=4, batch_size=4),
        checkpoint=CheckpointConfig(every_steps=2, keep=1),
        device="cpu",
        tensorboard=False,
    )
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def main(folder: str, *arguments: str) -> None:
    """A run in a process of its own: field=value, --resume, and --sigterm-in=N for a signal during the N-th step."""
    import comp.train.trainer as module
    from comp.config_io import apply_overrides

    signalled = next((int(a.partition("=")[2]) for a in arguments if a.startswith("--sigterm-in=")), None)
    train_step, steps = module.train_step, itertools.count(1)

    def with_signal(*args, **kwargs):
        if next(steps) == signalled:
            signal.raise_signal(signal.SIGTERM)
        return train_step(*args, **kwargs)

    config = apply_overrides(toy_config(Path(folder)), [a for a in arguments if not a.startswith("--")])
    with patch.object(module, "plot_run"), patch.object(module, "train_step", with_signal), suppress(module.StopRequested):
        module.Trainer(config, resume="--resume" in arguments).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
