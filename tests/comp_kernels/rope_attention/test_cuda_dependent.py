"""sm_90a kernels launched before the one that prepares for them has ended, off by default.

The emulator runs one after the other, and refuses a read of what the one before wrote, and any write, by a thread that has not
executed griddepcontrol.wait.
"""

import dataclasses

import cuda_emulation
import pytest
import torch
from cuda_emulation import DEPENDENT, PLAIN, Recording, launches_on_emulator, needs_cuda_emulation

from comp_kernels import rope_attention
from comp_kernels.testing import AttentionCase, make_attention_inputs

pytestmark = [pytest.mark.emulated, needs_cuda_emulation]

LENGTHS = [200, 0, 1, 60] + [3] * 40 + [130, 0]  # so many that a warp looks twice for its sequence
FORWARD = AttentionCase("forward", LENGTHS, head_dim=64, heads=2, kv_heads=1, slack=70)
BACKWARD = AttentionCase("backward", [400, 0, 380], head_dim=64, heads=1, slack=5)
PERSISTENT = AttentionCase("persistent", [300, 1, 0, 70], head_dim=72, heads=1, slack=5)
KINDS = {
    "forward": (FORWARD, {}),
    "in_place": (FORWARD, dict(values_in_place=True)),
    "persistent": (PERSISTENT, dict(persistent=2)),
    "persistent_in_place": (PERSISTENT, dict(persistent=2, values_in_place=True)),
    "backward": (BACKWARD, {}),
    "backward_72": (dataclasses.replace(BACKWARD, head_dim=72, lengths=[270]), {}),  # rows kept in registers
}


def run(kind: str, dependent: bool = True, reports: list | None = None, recording: Recording | None = None, **options):
    """out, and dq, dk, dv where the kind is backward."""
    case, switches = KINDS[kind]
    inputs = make_attention_inputs(case, torch.bfloat16)
    leaves = [x.requires_grad_(kind.startswith("backward")) for x in (inputs.q, inputs.k, inputs.v)]
    options |= dict(capability=90, dependent=dependent, recording=recording)
    with launches_on_emulator(reports, **switches, **options):
        out = rope_attention(*leaves, inputs.cos, inputs.sin, inputs.cu_seqlens, backend="cuda", **inputs.kwargs)
        return [out, *torch.autograd.grad(out, leaves, inputs.grad_out)] if out.requires_grad else [out]


@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_and_nothing_read_too_early(kind):
    reports, recordings = [], [Recording(), Recording()]
    found = run(kind, reports=reports, recording=recordings[0], check_proxy=True, check_wgmma_regs=True)
    for ours, expected in zip(found, run(kind, dependent=False, recording=recordings[1])):
        assert torch.equal(ours, expected)
    kinds = [[launch.kind for launch in recording.launches] for recording in recordings]
    assert kinds[0] == [PLAIN, DEPENDENT] + [PLAIN, DEPENDENT, DEPENDENT] * kind.startswith("backward")
    assert kinds[1] == [PLAIN] * len(kinds[0])
    opcodes = [report["by_opcode"] for _, report in reports]
    followed = [kind == DEPENDENT for kind in kinds[0][1:]] + [False]  # the one after it may start early
    assert [opcode.get("griddepcontrol.launch_dependents", 0) > 0 for opcode in opcodes] == followed


# (kind, kernel, how many waits its PTX has)
WAITS = [
    ("forward", "forward_sm90", 3),
    ("persistent", "persistent_sm90", 1),
    ("backward", "backward_sm90_keys", 1),
    ("backward", "backward_sm90_queries", 1),
]


@pytest.mark.parametrize(("kind", "kernel", "number"), [(k, name, i) for k, name, n in WAITS for i in range(n)])
def test_every_wait_is_needed(kind, kernel, number, monkeypatch):
    """Without one of them a thread reads or writes too early, or a block may end before the grid that it depends on."""
    whole = cuda_emulation.module

    def without(source):
        before, entry, rest = whole(source).text.partition(f".entry rope_attention_{kernel}_bf16")
        parts = rest.split("griddepcontrol.wait;")
        if not entry or len(parts) == 1:
            return whole(source)
        parts[number] += parts.pop(number + 1)
        return cuda_emulation.import_emulator().load(before + entry + "griddepcontrol.wait;".join(parts))

    monkeypatch.setattr(cuda_emulation, "module", without)
    with pytest.raises(cuda_emulation.import_emulator().KernelError) as error:
        run(kind, threads=1)
    assert error.value.kind == "dependent-launch" and kernel in error.value.kernel
