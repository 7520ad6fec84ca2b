"""Small random language models of many families: those that scale or cap their logits, slide a window, keep a state, count
positions in their own way."""

import pytest
import torch
import transformers

WORDS = 100
COMMON = dict(vocab_size=WORDS, bos_token_id=1, eos_token_id=2, pad_token_id=0)
SIZES = dict(COMMON, hidden_size=32, num_hidden_layers=2)
HEADS = dict(SIZES, intermediate_size=64, num_attention_heads=2)
LLAMA = dict(HEADS, num_key_value_heads=1, max_position_embeddings=512)
WITH_HEAD_SIZE = dict(LLAMA, head_dim=16)
MOE = dict(LLAMA, num_local_experts=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
MAMBA = dict(SIZES, state_size=8)
LONG_ROPE = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 8, long_factor=[3.0] * 8, factor=4.0)

FAMILIES = {
    "Llama": ("Llama", LLAMA),
    "Llama with dynamic rotary tables": (
        "Llama",
        dict(LLAMA, max_position_embeddings=32, rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=4.0)),
    ),
    "Qwen2": ("Qwen2", LLAMA),
    "Qwen3": ("Qwen3", WITH_HEAD_SIZE),
    "Mistral, window 16": ("Mistral", dict(LLAMA, sliding_window=16)),
    "Phi3, long rotary tables from 32 on": (
        "Phi3",
        dict(LLAMA, original_max_position_embeddings=32, rope_parameters=dict(LONG_ROPE, original_max_position_embeddings=32)),
    ),
    "Gemma": ("Gemma", WITH_HEAD_SIZE),
    "Gemma2, logits capped at 2, window 16": ("Gemma2", dict(WITH_HEAD_SIZE, final_logit_softcapping=2.0, sliding_window=16)),
    "Gemma3, logits capped, window 16": ("Gemma3Text", dict(WITH_HEAD_SIZE, final_logit_softcapping=2.0, sliding_window=16)),
    "VaultGemma, logits capped at 2": ("VaultGemma", dict(WITH_HEAD_SIZE, final_logit_softcapping=2.0)),
    "NanoChat, logits capped": ("NanoChat", dict(WITH_HEAD_SIZE, final_logit_softcapping=2.0)),
    "Cohere": ("Cohere", dict(LLAMA, logit_scale=0.25)),
    "Cohere2, window 16": ("Cohere2", dict(WITH_HEAD_SIZE, logit_scale=0.25, sliding_window=16)),
    "Granite": ("Granite", dict(LLAMA, logits_scaling=8.0)),
    "GraniteMoe": ("GraniteMoe", dict(MOE, logits_scaling=8.0)),
    "GraniteMoeShared": ("GraniteMoeShared", dict(MOE, logits_scaling=8.0, shared_intermediate_size=32)),
    "FalconH1": (
        "FalconH1",
        dict(LLAMA, lm_head_multiplier=0.3, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8)
        | dict(mamba_n_groups=1),
    ),
    "Llama4, chunks of 16": ("Llama4Text", dict(MOE, head_dim=16, intermediate_size_mlp=64, attention_chunk_size=16)),
    "Mixtral": ("Mixtral", dict(MOE, sliding_window=16)),
    "ModernBertDecoder, a layer in its head": ("ModernBertDecoder", dict(HEADS, local_attention=32)),
    "Bert as decoder, a layer in its head": ("Bert", dict(HEADS, is_decoder=True)),
    "Roberta as decoder, positions from two on": ("Roberta", dict(HEADS, is_decoder=True)),
    "GPT2": ("GPT2", dict(COMMON, n_embd=32, n_layer=2, n_head=2, n_positions=512)),
    "GPTNeoX": ("GPTNeoX", HEADS),
    "OPT": ("OPT", dict(HEADS, ffn_dim=64, word_embed_proj_dim=16)),
    "Bloom, biased by distance": ("Bloom", dict(COMMON, hidden_size=32, n_layer=2, n_head=2)),
    "Mpt, biased by distance": ("Mpt", dict(COMMON, d_model=32, n_layers=2, n_heads=2)),
    "Falcon": ("Falcon", HEADS),
    "Mamba": ("Mamba", MAMBA),
    "Mamba2": ("Mamba2", dict(MAMBA, num_heads=4, head_dim=16, n_groups=1)),
    "Rwkv": ("Rwkv", dict(SIZES, attention_hidden_size=32, intermediate_size=64, context_length=512)),
    "RecurrentGemma, window 16": (
        "RecurrentGemma",
        dict(WITH_HEAD_SIZE, lru_width=32, attention_window_size=16, num_hidden_layers=3),
    ),
    "Qwen3Next": (
        "Qwen3Next",
        dict(MOE, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16)
        | dict(linear_value_head_dim=16, shared_expert_intermediate_size=32)
        | dict(layer_types=["linear_attention", "full_attention"]),
    ),
    "Lfm2, convolutions": ("Lfm2", dict(LLAMA, layer_types=["conv", "full_attention"])),
}  # fmt: skip
MODEL_CLASSES = {
    "Gemma3Text": "Gemma3ForCausalLM",
    "Llama4Text": "Llama4ForCausalLM",
    "GPT2": "GPT2LMHeadModel",
    "Bert": "BertLMHeadModel",
}


def make_language_model(family: str, scale: float = 6.0) -> transformers.PreTrainedModel:
    """In evaluation mode; matrices are `scale` times their initial size, so that tokens and caps show in the logits."""
    kind, settings = FAMILIES[family]
    if not hasattr(transformers, f"{kind}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**settings)
    model = getattr(transformers, MODEL_CLASSES.get(kind, f"{kind}ForCausalLM"))(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return model
