"""benchmarks/gpu_report.py, as far as it goes without a GPU: one workload through the whole path with a false clock."""

import torch

import comp_kernels as ck
from benchmarks import gpu_report


def test_a_report_without_a_gpu(tmp_path, monkeypatch):
    def attend(x):
        return ck.rope_attention(x.q, x.k, x.v, x.cos, x.sin, x.cu_seqlens, backend="reference")

    def broken(x):
        raise RuntimeError("cannot serve this")

    def clock(function):
        function()
        return 2.0

    monkeypatch.setattr(gpu_report, "peak_memory", lambda function: (function(), 5.0)[1])
    workload = gpu_report.Workload("small", (5, 0, 9), 2, 16)
    monkeypatch.setattr(gpu_report, "WORKLOADS", (workload,))
    results, failures = gpu_report.measure(workload, {"reference": attend, "broken": broken}, clock, "cpu")
    assert len(results) == 1 and results[0].forward == results[0].both == 2.0
    assert results[0].error < 0.1  # bfloat16 against float32
    text = gpu_report.to_markdown(results, failures, "no machine")
    assert "| small | reference | 2.000 |" in text and "broken: RuntimeError: cannot serve this" in text
    gpu_report.plot(results, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 0


def test_rotation_of_the_peers_is_ours():
    """The peers are given the same tables: their rotation followed by attention is our definition."""
    x = gpu_report.make_inputs(gpu_report.Workload("small", (5, 9), 2, 16), "cpu", torch.float32)
    q, k = (gpu_report.rotate_half(t, x.cos, x.sin) for t in (x.q, x.k))
    separate = ck.reference.rope_attention(q, k, x.v, cu_seqlens=x.cu_seqlens)
    torch.testing.assert_close(separate, ck.reference.rope_attention(x.q, x.k, x.v, x.cos, x.sin, x.cu_seqlens))
