"""Which peers of rope_attention are measured beside a case."""

import pytest

from benchmarks.attention_cases import case, inputs_of
from benchmarks.attention_peers import peers_of


def names(lengths, training=True):
    images = case("images", lengths, heads=1, head_dim=16)
    return set(peers_of(images, inputs_of(images), training=training))


def test_padding_is_for_images_of_several_sizes_and_batches_for_those_of_one():
    assert names([4]) == {"sdpa_loop", "nested_jagged"}
    assert names([4, 4]) == {"sdpa_loop", "nested_jagged", "sdpa_batched"}
    assert names([4, 6]) == {"sdpa_loop", "nested_jagged", "sdpa_padded"}


def test_peers_are_chosen_by_name(monkeypatch):
    monkeypatch.setenv("BENCHMARK_PEERS", "sdpa_loop,sdpa_batched")
    assert names([4, 4]) == {"sdpa_loop", "sdpa_batched"} and names([4, 6]) == {"sdpa_loop"}
    monkeypatch.setenv("BENCHMARK_PEERS", "sdpa_loop,sdpa_batch")
    with pytest.raises(ValueError, match="BENCHMARK_PEERS names sdpa_batch; peers are sdpa_loop, sdpa_batched"):
        names([4, 4])
