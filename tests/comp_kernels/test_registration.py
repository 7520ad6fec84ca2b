"""rope_attention as a torch operator: opcheck, torch.compile, autocast, FLOP counts, double backward. All operators: the way
past torch's dispatcher."""

import functools
import importlib
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import comp_kernels as ck
from comp_kernels import _native, info
from comp_kernels._sources import fingerprint
from comp_kernels.ops.rope_attention.registration import BACKWARD, FORWARD
from comp_kernels.testing import AttentionCase, attention_with_gradients, make_attention_inputs


def operator_arguments(inputs):
    tables = (inputs.cos, inputs.sin, inputs.kwargs.get("cos_k", inputs.cos), inputs.kwargs.get("sin_k", inputs.sin))
    bounds = (inputs.cu_seqlens, inputs.kwargs.get("cu_seqlens_k", inputs.cu_seqlens))
    settings = (inputs.kwargs.get("rotary_dim", 16), inputs.kwargs.get("pair_stride", 8), 0.25, "cpu", False)
    return (inputs.q, inputs.k, inputs.v, *tables, *bounds, *settings)


@pytest.mark.parametrize(
    "case",
    (
        AttentionCase("packed", [3, 5]),
        AttentionCase("cross", [3, 5], lengths_k=[2, 7], heads=4, kv_heads=2),
        AttentionCase("plain", [3, 5], layout=None),
    ),
    ids=lambda case: case.name,
)
def test_opcheck(case):
    inputs = make_attention_inputs(case)
    arguments = operator_arguments(inputs)
    out, lse = FORWARD(*arguments)
    for table_grads in (False, True):
        torch.library.opcheck(
            BACKWARD, (inputs.grad_out, inputs.grad_lse.double(), *arguments[:3], out, lse, *arguments[3:], table_grads)
        )
    for x in inputs.leaves().values():
        x.requires_grad_()
    torch.library.opcheck(FORWARD, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compiled_without_recompiling_for_new_lengths(backend):
    """One graph, forward and backward, for any number of tokens and sequences."""
    counter = CompileCounterWithBackend(backend)

    def step(q, k, v, cos, sin, cu_seqlens):
        return ck.rope_attention(q * 2, k, v, cos, sin, cu_seqlens).square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    lengths_of_batches = [[300], [150, 0, 99, 70], [333, 5]]
    if backend == "aot_eager":  # inductor chooses another reduction for the tiny sum of such a batch
        lengths_of_batches += [[10, 0, 3], [5]]
    for lengths in lengths_of_batches:
        inputs = make_attention_inputs(AttentionCase("any", lengths, heads=3))
        leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        arguments = (*leaves, inputs.cos, inputs.sin, inputs.cu_seqlens)
        expected = torch.autograd.grad(step(*arguments), leaves)
        for actual, gradient in zip(torch.autograd.grad(compiled(*arguments), leaves), expected):
            torch.testing.assert_close(actual, gradient)
    assert counter.frame_count == 1


def test_compiled_with_a_symbolic_head_size_beside_a_table_of_a_constant_width():
    torch._dynamo.reset()

    def step(q, positions):
        cos, sin = ck.rope_tables(positions, ck.axial_freqs(16))
        return ck.rope_attention(q, q, q, cos, sin)

    arguments = torch.randn(5, 2, 16), torch.randn(5, 2)
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="eager")
    torch.testing.assert_close(compiled(*arguments), step(*arguments))


def test_autocast_casts_q_k_v_and_never_the_tables():
    inputs = make_attention_inputs(AttentionCase("far", [70], head_dim=32))
    positions = torch.stack((torch.arange(70) + 60000, torch.arange(70)), dim=1)  # angles that bfloat16 cannot hold
    cos, sin = ck.rope_tables(positions, ck.axial_freqs(32))
    q, k, v = inputs.q, inputs.k, inputs.v
    expected = ck.rope_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), cos, sin)
    with torch.autocast("cpu", torch.bfloat16):
        # q from a norm in float32, k and v from a projection in bfloat16
        actual = ck.rope_attention(q.requires_grad_(), k.bfloat16(), v.bfloat16(), cos, sin)
        again = ck.rope_tables(positions, ck.axial_freqs(32))
    actual.float().sum().backward()
    assert actual.dtype == torch.bfloat16 and torch.equal(actual, expected)
    assert torch.equal(again[0], cos) and q.grad.dtype == torch.float32


def sinkhorn_with_gradient(**settings) -> dict[str, torch.Tensor]:
    scores = torch.randn(5, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    plan, u, v = ck.sinkhorn(scores, epsilon=0.5, return_potentials=True, **settings)
    return dict(plan=plan, gradient=torch.autograd.grad(plan.square().sum() + u.sum() + v.sum(), scores)[0])


def alignment_loss_with_gradients() -> dict[str, torch.Tensor]:
    features = torch.randn(2 * 6 + 40, 8, generator=torch.Generator().manual_seed(0))
    vision, text, prototypes = (x.requires_grad_() for x in features.split((6, 6, 40)))
    loss = ck.alignment_loss(vision, text, prototypes, prototype_gradient=True)
    gradients = torch.autograd.grad(2 * loss, (vision, prototypes))
    return dict(loss=loss, vision=gradients[0], prototypes=gradients[1])


def rope_attention_with_gradients() -> dict[str, torch.Tensor]:
    inputs = make_attention_inputs(AttentionCase("packed", [30, 41]))
    return attention_with_gradients(inputs, lambda *args, **kwargs: ck.rope_attention(*args, return_lse=True, **kwargs))


@pytest.mark.parametrize(
    "run, operators",
    (
        (rope_attention_with_gradients, ("rope_attention_forward", "rope_attention_backward")),
        (functools.partial(sinkhorn_with_gradient, gradient="unrolled"), ("sinkhorn", "sinkhorn_backward")),
        (functools.partial(sinkhorn_with_gradient, gradient="implicit"), ("sinkhorn", "sinkhorn_backward")),
        (alignment_loss_with_gradients, ("alignment_loss", "alignment_loss_backward")),
    ),
    ids=("rope_attention", "sinkhorn, unrolled", "sinkhorn, implicit", "alignment_loss"),
)
def test_direct_calls_equal_those_that_something_watches(run, operators, monkeypatch):
    """An eager call goes past the dispatcher, unless a mode or the profiler is there to see the operator: same bits."""

    class Record(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen.add(str(function))
            return function(*args, **(kwargs or {}))

    with Record() as mode:
        dispatched = run()
    assert {f"comp_kernels.{name}.default" for name in operators} <= mode.seen
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run()
    assert {f"comp_kernels::{name}" for name in operators} <= {event.name for event in profiler.events()}
    for operator in ("rope_attention", "sinkhorn", "alignment_loss"):
        registration = importlib.import_module(f"comp_kernels.ops.{operator}.registration")
        for name in ("FORWARD", "BACKWARD"):
            monkeypatch.setattr(registration, name, None)  # nobody calls it now
    direct = run()
    assert all(torch.equal(direct[name], dispatched[name]) for name in dispatched)


def test_saved_tensors_may_come_back_as_copies():
    """Whose strides are others: what a call like one before knows must not be trusted then."""
    qkv, bounds = torch.randn(20, 3, 2, 16, requires_grad=True), torch.tensor([0, 8, 20], dtype=torch.int32)

    def gradient():
        out = ck.rope_attention(*qkv.unbind(1), cu_seqlens=bounds)
        return torch.autograd.grad(out.square().sum(), qkv)[0]

    expected = gradient()
    for _ in range(2):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x.contiguous(), lambda x: x):
            assert torch.equal(gradient(), expected)


@pytest.mark.parametrize("backend", ck.available_backends("rope_attention", "cpu"))
def test_the_default_device_is_not_where_tensors_are_made(backend):
    """Bounds on another device would be read at an address that is none here."""
    q, k, v = torch.randn(3, 6, 2, 16).requires_grad_().unbind()
    expected = ck.rope_attention(q, k, v, backend=backend)
    (gradient,) = torch.autograd.grad(expected.square().sum(), q)
    with torch.device("meta"):
        out = ck.rope_attention(q, k, v, backend=backend)
        assert torch.equal(out, expected) and torch.equal(torch.autograd.grad(out.square().sum(), q)[0], gradient)


def test_batched_gradients():
    q, k, v = torch.randn(3, 6, 2, 16)
    q.requires_grad_()
    out = ck.rope_attention(q, k, v)
    grads = torch.randn(3, *out.shape)
    (batched,) = torch.autograd.grad(out, q, grads, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(out, q, grad, retain_graph=True)[0] for grad in grads]
    assert torch.equal(batched, torch.stack(one_by_one))


def test_views_that_negate_lazily():
    q, k, v, grad = torch.randn(4, 6, 2, 16)
    lazy = torch._neg_view(k)
    assert lazy.is_neg()
    assert torch.equal(ck.rope_attention(q, lazy, v), ck.rope_attention(q, -k, v))
    out = ck.rope_attention(q.requires_grad_(), k, v)
    (of_lazy,) = torch.autograd.grad(out, q, torch._neg_view(grad), retain_graph=True)
    assert torch.equal(of_lazy, torch.autograd.grad(out, q, -grad)[0])


def test_traced_calls_compute_again():
    """torch.jit.trace must record the operator, not the numbers it saw."""
    q, other = torch.randn(2, 6, 2, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; shapes become constants
        traced = torch.jit.trace(lambda q: ck.rope_attention(q, q, q), q)
    torch.testing.assert_close(traced(other), ck.rope_attention(other, other, other))


def test_flops():
    inputs = make_attention_inputs(AttentionCase("packed", [30, 41], lengths_k=[7, 20], heads=4, kv_heads=2))
    q = inputs.q.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        ck.rope_attention(q, inputs.k, inputs.v, inputs.cos, inputs.sin, inputs.cu_seqlens, **inputs.kwargs).sum().backward()
    assert counter.get_total_flops() == 3.5 * 4 * 4 * 16 * (30 * 7 + 41 * 20)


def test_double_backward_is_refused():
    q = torch.randn(5, 1, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(ck.rope_attention(q, q, q).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="use backend='reference'"):
        gradient.sum().backward()


def test_only_wanted_table_gradients():
    inputs = make_attention_inputs(AttentionCase("packed", [9, 5]))
    inputs.sin.requires_grad_()
    inputs.v.requires_grad_()
    ck.rope_attention(inputs.q, inputs.k, inputs.v, inputs.cos, inputs.sin, inputs.cu_seqlens).square().sum().backward()
    assert inputs.cos.grad is None and inputs.q.grad is None
    assert inputs.sin.grad.abs().sum() > 0 and inputs.v.grad.abs().sum() > 0


def test_info_names_the_backend():
    result = subprocess.run([sys.executable, "-m", "comp_kernels.info"], capture_output=True, text=True, check=True)
    assert "rope_attention: cpu" in result.stdout and "instruction set" in result.stdout


@pytest.mark.parametrize("arguments, status", [(["--help"], 0), (["cpu"], 2), (["--json"], 2)])
def test_info_takes_no_arguments(arguments, status, capsys):
    with pytest.raises(SystemExit) as end:
        info.main(arguments)
    output = capsys.readouterr()
    assert end.value.code == status and "usage: python -m comp_kernels.info" in output.out + output.err
    assert "rope_attention: " not in output.out


@pytest.mark.parametrize(
    ("choice", "line"),
    [
        ("reference", "rope_attention: reference (also cpu"),
        ("junk", "rope_attention: COMP_KERNELS_BACKEND must be one of"),
        ("cuda", "rope_attention: COMP_KERNELS_BACKEND='cuda' cannot run rope_attention on cpu"),
    ],
)
def test_info_follows_the_environment(choice, line, monkeypatch):
    monkeypatch.setenv("COMP_KERNELS_BACKEND", choice)
    assert line in "\n".join(info.describe_operator("rope_attention", torch.device("cpu")))


def test_a_missing_library_is_explained(tmp_path):
    """Without the compiled library: one warning that says what to do, and the reference backend."""
    program = (
        "import pathlib, sys, warnings, torch\n"
        "from comp_kernels import _native\n"
        "_native.LIB = pathlib.Path(sys.argv[1])\n"
        "(_native.LIB / 'cpu.missing').write_text('no C++ compiler found')\n"
        "import comp_kernels as ck\n"
        "q = torch.randn(4, 2, 16)\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    ck.rope_attention(q, q, q); ck.rope_attention(q, q, q)\n"
        "assert len(caught) == 1 and 'no C++ compiler found' in str(caught[0].message), caught\n"
        "assert 'cpu' not in ck.available_backends('rope_attention')\n"
        "try: ck.rope_attention(q, q, q, backend='cpu')\n"
        "except RuntimeError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "no C++ compiler found" in result.stdout and "build_native" in result.stdout


def test_a_library_of_other_sources_is_not_called(tmp_path):
    """After csrc has changed the old library is refused: its structs may no longer be the ones Python fills."""
    shutil.copy(_native.LIB / "libcomp_kernels_cpu.so", tmp_path)
    (tmp_path / "cpu.sources").write_text("0123")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_native, "LIB", tmp_path)
        with pytest.raises(_native.Unavailable, match=r"other sources.*build_native"):
            _native.load("cpu")
        (tmp_path / "cpu.sources").write_text(fingerprint("cpu"))
        _native.load("cpu")


def test_import_is_light():
    """The compiler and the integrated libraries are imported when they are used, not by `import comp_kernels`."""
    program = (
        "import sys, comp_kernels; print([m for m in ('torch._dynamo', 'transformers', 'timm', 'comp') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
