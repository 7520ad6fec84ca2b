"""comp_kernels/ops/rope_attention/plan.py: calls that look like one before give the same, and see what has changed since."""

import ctypes
import functools
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cuda_emulation import launches_on_emulator, needs_cuda_emulation

import comp_kernels as ck
from comp_kernels import _backends, _native
from comp_kernels.ops.rope_attention import cuda, native, plan
from comp_kernels.ops.rope_attention.call import checked_call
from comp_kernels.testing import AttentionCase, attention_with_gradients, make_attention_inputs

CASES = {
    "bounds": AttentionCase("bounds", [3, 0, 5], slack=2),
    "groups": AttentionCase("groups", [4, 7], heads=4, kv_heads=2),
    "keys of their own": AttentionCase("keys", [3, 5], lengths_k=[6, 1]),
}


def results(inputs, **settings) -> list[torch.Tensor]:
    return list(attention_with_gradients(inputs, functools.partial(ck.rope_attention, return_lse=True, **settings)).values())


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_the_second_call_gives_the_bits_of_the_first(name):
    inputs = make_attention_inputs(CASES[name])
    first = results(inputs)
    plans = dict(plan._plans)
    assert plans and all(x.passes is not None for x in plans.values())
    assert equal(first, results(inputs)) and plan._plans == plans  # none was made anew


def test_the_struct_is_packed_whole():
    parts = (native.ADDRESSES, native.OF_BACKWARD, native.OF_TABLES, native.STRIDES, native.GRAD_OUT_STRIDES, native.REST)
    assert sum(part.size for part in parts) == ctypes.sizeof(native.Params)


def test_without_bounds():
    q, k, v = torch.randn(3, 6, 2, 16)
    first, second = (ck.rope_attention(q, k, v) for _ in range(2))
    assert len(plan._plans) == 1 and torch.equal(first, second)


@pytest.mark.parametrize("wanted", ("cos", "sin"))
def test_gradients_of_tables(wanted):
    """Tables that the keys share receive the sum of both gradients."""
    inputs = make_attention_inputs(CASES["bounds"])
    table = getattr(inputs, wanted).requires_grad_()
    arguments = (inputs.q, inputs.k, inputs.v, inputs.cos, inputs.sin, inputs.cu_seqlens)
    first, second, expected = (
        torch.autograd.grad(ck.rope_attention(*arguments, backend=backend).square().sum(), table)[0]
        for backend in (None, None, "reference")
    )
    assert torch.equal(first, second)
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-5)


def test_gradients_only_where_they_are_wanted_now():
    q, k, v = torch.randn(3, 6, 2, 16)
    for _ in range(2):
        assert not ck.rope_attention(q, k, v).requires_grad
    q.requires_grad_()
    for _ in range(2):
        assert ck.rope_attention(q, k, v).requires_grad
        with torch.no_grad():
            assert not ck.rope_attention(q, k, v).requires_grad
        with torch.inference_mode():
            assert ck.rope_attention(q, k, v).is_inference()


def test_a_choice_holds_for_its_environment(monkeypatch):
    q, k, v = torch.randn(3, 6, 2, 16)
    for _ in range(2):
        ck.rope_attention(q, k, v)
        monkeypatch.setenv("COMP_KERNELS_BACKEND", "cuda")
        with pytest.raises(RuntimeError, match="COMP_KERNELS_BACKEND='cuda' cannot run"):
            ck.rope_attention(q, k, v)
        monkeypatch.delenv("COMP_KERNELS_BACKEND")


def test_a_plan_does_not_outlive_what_made_its_backend_available():
    from comp_kernels._triton import launches_go_to

    q, k, v = torch.randn(3, 6, 2, 16)
    with launches_go_to(lambda *args, **kwargs: None, "sm_90"):
        for _ in range(2):
            ck.rope_attention(q, k, v, backend="triton")
    if "triton" not in ck.available_backends("rope_attention"):
        with pytest.raises(RuntimeError, match="Triton runs on GPUs"):
            ck.rope_attention(q, k, v, backend="triton")


@pytest.mark.parametrize("fails_in", ("forward", "backward"))
def test_kernels_that_fail_after_they_have_run(fails_in, monkeypatch):
    """Where the backend was not named, another goes on, after a warning; where it was, the error is the user's."""
    monkeypatch.setattr(_backends, "_failures", {})
    monkeypatch.setattr(_backends, "PREFERENCE", {"cpu": ("cpu", "reference")})
    monkeypatch.setattr(_backends, "LAUNCHED", ("cpu",))
    inputs = make_attention_inputs(CASES["bounds"])
    expected, _ = results(inputs), results(inputs, backend="cpu")

    def fails(*arguments):
        raise OSError("no kernel image is available")

    module = _backends.implementation("rope_attention", "cpu")
    monkeypatch.setattr(module, fails_in, fails)
    for known in plan._plans.values():
        monkeypatch.setattr(known.passes, fails_in, fails)
    with pytest.raises(OSError):
        results(inputs, backend="cpu")
    with pytest.warns(RuntimeWarning, match="reference takes their place"):
        found = results(inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = results(inputs)
    for x, y, z in zip(found, again, expected):
        torch.testing.assert_close(x, z, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-5)


def test_many_threads_share_a_plan():
    every = [make_attention_inputs(CASES["bounds"]) for _ in range(8)]
    expected = [results(inputs) for inputs in every]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert all(equal(x, y) for x, y in zip(pool.map(results, every), expected))


@needs_cuda_emulation
def test_addresses_that_kernels_cannot_take():
    """The same shapes and strides, but a tensor, or its gradient, starts in the middle of 16 bytes: it is copied."""

    def shifted(x):
        return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)

    q, k, v, grad = torch.randn(4, 6, 2, 64).half()

    def call(q, grad):
        q = q.detach().requires_grad_()
        out = ck.rope_attention(q, k, v, backend="cuda")
        return [out.detach(), *torch.autograd.grad(out, q, grad)]

    with launches_on_emulator():
        expected, again = call(q, grad), call(q, grad)
        found, of_grad = call(shifted(q), grad), call(q, shifted(grad))
    assert all(x.passes is not None for x in plan._plans.values())
    assert equal(again, expected) and equal(found, expected) and equal(of_grad, expected)


class Library:
    """Functions by name, as ctypes gives them, that do nothing but note that they were called."""

    def __init__(self):
        self.called = []

    def __getitem__(self, name):
        def function(*arguments):
            self.called.append(name)
            return 0 if name.endswith("workspace") else None

        return function


def test_the_cuda_library_in_use_is_called(monkeypatch):
    """Benchmarks put another build in the place of the library, and back, within one process."""
    inputs = make_attention_inputs(AttentionCase("packed", [3, 5]), dtype=torch.bfloat16)
    libraries = Library(), Library()
    for library in (*libraries, libraries[0]):
        monkeypatch.setattr(_native, "_cuda", lambda library=library: library)
        tensors = (inputs.q, inputs.k, inputs.v, inputs.cos, inputs.sin, None, None, inputs.cu_seqlens, None)
        cuda.forward(checked_call(tensors, None, None, None))
    assert [len(library.called) for library in libraries] == [4, 2]
