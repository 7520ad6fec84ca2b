"""Conversations as token ids with labels: ChatML as Qwen2-VL writes it.

    <|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n
    <|im_start|>user\\n<|vision_start|><|image_pad|>...<|vision_end|>What is this?<|im_end|>\\n
    <|im_start|>assistant\\nA cat.<|im_end|>\\n

An image stands as one <|image_pad|> per visual token. Learned are the answers and their <|im_end|>, in every assistant turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .batch import IGNORED, Message, Sample

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, IMAGE = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END, VISION_START, VISION_END, IMAGE)
ROLES = ("system", "user", "assistant")


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory or hub id, with the special tokens of the template added where they are missing.

    The word embeddings must have `len(tokenizer)` rows afterwards. Padding is <|endoftext|>, an answer ends at <|im_end|>.
    """
    tokenizer = AutoTokenizer.from_pretrained(path)
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([token for token in SPECIAL_TOKENS if token not in known], special_tokens=True)
    tokenizer.pad_token, tokenizer.eos_token = END_OF_TEXT, TURN_END
    return tokenizer


class ChatTemplate:
    """Encodes conversations with one tokenizer; text that happens to spell a special token stays text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system: str = "You are a helpful assistant."):
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
        if missing:
            raise ValueError(f"tokenizer lacks {', '.join(missing)}; load it with comp.data.template.load_tokenizer")
        self.tokenizer = tokenizer
        self.system = system
        self.pad_id, self.turn_start, self.turn_end, self.vision_start, self.vision_end, self.image_id = (
            vocabulary[token] for token in SPECIAL_TOKENS
        )
        self.newline = self.encode_text("\n")
        self.heads = {role: [self.turn_start, *self.encode_text(role), *self.newline] for role in ROLES}

    def encode_text(self, text: str) -> list[int]:
        """Plain text, nothing added."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_text` of many, faster."""
        return self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer, special tokens left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def encode(self, messages: Sequence[Message], visual_tokens: Sequence[int]) -> tuple[list[int], list[int]]:
        """(input ids, labels) of a conversation; `visual_tokens` counts the tokens of its images, in order.

        Labels are the ids themselves where they are learned, IGNORED elsewhere; not shifted.
        """
        ids: list[int] = []
        labels: list[int] = []
        counts = iter(visual_tokens)
        messages_with_system = self._with_system(messages)
        texts = self.encode_texts([message.text for message in messages_with_system])
        for message, text_ids in zip(messages_with_system, texts):
            head = self._head(message.role) + self._images(message, counts)
            body = [*text_ids, self.turn_end]
            ids += head + body + self.newline
            learned = body if message.role == "assistant" else [IGNORED] * len(body)
            labels += [IGNORED] * len(head) + learned + [IGNORED] * len(self.newline)
        self._check_all_used(messages, counts)
        return ids, labels

    def encode_prompt(self, messages: Sequence[Message], visual_tokens: Sequence[int]) -> list[int]:
        """Ids of a conversation that ends where the assistant's answer begins."""
        if not messages or messages[-1].role != "user":
            raise ValueError(f"a prompt must end with a user turn, got {[m.role for m in messages]}")
        return self.encode(messages, visual_tokens)[0] + self._head("assistant")

    def alignment_text(self, sample: Sample, shuffle: np.random.Generator | None = None) -> str:
        """Text of the alignment loss and of the word prior, no template: the sample's own (`Sample.text`), else all assistant
        turns joined by a space, in random order where `shuffle` is given."""
        if sample.text is not None:
            return sample.text
        answers = [m.text for m in sample.messages if m.role == "assistant"]
        order = range(len(answers)) if shuffle is None else shuffle.permutation(len(answers))
        return " ".join(answers[i] for i in order)

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        has_system = bool(messages) and messages[0].role == "system"
        return list(messages) if has_system else [Message(role="system", text=self.system), *messages]

    def _head(self, role: str) -> list[int]:
        if role not in ROLES:
            raise ValueError(f"role must be one of {', '.join(ROLES)}, got {role!r}")
        return self.heads[role]

    def _images(self, message: Message, counts) -> list[int]:
        ids: list[int] = []
        for _ in message.images:
            count = next(counts, None)
            if count is None:
                raise ValueError("visual_tokens has fewer entries than the conversation has images")
            ids += [self.vision_start, *[self.image_id] * count, self.vision_end]
        return ids

    def _check_all_used(self, messages: Sequence[Message], counts) -> None:
        unused = len(list(counts))
        if unused:
            images = sum(len(m.images) for m in messages)
            raise ValueError(f"visual_tokens has {images + unused} entries, the conversation has {images} images")
