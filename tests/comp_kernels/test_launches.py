"""comp_kernels/_triton.py: a launch like an earlier one goes by Triton's launcher past its search for the compiled kernel."""

from unittest.mock import patch

import pytest
import torch
from emulation import run_compiled

import comp_kernels as ck
from comp_kernels import _triton

pytestmark = pytest.mark.compiles


def recorded(call) -> list[tuple]:
    """(kernel, grid, arguments, constexprs, (device, warps, stages)) of the launches that `call` makes."""
    found = []

    def launcher(kernel, grid, *args, num_warps, num_stages, **constexprs):
        found.append((kernel, grid, args, constexprs, (0, num_warps, num_stages)))

    with _triton.launches_go_to(launcher, "sm_90"):
        call()
    return found


def forward_and_backward():
    q, k, v = torch.randn(3, 40, 2, 64, dtype=torch.bfloat16).requires_grad_()
    tables, bounds = torch.randn(2, 40, 32), torch.tensor([0, 17, 40], dtype=torch.int32)
    ck.rope_attention(q, k, v, *tables, bounds, backend="triton").sum().backward()


def launched(launches: list[tuple], times: int) -> tuple[list[tuple], int]:
    """What reaches the driver when each is launched `times` times, one after the other, and how often Triton was asked for a
    kernel."""
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction

    from comp_kernels._triton_compile import _compiling_for

    reached, asked = [], []

    def load(self):
        self.module, self.function, self._run = 1, self.hash, lambda *args: reached.append(args)

    def run(self, *args, **kwargs):
        asked.append(self)
        return find(self, *args, **kwargs)

    find = JITFunction.run
    with (
        patch.object(CompiledKernel, "_init_handles", load),
        patch.object(JITFunction, "run", run),
        patch.object(_triton, "_known", {}),
        _compiling_for("sm_90", object()),
    ):
        for kernel, grid, args, constexprs, where in launches:
            for _ in range(times):
                _triton.launch_known(where, kernel, grid, args, constexprs)
    return reached, len(asked)


def same(x, y) -> bool:
    return x is y if isinstance(x, torch.Tensor) else type(x).__name__ == "LazyDict" or x == y


def every_launch_twice() -> list[tuple]:
    launches = recorded(lambda: ck.sinkhorn(torch.randn(40, 48), epsilon=0.1, backend="triton")) + recorded(
        forward_and_backward
    )
    reached, asked = launched(launches, times=2)
    assert len(reached) == 2 * len(launches) and asked < len(launches)  # iterations 1 and 2 differ in one number
    pairs = zip(launches, reached[::2], reached[1::2], strict=True)
    return [(x[0].fn.__name__, len(y) == len(z) and all(map(same, y, z))) for x, y, z in pairs]


def test_the_second_launch_is_the_first():
    found = run_compiled(every_launch_twice)
    assert {"column_step_kernel", "attention_forward_kernel", "key_value_gradient_kernel"} <= {name for name, _ in found}
    assert all(equal for _, equal in found), found


def what_triton_looks_at() -> dict[str, bool]:
    """Whether the launch with one argument changed takes another compiled kernel."""
    ((kernel, grid, args, constexprs, where), *_) = recorded(forward_and_backward)
    q, scale = args[0], next(i for i, x in enumerate(args) if type(x) is float)
    shifted = torch.empty(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape)
    changed = {
        "address": (shifted, *args[1:]),
        "dtype": (*args[:10], args[10].float(), *args[11:]),  # lse
        "float": (*args[:scale], 0.5, *args[scale + 1 :]),
        "another tensor": (q.clone(), *args[1:]),
    }
    found = {}
    for name, others in changed.items():
        reached, asked = launched([(kernel, grid, x, constexprs, where) for x in (args, others)], times=1)
        assert all(map(same, others, reached[1][9:])), name
        found[name] = asked == 2
    return found


def test_another_kernel_where_triton_would_compile_one():
    assert run_compiled(what_triton_looks_at) == {"address": True, "dtype": True, "float": False, "another tensor": False}
