"""What every backend of every operator answers, how a backend is chosen, and what happens when its kernels fail."""

import ast
import importlib
import inspect
import subprocess
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend

import comp_kernels as ck
from comp_kernels import _backends, _native, info
from comp_kernels._triton import launches_go_to
from comp_kernels.ops.alignment_loss.call import Call as AlignmentCall
from comp_kernels.ops.rope_attention import reference_backend
from comp_kernels.ops.rope_attention.call import Call as AttentionCall
from comp_kernels.ops.rope_attention.registration import BACKWARD, FORWARD
from comp_kernels.ops.sinkhorn.call import Call as SinkhornCall
from comp_kernels.testing import AttentionCase, attention_with_gradients, make_attention_inputs

EVERY = [(op, backend) for op, backends in _backends.IMPLEMENTATIONS.items() for backend in backends]
OPERATORS = list(_backends.IMPLEMENTATIONS)


def example(op: str, dtype=torch.float32):
    """A small call of the operator, as its backends get it, and the shapes of its results."""
    if op == "rope_attention":
        q, bounds = torch.randn(6, 2, 16, dtype=dtype), torch.tensor([0, 2, 6], dtype=torch.int32)
        tables = torch.randn(2, 6, 8, dtype=torch.promote_types(dtype, torch.float32))
        return AttentionCall(q, q, q, *tables, *tables, bounds, bounds, 16, 8, 0.25), [(6, 2, 16), (2, 6)]
    if op == "sinkhorn":
        rows, cols = torch.ones(4, dtype=dtype), torch.full((6,), 4 / 6, dtype=dtype)
        return SinkhornCall(torch.randn(1, 4, 6, dtype=dtype), rows, cols, 0.5, 3, None, None), [(1, 4, 6), (1, 4), (1, 6)]
    features = torch.nn.functional.normalize(torch.randn(2, 4, 8, dtype=dtype), dim=-1)
    settings = ("sinkhorn", 0.5, 0.5, 3, 0.05, True, None, True, False)
    return AlignmentCall(*features, torch.randn(30, 8, dtype=dtype), None, None, *settings), [(), (4, 8), (0,)]


# --- the contract ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op, backend", EVERY)
def test_every_backend_answers_the_three_questions(op, backend):
    module = _backends.implementation(op, backend)
    assert module.unavailable_reason(torch.device("cpu")) is None or module.unavailable_reason(torch.device("cpu"))
    assert (module.unavailable_reason(torch.device("mtia")) is None) == (backend == "reference")
    call, shapes = example(op)
    assert module.declines(call) is None or isinstance(module.declines(call), str)
    assert (module.declines(example(op, torch.float64)[0]) is None) == (backend in ("reference", "cpu"))
    if _backends.cannot_serve(op, backend, torch.device("cpu"), call) is None:
        assert [tuple(x.shape) for x in module.forward(call)] == shapes


@pytest.mark.parametrize("op, backend", EVERY)
def test_no_backend_imports_anothers(op, backend):
    """Steps that two of them share have modules of their own."""
    backends = {path.removeprefix(".") for paths in _backends.IMPLEMENTATIONS.values() for path in paths.values()}
    path = _backends.IMPLEMENTATIONS[op][backend].removeprefix(".")
    found = set()
    for node in ast.walk(ast.parse(inspect.getsource(_backends.implementation(op, backend)))):
        if isinstance(node, ast.ImportFrom) and node.level:
            package = path.split(".")[: -node.level]
            module = ".".join(package + (node.module or "").split(".")).rstrip(".")
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    assert not found & (backends - {path})


@pytest.mark.parametrize("op", OPERATORS)
def test_fields_of_a_call_are_the_arguments_of_the_schema(op):
    operator = FORWARD.default if op == "rope_attention" else getattr(torch.ops.comp_kernels, op).default
    names = [argument.name for argument in operator._schema.arguments]
    fields = list(importlib.import_module(f"comp_kernels.ops.{op}.call").Call._fields)
    assert names[: len(fields)] == fields and names[-2:] == ["backend", "fallback"]


@pytest.mark.parametrize("cross", (False, True))
def test_gradients_of_the_reference_behind_the_operator(cross):
    """They are autograd's, also where autograd is off: in an operator's kernel."""
    case = AttentionCase("packed", [3, 0, 5], lengths_k=[2, 1, 7] if cross else None, heads=4, kv_heads=2, slack=2)
    inputs = make_attention_inputs(case, dtype=torch.float64)
    tables = [x.requires_grad_() for x in (inputs.cos, inputs.sin)]
    tables_k = [inputs.kwargs.get(name, x) for name, x in zip(("cos_k", "sin_k"), tables)]
    leaves = [inputs.q.requires_grad_(), inputs.k.requires_grad_(), inputs.v.requires_grad_(), *tables]
    if cross:
        leaves += [x.requires_grad_() for x in tables_k]
    bounds = inputs.cu_seqlens, inputs.kwargs.get("cu_seqlens_k", inputs.cu_seqlens)
    call = AttentionCall(*leaves[:3], *tables, *tables_k, *bounds, 16, 8, 0.25)
    out, lse = reference_backend.forward(call)
    grad_lse = torch.randn_like(lse).masked_fill(lse == -torch.inf, 0.0)
    expected = torch.autograd.grad((out, lse), leaves, (inputs.grad_out, grad_lse))
    call = call._replace(**{name: x.detach() for name, x in zip(call._fields, call[:7])})
    arguments = (inputs.grad_out, grad_lse, *call[:3], out.detach(), lse.detach(), *call[3:], "reference", False)
    found = BACKWARD(*arguments, True)
    for i, gradient in enumerate(expected):
        shared = not cross and i in (3, 4)  # one table for queries and keys: its gradient is the sum of both
        torch.testing.assert_close(found[i] + found[i + 2] if shared else found[i], gradient, rtol=1e-10, atol=1e-12)
    assert [x.numel() for x in BACKWARD(*arguments, False)[3:]] == [0] * 4


# --- the way of a call -----------------------------------------------------------------------------------------------------


def functions_that_q_passes(q, call) -> list[str]:
    """Functions of comp_kernels that are given q, by itself or in a Call, while `call` runs."""
    seen = []

    def holds(x) -> bool:
        return x is q or (isinstance(x, tuple) and any(holds(y) for y in x))

    def watch(frame, event, _):
        code = frame.f_code
        if event == "call" and "comp_kernels" in code.co_filename:
            names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)]
            name = f"{code.co_filename}:{code.co_firstlineno} {code.co_name}"
            if name not in seen and any(holds(frame.f_locals.get(name)) for name in names):
                seen.append(name)

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(before)
    return seen


def test_q_passes_few_functions():
    inputs = make_attention_inputs(AttentionCase("packed", [3, 5]))
    arguments = (inputs.q, inputs.k, inputs.v, inputs.cos, inputs.sin, inputs.cu_seqlens)
    ck.rope_attention(*arguments)
    with torch.no_grad():
        forward = functions_that_q_passes(inputs.q, lambda: ck.rope_attention(*arguments))
    assert 5 < len(forward) <= 11, forward
    inputs.q.requires_grad_()
    ck.rope_attention(*arguments)
    with_gradients = functions_that_q_passes(inputs.q, lambda: ck.rope_attention(*arguments))
    assert len(with_gradients) <= 13, with_gradients


# --- kernels that fail -----------------------------------------------------------------------------------------------------


def failures():
    """What compilers and drivers raise when a kernel cannot be compiled or launched."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return {
        "compiler": CompilationError("x = tl.dot(a)", ast.parse("x").body[0], "cannot be compiled"),
        "ptxas": PTXASError("ptxas fatal: Value 'sm_999' is not defined"),
        "shared memory": OutOfResources(required=2, limit=1, name="shared memory"),
        "no libcuda": AssertionError("libcuda.so cannot found!"),
        "no driver": RuntimeError("0 active drivers ([]). There should only be one."),
        "launch": RuntimeError("Triton Error [CUDA]: invalid device function"),
        "no C compiler": subprocess.CalledProcessError(1, ["gcc", "launcher.c"]),
        "no ptxas": FileNotFoundError("Cannot find ptxas"),
    }


@pytest.mark.parametrize(
    "dtype, head_dim, preference, expected",
    [
        (torch.float16, 128, ("cuda", "triton", "reference"), "cuda"),
        (torch.float16, 136, ("cuda", "triton", "reference"), "triton"),
        (torch.float32, 16, ("cuda", "triton", "reference"), "triton"),
        (torch.float32, 16, ("cuda", "reference"), "cuda"),  # no other compiled one
    ],
)
def test_kernels_that_no_gpu_has_run_come_after_others(dtype, head_dim, preference, expected, monkeypatch):
    monkeypatch.setattr(_backends, "PREFERENCE", {"cpu": preference})
    monkeypatch.setattr(_backends.implementation("rope_attention", "cuda"), "unavailable_reason", lambda device: None)
    q = torch.zeros(6, 2, head_dim, dtype=dtype)
    call = example("rope_attention")[0]._replace(q=q, k=q, v=q)
    cpu = torch.device("cpu")
    assert _backends.choose_backend("rope_attention", None, cpu, call) == (expected, True)
    assert _backends.choose_backend("rope_attention", "cuda", cpu, call) == ("cuda", False)  # by name


def test_a_gpu_is_asked_once(monkeypatch):
    """torch takes microseconds to tell what a GPU is, in every call; what is refused is asked again."""
    asked, capability = [], (7, 5)

    def get_device_capability(device):
        asked.append(device)
        return capability

    monkeypatch.setattr(_native, "_serving", set())
    monkeypatch.setattr(_native, "_cuda", lambda: None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", get_device_capability)
    first, second, current = (torch.device(name) for name in ("cuda:0", "cuda:1", "cuda"))
    assert "8.0 or later is needed" in _native.cuda_unavailable_reason(first)
    capability = (9, 0)
    for device, count in ((first, 1), (second, 1), (current, 2)):
        asked.clear()
        assert _native.cuda_unavailable_reason(device) is _native.cuda_unavailable_reason(device) is None
        assert asked == [device] * count


@pytest.fixture
def failing(monkeypatch):
    """Triton comes first, and every launch of it raises what the function that this gives was called with."""
    monkeypatch.setattr(_backends, "PREFERENCE", {"cpu": ("triton", "cpu", "reference")})
    monkeypatch.setattr(_backends, "_failures", {})
    launched = []

    def launcher(kernel, *args, **kwargs):
        launched.append(kernel)
        raise launcher.error

    def fail_with(error):
        launcher.error = error
        return launched

    with launches_go_to(launcher, "sm_80"):
        yield fail_with


def calls(op: str, backend: str | None):
    """Results and gradients of a small call."""
    torch.manual_seed(1)
    if op == "rope_attention":
        inputs = make_attention_inputs(AttentionCase("packed", [3, 0, 5], slack=2))
        found = attention_with_gradients(inputs, lambda *a, **k: ck.rope_attention(*a, return_lse=True, backend=backend, **k))
        return list(found.values())
    if op == "sinkhorn":
        scores = torch.randn(4, 6, requires_grad=True)
        plan = ck.sinkhorn(scores, epsilon=0.5, gradient="unrolled", backend=backend)
        return [plan, *torch.autograd.grad(plan.square().sum(), scores)]
    vision, text, prototypes = (torch.randn(n, 8) for n in (4, 4, 30))
    loss = ck.alignment_loss(vision.requires_grad_(), text, prototypes, epsilon=0.5, backend=backend)
    return [loss, *torch.autograd.grad(loss, vision)]


@pytest.mark.parametrize("kind", failures())
@pytest.mark.parametrize("op", OPERATORS)
def test_the_next_backend_takes_the_place_of_one_that_fails(op, kind, failing):
    launched = failing(failures()[kind])
    with pytest.warns(RuntimeWarning, match=f"the triton kernels of {op} could not be compiled or launched on cpu") as caught:
        found = calls(op, None)
    assert len(caught) == 1 and "cpu takes their place" in str(caught[0].message) and len(launched) == 1
    assert type(failures()[kind]).__name__ in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once, and not tried again
        again = calls(op, None)
    assert len(launched) == 1
    for actual, repeated, expected in zip(found, again, calls(op, "cpu")):
        assert torch.equal(actual, expected) and torch.equal(repeated, expected)
    lines = info.describe_operator(op, torch.device("cpu"))
    assert lines[0].startswith(f"{op}: cpu") and any("not triton in this process" in line for line in lines)


@pytest.mark.parametrize("kind", ("compiler", "no libcuda", "launch"))
@pytest.mark.parametrize("op", OPERATORS)
def test_a_named_backend_raises(op, kind, failing, monkeypatch):
    error = failures()[kind]
    failing(error)
    with pytest.raises(type(error)):
        calls(op, "triton")
    monkeypatch.setenv("COMP_KERNELS_BACKEND", "triton")
    with pytest.raises(type(error)):
        calls(op, None)
    assert not _backends._failures


@pytest.mark.parametrize(
    "error",
    (
        ValueError("bad input"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        KeyboardInterrupt(),
    ),
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("op", OPERATORS)
def test_what_is_no_failure_of_kernels_is_raised(op, error, failing):
    failing(error)
    with pytest.raises(type(error)):
        calls(op, None)
    assert not _backends._failures


def test_the_reference_comes_last(failing, monkeypatch):
    monkeypatch.setattr(_backends, "PREFERENCE", {"cpu": ("triton", "reference")})
    for op in OPERATORS:
        failing(failures()["launch"])
        with pytest.warns(RuntimeWarning, match="reference takes their place"):
            found = calls(op, None)
        for actual, expected in zip(found, calls(op, "reference")):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_a_backward_that_fails_alone(monkeypatch):
    """The forward pass ran in Triton (its interpreter), the backward pass goes on in another backend with that lse."""
    monkeypatch.setattr(_backends, "_failures", {})
    module = _backends.implementation("rope_attention", "triton")

    def fails(*arguments):
        raise failures()["shared memory"]

    expected = calls("rope_attention", "triton")
    monkeypatch.setattr(module, "backward", fails)
    for following in ("cpu", "reference"):
        monkeypatch.setattr(_backends, "PREFERENCE", {"cpu": ("triton", following)})
        _backends._failures.clear()
        with pytest.warns(RuntimeWarning, match=f"{following} takes their place"):
            found = calls("rope_attention", None)
        for actual, wanted in zip(found, expected):
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fails_in", ("forward", "backward"))
def test_from_cuda_to_triton(fails_in, monkeypatch):
    """lse is float64 in both: what one has left, the other goes on with."""
    monkeypatch.setattr(_backends, "_failures", {})
    monkeypatch.setattr(_backends, "PREFERENCE", {"cpu": ("cuda", "triton")})
    cuda, triton = (_backends.implementation("rope_attention", name) for name in ("cuda", "triton"))
    monkeypatch.setattr(cuda, "unavailable_reason", lambda device: None)

    def fails(*arguments):
        raise RuntimeError("rope_attention_forward_f16_64: no kernel image is available for execution on the device")

    monkeypatch.setattr(cuda, "forward", fails if fails_in == "forward" else triton.forward)
    monkeypatch.setattr(cuda, "backward", fails)
    inputs = make_attention_inputs(AttentionCase("packed", [3, 0, 5]), torch.float16)

    def run(backend):
        return attention_with_gradients(inputs, lambda *a, **k: ck.rope_attention(*a, return_lse=True, backend=backend, **k))

    with pytest.warns(RuntimeWarning, match="the cuda kernels .* triton takes their place"):
        found = run(None)
    for name, expected in run("triton").items():
        torch.testing.assert_close(found[name], expected, rtol=2e-3, atol=2e-3)
    tables = (inputs.cos, inputs.sin) * 2
    call = (inputs.q, inputs.k, inputs.v, *tables, inputs.cu_seqlens, inputs.cu_seqlens, 16, 8, 0.25)
    assert FORWARD(*call, "cuda", True)[1].dtype == torch.float64


def test_in_a_compiled_graph(failing):
    """The choice is made when the graph is traced, the failure is met when it runs: no graph more, no break."""
    failing(failures()["compiler"])
    inputs = make_attention_inputs(AttentionCase("packed", [3, 5]))
    counter = CompileCounterWithBackend("aot_eager")

    def step(q, backend=None):
        return ck.rope_attention(
            q * 2, inputs.k, inputs.v, inputs.cos, inputs.sin, inputs.cu_seqlens, return_lse=True, backend=backend
        )

    q = inputs.q.requires_grad_()
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    with pytest.warns(RuntimeWarning, match="cpu takes their place"):
        out, lse = compiled(q)
    expected_out, expected_lse = step(q, "cpu")
    assert torch.equal(out, expected_out) and torch.equal(lse, expected_lse)
    for _ in range(2):
        found = torch.autograd.grad(compiled(q)[0].square().sum(), q)
        assert torch.equal(*found, *torch.autograd.grad(step(q, "cpu")[0].square().sum(), q))
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", (None, "reference"))
def test_backends_are_loaded_while_a_graph_is_traced(backend, monkeypatch):
    """In a process whose first call is compiled; an odd head size is one that the first backend declines."""
    torch._dynamo.reset()
    monkeypatch.setattr(_backends, "_loaded", {})
    q = torch.randn(5, 2, 7)

    def step(q):
        return ck.rope_attention(q, q, q, backend=backend)

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q), ck.rope_attention(q, q, q, backend="reference"))


def test_opcheck_with_a_fallback(failing):
    failing(failures()["launch"])
    call, _ = example("rope_attention")
    with pytest.warns(RuntimeWarning):
        out, lse = FORWARD(*call, "triton", True)
    torch.library.opcheck(FORWARD, (call.q.requires_grad_(), *call[1:], "triton", True))
    arguments = (torch.randn_like(out), None, *(x.detach() for x in call[:3]), out, lse, *call[3:], "triton", True, False)
    torch.library.opcheck(BACKWARD, arguments)


def test_processes_of_a_group_do_not_part(failing, tmp_path):
    """They exchange sums in the units of their backend: what fails in one of them is raised there."""
    error = failures()["compiler"]
    failing(error)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(type(error)):
            ck.sinkhorn(torch.randn(4, 6), epsilon=0.5, group=dist.group.WORLD)
        with pytest.raises(type(error)):
            features = torch.randn(4, 8)
            ck.alignment_loss(features, features, torch.randn(30, 8), group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()
    assert not _backends._failures
