"""Conversations as token ids with labels: ChatML as Qwen2-VL writes it.

    <|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n
    <|im_start|>user\\n<|vision_start|><|image_pad|>...<|vision_end|>What is this?<|im_end|>\\n
    <|im_start|>assistant\\nA cat.<|im_end|>\\n

The ids are those of the conversation tokenised in one piece, as other programs do with an export. What the tokenizer puts in
front of a text (<s>, <bos>), which the language model has never been without, stands in front of the whole. An image stands as
one <|image_pad|> per visual token. The answers and their <|im_end|> are learned, in every assistant turn that has a text and
is not marked otherwise.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Sequence
from itertools import takewhile

import numpy as np
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import cached_file

from .batch import IGNORED, Message, Sample

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, IMAGE = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END, VISION_START, VISION_END, IMAGE)
ROLES = ("system", "user", "assistant")
SYSTEM = "You are a helpful assistant."
CHAT_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n' + system + '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- for item in message['content'] if item['type'] == 'image' %}
            {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
        {%- endfor %}
        {%- for item in message['content'] if item['type'] == 'text' %}
            {{- item['text'] }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
"""The template for other programs (Jinja, as transformers reads it): one <|image_pad|> per image, which a processor repeats."""


BEGINS_AS_SET = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer", "GPTNeoXTokenizer")
"""Classes that put a token in front of a text, or none, as `add_bos_token` says, whatever is in tokenizer.json."""


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory or hub id, with the special tokens of the template added where they are missing, and none of
    them taking the blanks beside it (as Phi-4 has them): those are part of the template.

    The word embeddings must have `num_rows(tokenizer)` rows afterwards. Padding is <|endoftext|>, an answer ends at <|im_end|>.

    Raises ValueError where there are no words: transformers makes an empty tokenizer of a folder that holds none
    (findings/transformers_empty_tokenizer.sh).
    """
    tokenizer = _as_written(path)
    known = tokenizer.get_vocab()
    ids = tokenizer("a picture", add_special_tokens=False)["input_ids"]
    if not ids or set(ids) == {tokenizer.unk_token_id}:
        raise ValueError(f"{path} has no tokenizer.json, or one without words: text becomes {ids} by its {len(known)} words")
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS], special_tokens=True)
    _check_ids(tokenizer, known)
    tokenizer.pad_token, tokenizer.eos_token = END_OF_TEXT, TURN_END
    return tokenizer


def _as_written(path: str) -> PreTrainedTokenizerBase:
    """What tokenizer.json says, where there is one: AutoTokenizer takes its words and may split text in another way
    (findings/transformers_5_reads_half_of_tokenizer_json.sh). Both pass over `add_bos_token`, by which DeepSeek's have their
    first token (findings/transformers_5_passes_over_add_bos_token.sh)."""
    try:
        cached_file(path, "tokenizer.json")
    except OSError:
        return AutoTokenizer.from_pretrained(path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    settings = get_tokenizer_config(path)
    begins, kind = settings.get("add_bos_token"), str(settings.get("tokenizer_class")).removesuffix("Fast")
    if isinstance(begins, bool) and kind in BEGINS_AS_SET and tokenizer.bos_token_id is not None:
        if begins != (tokenizer("user")["input_ids"][:1] == [tokenizer.bos_token_id]):
            tokenizer.add_bos_token = begins
    return tokenizer


def num_rows(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that the word embeddings need: the largest id plus one, which is more than `len(tokenizer)` where ids are unused."""
    return max(tokenizer.get_vocab().values()) + 1


def _check_ids(tokenizer: PreTrainedTokenizerBase, before: dict[str, int]) -> None:
    """Added tokens get ids from the number of words on, which are taken where ids before are unused."""
    words = {i: word for word, i in before.items()}
    after = tokenizer.get_vocab()
    for token in SPECIAL_TOKENS:
        if words.get(after[token], token) != token:
            raise ValueError(
                f"the tokenizer lacks {token}, and adding it gives the id {after[token]} of {words[after[token]]!r}: it has "
                f"{len(before)} words with ids up to {max(words)}; give the special tokens ids of their own in tokenizer.json"
            )


class ChatTemplate:
    """Encodes conversations with one tokenizer; text that happens to spell a special token stays text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system: str = SYSTEM):
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
        if missing:
            raise ValueError(f"tokenizer lacks {', '.join(missing)}; load it with comp.data.template.load_tokenizer")
        self.tokenizer = tokenizer
        self.system = system
        self.pad_id, self.turn_start, self.turn_end, self.vision_start, self.vision_end, self.image_id = (
            vocabulary[token] for token in SPECIAL_TOKENS
        )
        first = self.encode_text("user")[0]
        self.start = (
            [] if _is_without_start(tokenizer) else list(takewhile(lambda i: i != first, tokenizer("user")["input_ids"]))
        )
        self._line_end = self.encode_text("\n")
        self._joins_special = self._is_joined_to_special_tokens()
        self.newline = self._encode_parts(["\n"], [self._joins_special])[0]
        heads = self._encode_parts([f"{role}\n" for role in ROLES], [self._joins_special] * len(ROLES))
        self.heads = {role: [self.turn_start, *ids] for role, ids in zip(ROLES, heads)}

    @property
    def end_ids(self) -> list[int]:
        """Ids at which a text ends: of an answer, and of a document."""
        return [self.turn_end, self.pad_id]

    def save_tokenizer(self, folder: str | os.PathLike) -> None:
        """Write the tokenizer with this template, whatever template it came with: the model was trained with this one."""
        tokenizer = copy.deepcopy(self.tokenizer)
        start = "".join(tokenizer.convert_ids_to_tokens(self.start))
        template = CHAT_TEMPLATE.replace("system +", f"{json.dumps(self.system, ensure_ascii=False)} +")
        tokenizer.chat_template = f"{{{{- {json.dumps(start, ensure_ascii=False)} }}}}{template}" if start else template
        tokenizer.save_pretrained(folder)

    def encode_text(self, text: str) -> list[int]:
        """Plain text, nothing added."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_text` of many, faster."""
        return self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer, special tokens left out."""
        return self.tokenizer.batch_decode([list(ids)], skip_special_tokens=True)[0].strip()

    def encode(self, messages: Sequence[Message], visual_tokens: Sequence[int]) -> tuple[list[int], list[int]]:
        """(input ids, labels) of a conversation; `visual_tokens` counts the tokens of its images, in order.

        Labels are the ids themselves where they are learned, IGNORED elsewhere; not shifted.
        """
        ids = list(self.start)
        labels = [IGNORED] * len(ids)
        counts = iter(visual_tokens)
        messages_with_system = self._with_system(messages)
        joined = [not message.images or self._joins_special for message in messages_with_system]
        texts = self._encode_parts([message.text for message in messages_with_system], joined)
        for message, text_ids in zip(messages_with_system, texts):
            head = self._head(message.role) + self._images(message, counts)
            body = [*text_ids, self.turn_end]
            ids += head + body + self.newline
            learned = body if _is_learned(message) else [IGNORED] * len(body)
            labels += [IGNORED] * len(head) + learned + [IGNORED] * len(self.newline)
        self._check_all_used(messages, counts)
        return ids, labels

    def encode_prompt(self, messages: Sequence[Message], visual_tokens: Sequence[int]) -> list[int]:
        """Ids of a conversation that ends where the assistant's answer begins."""
        if not messages or messages[-1].role != "user":
            raise ValueError(f"a prompt must end with a user turn, got {[m.role for m in messages]}")
        return self.encode(messages, visual_tokens)[0] + self._head("assistant")

    def alignment_text(self, sample: Sample, shuffle: np.random.Generator | None = None) -> str:
        """Text of the alignment loss and of the word prior, no template: the sample's own (`Sample.text`), else all learned
        answers joined by a space, in random order where `shuffle` is given."""
        if sample.text is not None:
            return sample.text
        answers = [m.text for m in sample.messages if _is_learned(m)]
        order = range(len(answers)) if shuffle is None else shuffle.permutation(len(answers))
        return " ".join(answers[i] for i in order)

    def _encode_parts(self, texts: Sequence[str], joined: Sequence[bool]) -> list[list[int]]:
        """Ids of texts as they stand within a conversation: those that are `joined` to what is before them, as a turn is to the
        line with its role, have no blank in front, which tokenizers in the manner of Llama 2 put where a text begins."""
        parts = self.encode_texts(["\n" + text if join else text for text, join in zip(texts, joined)])
        start = len(self._line_end)
        for number, (text, join) in enumerate(zip(texts, joined)):
            if join and parts[number][:start] == self._line_end:
                parts[number] = parts[number][start:]
            elif join:  # it begins with a blank that became one word with the end of the line
                parts[number] = self.encode_text(text)
        return parts

    def _is_joined_to_special_tokens(self) -> bool:
        """Whether the tokenizer takes what follows a special token as the rest of a line, and not as a text that begins."""
        alone, behind = self.encode_text("user"), self.tokenizer(f"{TURN_END}user", add_special_tokens=False)["input_ids"][1:]
        return behind != alone and behind == self._encode_parts(["user"], [True])[0]

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        has_system = bool(messages) and messages[0].role == "system"
        return list(messages) if has_system else [Message(role="system", text=self.system), *messages]

    def _head(self, role: str) -> list[int]:
        if role not in ROLES:
            raise ValueError(f"role must be one of {', '.join(ROLES)}, got {role!r}")
        return self.heads[role]

    def _images(self, message: Message, counts: Iterator[int]) -> list[int]:
        ids: list[int] = []
        for _ in message.images:
            count = next(counts, None)
            if count is None:
                raise ValueError("visual_tokens has fewer entries than the conversation has images")
            ids += [self.vision_start, *[self.image_id] * count, self.vision_end]
        return ids

    def _check_all_used(self, messages: Sequence[Message], counts: Iterator[int]) -> None:
        unused = len(list(counts))
        if unused:
            images = sum(len(m.images) for m in messages)
            raise ValueError(f"visual_tokens has {images + unused} entries, the conversation has {images} images")


def _is_without_start(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer is of an export that learned without what it puts in front of a text, as all did once."""
    before, _, after = CHAT_TEMPLATE.partition("system +")
    template = tokenizer.chat_template
    return isinstance(template, str) and template.startswith(before) and template.endswith(after)


def _is_learned(message: Message) -> bool:
    """Silence is no answer to learn: an empty one among others is a gap in the data."""
    return message.role == "assistant" and message.learned and bool(message.text.strip())
