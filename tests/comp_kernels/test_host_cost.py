"""benchmarks/host_cost.py: every operator is measured, nothing runs meanwhile, everything runs again afterwards."""

import torch

import comp_kernels as ck
from benchmarks import host_cost


def test_every_operator_is_measured(monkeypatch):
    monkeypatch.setattr(host_cost, "CALLS", 1)
    found = host_cost.measure(rounds=1)
    assert {op for op, _, _ in found} == {"rope_attention", "sinkhorn", "alignment_loss"}
    assert {backend for _, backend, _ in found} >= {"cpu", "triton"}
    assert ("cuda" in {backend for _, backend, _ in found}) == host_cost.cuda_is_built()
    assert all(us > 0 for us in found.values())


def test_nothing_runs_meanwhile():
    q = torch.randn(4, 2, 16)
    expected = ck.rope_attention(q, q, q, backend="cpu")
    with host_cost.nothing_runs():
        for backend in ("cpu", "triton"):  # memory that nobody wrote is NaN here
            assert ck.rope_attention(q, q, q, backend=backend).isnan().all()
    assert torch.equal(ck.rope_attention(q, q, q, backend="cpu"), expected)
    assert "cuda" not in ck.available_backends("rope_attention", "cpu")
