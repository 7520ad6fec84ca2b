"""From models on disk to a CoMP and back: where answers end, chat template, vocabularies with unused ids."""

import json

import pytest
import torch
from tokenizers import Tokenizer
from toy import ColouredRectangles, export_toy_model, make_tokenizer, toy_config
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast, Qwen2ForCausalLM

from comp import CoMP
from comp.build import build_model, export_model, make_sample_encoder
from comp.config import ConfigError
from comp.data.batch import Message
from comp.data.packing import collate
from comp.data.template import SPECIAL_TOKENS, load_tokenizer, num_rows
from comp.parallel import start_world
from comp.train.trainer import Trainer

MOVED = 300  # the toy tokenizer has ids below


@pytest.fixture
def base_folder(toy_folder):
    """As base models come: they end at <|endoftext|> alone, and sample."""
    language_model = Qwen2ForCausalLM.from_pretrained(toy_folder / "language")
    tokenizer = AutoTokenizer.from_pretrained(toy_folder / "language")
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    language_model.config.eos_token_id, language_model.config.pad_token_id = end, None
    language_model.generation_config = GenerationConfig(eos_token_id=end, do_sample=True, temperature=0.7)
    (toy_folder / "language").unlink()
    language_model.save_pretrained(toy_folder / "language")
    tokenizer.save_pretrained(toy_folder / "language")
    return toy_folder


def test_the_export_says_where_answers_end(base_folder):
    config = toy_config(base_folder)
    model, template = build_model(config)
    export_model(model, template, config, start_world("cpu"), base_folder / "export")
    language = base_folder / "export" / "language"
    ends = [template.turn_end, template.pad_id]
    for name in ("config.json", "generation_config.json"):
        stored = json.loads((language / name).read_text())
        assert stored["eos_token_id"] == ends and stored["pad_token_id"] == template.pad_id, name
    assert "temperature" not in stored and not stored.get("do_sample"), "of the base model"
    tokenizer = AutoTokenizer.from_pretrained(language)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_answers_of_the_export_end_by_themselves(base_folder):
    """Without being told the ids of the template."""
    export_toy_model(base_folder)
    model, template = build_model(toy_config(base_folder))
    model.save_pretrained(base_folder / "export")
    model = CoMP.from_pretrained(base_folder / "export")
    encoder = make_sample_encoder(model, template, max_text_tokens=256)
    prompts = [encoder.encode_prompt(ColouredRectangles(6, mixed=False)[i]) for i in range(4)]
    batch = collate(prompts, pad_id=template.pad_id, patch_features=48)
    embedding = model.language_model.get_input_embeddings()
    for end in (template.turn_end, template.pad_id):
        free = model.generate(batch, max_new_tokens=6, eos_token_id=[])
        with torch.no_grad():  # tied with the head: what was answered third becomes the end of an answer
            embedding.weight[end] = 3 * embedding.weight[free[0][2]]
        answers, free = (model.generate(batch, max_new_tokens=6, eos_token_id=ids) for ids in (None, []))
        assert any(end in row for row in free)
        for answer, row in zip(answers, free):
            stops = [row.index(i) for i in template.end_ids if i in row]
            assert answer == row[: min(stops, default=6)]


MESSAGES = [
    Message(role="user", text="What colour is it?", images=["a.png"]),
    Message(role="assistant", text="red"),
    Message(role="user", text="Is it wide or tall?"),
]


@pytest.mark.parametrize("system", [False, True])
def test_the_exported_chat_template_is_the_one_of_training(system, base_folder):
    _, template = build_model(toy_config(base_folder))
    template.tokenizer.chat_template = "{{ 'something else' }}"
    template.save_tokenizer(base_folder / "tokenizer")
    assert template.tokenizer.chat_template == "{{ 'something else' }}", "saving changes nothing"
    tokenizer = AutoTokenizer.from_pretrained(base_folder / "tokenizer")
    messages = [Message(role="system", text="Answer in 'French'."), *MESSAGES] if system else MESSAGES
    chat = [
        dict(role=m.role, content=[dict(type="text", text=m.text), *[dict(type="image")] * len(m.images)])
        if m.role == "user"
        else dict(role=m.role, content=m.text)
        for m in messages
    ]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == template.encode_prompt(messages, [1])
    whole = tokenizer.apply_chat_template(chat[:-1], tokenize=False)
    assert tokenizer(whole, add_special_tokens=False)["input_ids"] == template.encode(messages[:-1], [1])[0]


def tokenizer_with_holes(special: bool):
    """The words of the toy tokenizer, pieces of the answers moved behind all others."""
    state = json.loads(make_tokenizer().backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    for number, word in enumerate(("wide", "tall", *"rgbwak")):
        vocabulary[word] = MOVED + number
    if special:
        known = [token["content"] for token in state["added_tokens"]]
        for number, token in enumerate(token for token in SPECIAL_TOKENS if token not in known):
            vocabulary[token] = 308 + number
            state["added_tokens"].append({**state["added_tokens"][0], "id": 308 + number, "content": token})
    tokenizer = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


@pytest.mark.slow
def test_unused_ids_between_the_words(toy_folder):
    """Every id has a row, and the word prior counts them all; the run learns from words behind the unused ids."""
    tokenizer = tokenizer_with_holes(special=True)
    tokenizer.save_pretrained(toy_folder / "tokenizer")
    assert num_rows(tokenizer) == max(tokenizer.get_vocab().values()) + 1 > len(tokenizer)
    config = toy_config(toy_folder)
    config.language.tokenizer = str(toy_folder / "tokenizer")
    for stage in config.stages:
        stage.max_steps = 1
    trainer = Trainer(config)
    rows = trainer.model.language_model.get_input_embeddings().num_embeddings
    assert rows == num_rows(trainer.template.tokenizer) and len(trainer.model.word_counts) == rows
    assert trainer.model.word_counts[MOVED:].sum() > 0, "or this would show nothing"
    trainer.run()


def test_an_added_token_never_takes_the_id_of_a_word(toy_folder):
    tokenizer_with_holes(special=False).save_pretrained(toy_folder / "tokenizer")
    with pytest.raises(ValueError, match=r"lacks <\|vision_start\|>, and adding it gives the id \d+ of .* ids up to"):
        load_tokenizer(str(toy_folder / "tokenizer"))
    config = toy_config(toy_folder)
    config.language.tokenizer = str(toy_folder / "tokenizer")
    with pytest.raises(ConfigError, match="tokenizer cannot be loaded: the tokenizer lacks"):
        build_model(config)
