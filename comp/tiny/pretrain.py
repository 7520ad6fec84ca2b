"""Makes the pre-trained start of the default recipe: `python -m comp.tiny.pretrain` (about 25 minutes of processor time).

Continual pre-training needs parts that know something and do not know each other:

- vision: a SigLIP tower with a learned position table for one low resolution, 64 x 64 pixels. It is trained with labels to
  say, patch by patch, which character or coloured bar has its centre there, on whole training pages squeezed into 64 x 64:
  the one size it has met, at which most characters are small and narrow. It never sees a word of a question.
- language: a Qwen2 model with a byte-level tokenizer. It is trained on questions about pages that are *typed out* as text, so
  that it knows the language of the task and reads from its context. It never sees an image.

Only training scans and training tables are used. The weights are stored in float16 in Hugging Face format.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from ..data.batch import IGNORED, Message
from ..data.packing import pad_right
from ..data.template import SPECIAL_TOKENS, ChatTemplate, load_tokenizer, num_rows
from .pages import MARKS, MAX_TURNS, TRANSCRIPT, mark_labels, random_scene
from .scenes import Drawing, Mark, Question, Scene

IMAGE_SIZE, PATCH_SIZE = 64, 8
GRID = IMAGE_SIZE // PATCH_SIZE
SIZE: dict[str, Any] = dict(hidden_size=96, num_hidden_layers=4, num_attention_heads=3)
"""Of both models."""
VOCABULARY_SIZE = 512
TEMPLATE_TEXT = "system user assistant You are a helpful assistant."
"""What every conversation repeats: words that are one token each halve its length."""
WORDS = (
    *("system", "user", "assistant", "You", " helpful", " assistant", " row", " column"),
    *(" left", " right", " above", " below", " box", " largest", " smallest"),
)
"""Words that a tokenizer learns as one token when its model is continued."""
READING_STEPS = 400  # of the language model: reads one number before it meets other questions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "assets")
    parser.add_argument("--parts", nargs="+", choices=("vision", "language"), default=("vision", "language"))
    parser.add_argument("--vision-steps", type=int, default=3000)
    parser.add_argument("--language-steps", type=int, default=2200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--continue-vision", action="store_true", help="start from the tower that is in --out already")
    parser.add_argument("--continue-language", action="store_true", help="the same of the language model and its tokenizer")
    args = parser.parse_args()
    if "vision" in args.parts:
        torch.manual_seed(args.seed)
        pretrain_vision(args.out / "vision", args.vision_steps, args.seed, continued=args.continue_vision)
    if "language" in args.parts:
        torch.manual_seed(args.seed)
        pretrain_language(args.out / "language", args.language_steps, args.seed, continued=args.continue_language)


# --- vision ------------------------------------------------------------------------------------------------------------------


def pretrain_vision(folder: Path, steps: int, seed: int, batch_size: int = 32, continued: bool = False) -> None:
    """Train the tower with labels and save it without its classification head."""
    config = SiglipVisionConfig(
        **SIZE,
        intermediate_size=384,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        vision_use_head=False,
    )
    tower = SiglipVisionModel.from_pretrained(folder, dtype=torch.float32) if continued else SiglipVisionModel(config)
    head = nn.Linear(config.hidden_size, len(MARKS))
    nn.init.constant_(head.bias, -4.0)  # most patches hold no centre of anything
    parameters = [*tower.parameters(), *head.parameters()]
    batches = vision_batches(np.random.default_rng([seed, 1]), batch_size)

    def step(_: int) -> tuple[Tensor, dict[str, float]]:
        pixels, labels = next(batches)
        logits = head(tower(pixel_values=pixels).last_hidden_state)
        loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / labels.sum()
        found = (logits > 0) & (labels > 0)
        return loss, dict(recall=float(found.sum() / labels.sum()), claims=float((logits > 0).sum() / labels.sum()))

    optimise("vision", parameters, step, steps, lr=2e-3)
    tower.half().save_pretrained(folder)


def vision_batches(rng: np.random.Generator, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (pixel_values [B, 3, 64, 64] in [-1, 1], labels [B, patches, classes])."""
    while True:
        pages = [squeezed(random_scene(rng, "train").draw()) for _ in range(batch_size)]
        pixels = torch.from_numpy(np.stack([np.asarray(image, np.float32) for image, _ in pages]))
        yield pixels.permute(0, 3, 1, 2) / 127.5 - 1, torch.from_numpy(np.stack([labels for _, labels in pages]))


def squeezed(drawing: Drawing) -> tuple[Image.Image, np.ndarray]:
    """A whole page in the one size of pre-training, and which marks have their centre in which patch."""
    image = drawing.image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    return image, mark_labels(drawing, GRID, GRID).reshape(GRID * GRID, len(MARKS))


# --- language ----------------------------------------------------------------------------------------------------------------


def pretrain_language(
    folder: Path, steps: int, seed: int, batch_size: int = 32, num_pages: int = 8000, continued: bool = False
) -> None:
    """Train tokenizer and model on questions about typed pages: at first only to read one number, then everything.

    Reading first is what makes this quick: copying from the page emerges within a hundred short batches, and every other
    question builds on it; with all questions from the start the model only guesses for more than 600 long batches. A model that
    is `continued` reads already and goes on with everything.
    """
    rng = np.random.default_rng([seed, 2])
    reading = [number_to_read(rng) for _ in range(num_pages)]
    everything = [typed_conversation(random_scene(rng, "train"), rng) for _ in range(num_pages)]
    if continued:
        tokenizer = load_tokenizer(str(folder))
    else:
        texts = (message.text for messages in reading + everything for message in messages)
        tokenizer = train_tokenizer(itertools.chain(texts, [TEMPLATE_TEXT] * num_pages))
    template = ChatTemplate(tokenizer)
    config = Qwen2Config(
        vocab_size=num_rows(tokenizer),
        **SIZE,
        intermediate_size=256,
        num_key_value_heads=SIZE["num_attention_heads"],
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=template.turn_end,
        pad_token_id=template.pad_id,
    )
    model = Qwen2ForCausalLM(config)
    if continued:
        model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
        add_words(tokenizer, model, WORDS)
        template = ChatTemplate(tokenizer)
    lessons = [
        language_batches([template.encode(messages, []) for messages in corpus], batch_size, template.pad_id, rng)
        for corpus in (reading, everything)
    ]

    def step(i: int) -> tuple[Tensor, dict[str, float]]:
        ids, labels = next(lessons[continued or i >= READING_STEPS])
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]  # causal and padded on the right: no mask needed
        learned = labels[:, 1:] != IGNORED
        logits, targets = model.lm_head(hidden[learned]), labels[:, 1:][learned]
        return F.cross_entropy(logits, targets), dict(tokens_right=float((logits.argmax(-1) == targets).float().mean()))

    optimise("language", list(model.parameters()), step, steps, lr=3e-3)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def language_batches(
    encoded: list[tuple[list[int], list[int]]], batch_size: int, pad_id: int, rng: np.random.Generator, chunk: int = 4
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (ids, labels), both [B, L]; conversations of like length come together, which saves padding."""
    while True:
        chosen = [encoded[i] for i in rng.integers(len(encoded), size=batch_size * chunk)]
        chosen.sort(key=lambda pair: len(pair[0]))
        for first in rng.permutation(chunk) * batch_size:
            ids, labels = zip(*chosen[first : first + batch_size])
            yield pad_right(ids, pad_id)[0], pad_right(labels, IGNORED)[0]


def number_to_read(rng: np.random.Generator) -> list[Message]:
    """A number of 1 to 5 digits, some of them with a gap in front, and the question what it is."""
    digits = [str(digit) for digit in rng.integers(0, 10, size=rng.integers(1, 6))]
    typed = "".join(" " * int(rng.integers(3) * rng.integers(2)) + digit for digit in digits)
    question = Message(role="user", text=f"{typed}\nWhat number is written?")
    return [question, Message(role="assistant", text="".join(digits))]


def typed_conversation(scene: Scene, rng: np.random.Generator) -> list[Message]:
    """The page typed out, then some of its questions with their answers."""
    questions = [*scene.questions, Question("transcript", TRANSCRIPT, scene.text)]
    messages = []
    for i in rng.permutation(len(questions))[:MAX_TURNS]:
        question = questions[i]
        messages += [Message(role="user", text=question.text), Message(role="assistant", text=question.answer)]
    messages[0].text = type_out(scene.draw().marks, rng) + messages[0].text
    return messages


def type_out(marks: tuple[Mark, ...], rng: np.random.Generator) -> str:
    """Marks in reading order, one page in two with random gaps, as text layers of pages have them."""
    gaps = int(rng.integers(2)) * int(rng.integers(1, 4))
    text = ""
    for _, line in itertools.groupby(marks, key=lambda mark: mark.line):
        for mark in line:
            text += " " * int(rng.integers(gaps + 1)) + mark.text
        text += " " * int(rng.integers(gaps + 1)) + "\n"
    return text


def add_words(tokenizer: PreTrainedTokenizerBase, model: Qwen2ForCausalLM, words: Sequence[str]) -> None:
    """Give each word that is several tokens one of its own, which begins as the mean of their embeddings."""
    pieces = {word: tokenizer(word, add_special_tokens=False)["input_ids"] for word in words}
    new = [word for word, ids in pieces.items() if len(ids) > 1]
    tokenizer.add_tokens(new)
    rows = model.resize_token_embeddings(len(tokenizer), mean_resizing=False).weight
    with torch.no_grad():
        for word in new:
            rows[tokenizer.convert_tokens_to_ids(word)] = rows[pieces[word]].mean(0)


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: nothing is ever unknown; digits and spaces stay single tokens."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}|[^\s\p{L}\p{N}]|\s"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[t for t in SPECIAL_TOKENS if t not in ("<|im_end|>", "<|endoftext|>")],
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


# --- shared ------------------------------------------------------------------------------------------------------------------


def optimise(
    name: str,
    parameters: Sequence[nn.Parameter],
    step: Callable[[int], tuple[Tensor, dict[str, float]]],
    steps: int,
    lr: float,
    warmup: int = 50,
) -> None:
    """AdamW with warm-up and cosine decay; a printed line now and then."""
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda i: min((i + 1) / warmup, 0.5 * (1 + math.cos(math.pi * i / steps)))
    )
    start = time.perf_counter()
    for i in range(steps):
        loss, figures = step(i)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        if i % 50 == 0 or i + 1 == steps:
            words = "  ".join(f"{key} {value:.3f}" for key, value in figures.items())
            print(
                f"{name} step {i + 1}/{steps}  loss {loss.item():.3f}  {words}  {time.perf_counter() - start:.0f} s", flush=True
            )


if __name__ == "__main__":
    main()
