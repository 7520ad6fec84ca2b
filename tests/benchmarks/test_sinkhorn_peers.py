"""The peers of the sinkhorn benchmark do the work they are timed for, and one that did not would not be timed."""

import dataclasses

import pytest
import torch

from benchmarks.sinkhorn_peers import peers_of
from comp_kernels import reference

EPSILON, NUM_ITERS = 0.05, 3


@pytest.fixture(params=[(6, 9), (2, 5, 9)], ids=str)
def scores(request):
    return torch.rand(request.param) * 2 - 1


def test_every_peer_computes_what_it_says(scores):
    peers = peers_of(scores, EPSILON, NUM_ITERS)
    assert {"dinov2", "swav", "compiled log"} <= set(peers)
    for name, peer in peers.items():
        assert peer.check() < 1e-5, name


def test_pot_ends_on_the_rows_in_both_versions(scores):
    pytest.importorskip("ot")
    plan = peers_of(scores, EPSILON, NUM_ITERS)["POT"].call()
    torch.testing.assert_close(plan.sum(-1), torch.ones(scores.shape[:-1]))


@pytest.mark.parametrize("wrong", ["columns last", "one iteration more", "no mass", "nan"])
def test_another_plan_is_not_timed(scores, wrong):
    peer = peers_of(scores, EPSILON, NUM_ITERS)["swav"]
    rows, cols = scores.shape[-2:]
    turned = dict(row_marginals=torch.full((cols,), rows / cols), col_marginals=torch.ones(rows))
    plans = {
        "columns last": lambda: reference.sinkhorn(scores.mT, epsilon=EPSILON, num_iters=NUM_ITERS, **turned).mT,
        "one iteration more": lambda: reference.sinkhorn(scores, epsilon=EPSILON, num_iters=NUM_ITERS + 1),
        "no mass": lambda: torch.zeros_like(scores),
        "nan": lambda: torch.full_like(scores, torch.nan),
    }
    with pytest.raises(ValueError, match="away from: the same plan"):
        dataclasses.replace(peer, call=plans[wrong]).check()
