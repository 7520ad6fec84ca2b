"""CUDA graphs of rope_attention: launches depend on bounds alone (rows of the tensors, number of sequences), so one capture
serves every cu_seqlens within them. On a device: tests/gpu."""

import pytest
import torch
from cuda_emulation import Recording, launches_on_emulator, needs_cuda_emulation

from comp_kernels import axial_freqs, reference, rope_attention, rope_tables
from comp_kernels.testing import assert_within_budget, plain_rope_attention

HEADS, HEAD_DIM = 2, 64

# (device and switches, dtype, rows, bounds of sequences): the first are captured, the others replayed. Fewer sequences than the
# bound end with empty ones, and rows behind the last belong to none. 600 rows for two sequences take the sm_90a backward.
BOUNDS = [
    (
        dict(capability=80),
        torch.bfloat16,
        200,
        ([0, 60, 130, 130, 190], [0, 1, 2, 3, 4], [0, 0, 0, 200, 200], [0, 50, 100, 150, 200]),
    ),
    (dict(capability=80), torch.float32, 200, ([0, 60, 130, 130, 190], [0, 1, 2, 3, 4], [0, 0, 0, 200, 200])),
    (dict(capability=90), torch.bfloat16, 600, ([0, 300, 600], [0, 0, 600], [0, 1, 130])),
    (dict(capability=90, dependent=True, values_in_place=True), torch.bfloat16, 600, ([0, 300, 600], [0, 1, 130])),
]


class Tower:
    """The tensors of one attention call and its gradients, at addresses that stay."""

    def __init__(self, rows: int, bounds: list[int], dtype: torch.dtype):
        self.q, self.k, self.v, self.grad_out = (torch.zeros(rows, HEADS, HEAD_DIM, dtype=dtype) for _ in range(4))
        self.cos, self.sin = rope_tables(torch.zeros(rows, 2, dtype=torch.int64), axial_freqs(HEAD_DIM))
        self.cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        self.fill(bounds, 0)

    def fill(self, bounds: list[int], seed: int) -> None:
        """Other values in place."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for x in (self.q, self.k, self.v, self.grad_out):
                x.copy_(torch.randn(x.shape, generator=generator))
            positions = torch.randint(0, 30, (self.q.shape[0], 2), generator=generator)
            for table, values in zip((self.cos, self.sin), rope_tables(positions, axial_freqs(HEAD_DIM))):
                table.copy_(values)
            self.cu_seqlens.copy_(torch.tensor(bounds, dtype=torch.int32))

    def run(self, function, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """out and gradients; dtype: of the tensors, theirs by default."""
        q, k, v, grad_out, cos, sin = (
            x.detach() if dtype is None else x.detach().to(dtype)
            for x in (self.q, self.k, self.v, self.grad_out, self.cos, self.sin)
        )
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = function(*leaves, cos, sin, self.cu_seqlens, rotary_dim=HEAD_DIM, pair_stride=HEAD_DIM // 2)
        return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *torch.autograd.grad(out, leaves, grad_out))))

    def check(self, found: dict[str, torch.Tensor]) -> None:
        exact = self.run(reference.rope_attention, torch.float64)
        peer = self.run(lambda *args, **kwargs: plain_rope_attention(*args, **kwargs)[0])
        # Of one key, dP - delta is zero but for the rounding of dP: the largest term of dq and dk is a dP times a key or query.
        # In 16 bits the peers err more than that.
        rounded = float(self.grad_out.norm(dim=-1).max() * self.v.norm(dim=-1).max()) / HEAD_DIM**0.5
        largest = rounded * float(max(self.q.abs().max(), self.k.abs().max())) if self.q.dtype == torch.float32 else 1.0
        for name, value in exact.items():  # one draw (see check_rope_attention)
            term = largest if name in ("dq", "dk") else 1.0
            assert_within_budget(name, found[name], value, peer[name], factor=2.5, largest_term=term)


def by_cuda(*args, **kwargs):
    return rope_attention(*args, **kwargs, backend="cuda")


@pytest.mark.emulated
@needs_cuda_emulation
@pytest.mark.parametrize(
    ("device", "dtype", "rows", "bounds"), BOUNDS, ids=["sm_80", "sm_80_float32", "sm_90a", "sm_90a_dependent_in_place"]
)
def test_one_capture_serves_all_bounds(device, dtype, rows, bounds):
    tower, recording = Tower(rows, bounds[0], dtype), Recording()
    with launches_on_emulator(recording=recording, **device):
        found = tower.run(by_cuda)
    tower.check(found)
    for seed, others in enumerate(bounds[1:], 1):
        tower.fill(others, seed)
        recording.replay()
        tower.check(found)
        again = Recording()
        with launches_on_emulator(recording=again, **device):
            tower.run(by_cuda)
        assert [launch[:4] for launch in again.launches] == [launch[:4] for launch in recording.launches]
