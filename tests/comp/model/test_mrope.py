"""Multimodal rotary positions: ids as Qwen2-VL counts them, angles as Qwen2-VL applies them, text unchanged."""

import pytest
import torch
import transformers
from torch import nn

from comp.model.mrope import MultimodalRotary, install_mrope, mrope_position_ids, mrope_sections

IMAGE = 5


def test_hand_made_positions():
    ids = torch.tensor([[1, 2, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, 3, IMAGE, 4, 0]])
    positions = mrope_position_ids(ids, [[(1, 2, 3), (1, 1, 1)]], IMAGE)
    time = [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 7, 8]
    rows = [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 7, 8]
    columns = [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8]
    assert positions[:, 0].tolist() == [time, rows, columns]


def test_text_counts_up():
    assert torch.equal(mrope_position_ids(torch.full((2, 4), 7), [[], []], IMAGE), torch.arange(4).expand(3, 2, 4))


def test_positions_agree_with_qwen2_vl():
    text = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    text.update(vocab_size=20, rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3]))
    vision = dict(depth=1, embed_dim=16, num_heads=2, hidden_size=32, mlp_ratio=1, patch_size=4)
    config = transformers.Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        vision_start_token_id=3,
        vision_end_token_id=4,
        video_token_id=6,
    )
    model = transformers.Qwen2VLModel(config)
    rows = [[1, 3, *[IMAGE] * 6, 4, 2, 2], [3, *[IMAGE] * 2, 4, 7, 3, *[IMAGE] * 4, 4]]
    ids = torch.tensor(rows)
    theirs, _ = model.get_rope_index(
        ids,
        mm_token_type_ids=(ids == IMAGE).int(),
        image_grid_thw=torch.tensor([[1, 4, 6], [1, 2, 4], [1, 4, 4]]),
        attention_mask=torch.ones_like(ids),
    )
    assert torch.equal(mrope_position_ids(ids, [[(1, 2, 3)], [(1, 1, 2), (1, 2, 2)]], IMAGE), theirs)


@pytest.mark.parametrize("head_dim, sections", [(128, [16, 24, 24]), (64, [8, 12, 12]), (16, [2, 3, 3]), (80, [10, 15, 15])])
def test_sections(head_dim, sections):
    assert mrope_sections(head_dim) == sections


def test_each_channel_pair_turns_with_its_axis(language_model):
    decoder = language_model.base_model
    original = decoder.rotary_emb
    rotary = install_mrope(decoder)
    assert install_mrope(decoder) is rotary and decoder.rotary_emb is rotary
    positions = torch.tensor([[[3]], [[11]], [[29]]])
    rotary.position_ids = positions
    cos, _ = rotary(torch.zeros(1, 1, 16), torch.zeros(1, 1, dtype=torch.long))
    pairs = 8
    for pair in range(pairs):
        axis = [0, 0, 1, 1, 1, 2, 2, 2][pair]
        expected = original(torch.zeros(1, 1, 16), positions[axis])[0][0, 0, pair]
        assert cos[0, 0, pair] == expected and cos[0, 0, pair + pairs] == expected


def test_equal_positions_are_the_plain_embedding_bit_for_bit(language_model):
    decoder = language_model.base_model
    ids = torch.randint(0, 60, (2, 9))
    plain = decoder(input_ids=ids).last_hidden_state
    rotary = install_mrope(decoder)
    assert torch.equal(decoder(input_ids=ids).last_hidden_state, plain)
    rotary.position_ids = torch.arange(9).expand(3, 2, 9)
    assert torch.equal(decoder(input_ids=ids).last_hidden_state, plain)


def test_same_as_qwen2_vl_given_its_weights(language_model):
    """A text-only Qwen2 with our positions computes what Qwen2-VL's decoder computes."""
    config = language_model.config
    peer_config = transformers.Qwen2VLTextConfig(
        **{key: getattr(config, key) for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")},
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={**config.rope_parameters, "mrope_section": [2, 3, 3]},
    )
    peer = transformers.models.qwen2_vl.modeling_qwen2_vl.Qwen2VLTextModel(peer_config).eval()
    peer.load_state_dict(language_model.base_model.state_dict())
    positions = torch.randint(0, 20, (3, 2, 9))
    embeds = torch.randn(2, 9, 64)
    rotary = install_mrope(language_model.base_model)
    rotary.position_ids = positions
    with torch.no_grad():
        ours = language_model.base_model(inputs_embeds=embeds).last_hidden_state
        theirs = peer(inputs_embeds=embeds, position_ids=positions).last_hidden_state
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Mistral"])
def test_other_families(family):
    config = getattr(transformers, f"{family}Config")(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=20,
        head_dim=16,
    )
    decoder = getattr(transformers, f"{family}ForCausalLM")(config).base_model
    assert isinstance(install_mrope(decoder), MultimodalRotary)


def test_decoders_without_such_an_embedding_are_refused():
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20))
    with pytest.raises(ValueError, match=r'GPT2Model has no rotary_emb.*position_ids="1d"'):
        install_mrope(gpt2.base_model)

    class Interleaved(nn.Module):
        def forward(self, x, position_ids):
            return torch.randn(1, 1, 8), torch.randn(1, 1, 8)

    decoder = nn.Linear(1, 1)
    decoder.rotary_emb = Interleaved()
    with pytest.raises(ValueError, match="two equal halves"):
        install_mrope(decoder)


def test_scattered_placeholders_are_refused():
    ids = torch.tensor([[IMAGE, 1, IMAGE]])
    with pytest.raises(ValueError, match=r"2 placeholders of image \(1, 1, 2\) must follow each other, got \[0, 2\]"):
        mrope_position_ids(ids, [[(1, 1, 2)]], IMAGE)
