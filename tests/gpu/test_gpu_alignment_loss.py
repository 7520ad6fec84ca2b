"""alignment_loss on the device: loss and gradients against float64 in every mode and dtype, CUDA graphs."""

import pytest
import torch
from device import DEVICE, HAS_GPU, captured, kernels_of

import comp_kernels as ck
from comp_kernels import reference
from comp_kernels.testing import ALIGNMENT_CASES, AlignmentCase, assert_within_budget, make_alignment_inputs

BACKENDS = kernels_of("alignment_loss")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CASES = ALIGNMENT_CASES
if HAS_GPU:
    CASES = CASES | {"large": AlignmentCase("large", 200, 320, 20000, invalid=(3, 150))}


def loss_and_gradients(function, inputs, dtype=None, **settings):
    """(loss, gradient of the vision features, of the prototypes)."""
    vision, text, prototypes = (x.detach() if dtype is None else x.detach().to(dtype) for x in inputs)
    vision.requires_grad_()
    prototypes.requires_grad_()
    loss = function(vision, text, prototypes, **settings)
    return loss.detach(), *torch.autograd.grad(loss, (vision, prototypes))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ("sinkhorn", "literal", "released", "softmax"))
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_float64(backend, case, mode, dtype):
    drawn = make_alignment_inputs(CASES[case], DTYPES[dtype])
    inputs = [x.to(DEVICE) for x in drawn.features]
    prior, valid = (None if x is None else x.to(DEVICE) for x in (drawn.prior, drawn.valid))
    settings = dict(mode=mode, epsilon=0.05, temperature=0.05, prior=prior, valid=valid, prototype_gradient=True)
    found = loss_and_gradients(ck.alignment_loss, inputs, backend=backend, **settings)
    exact = loss_and_gradients(reference.alignment_loss, inputs, torch.float64, **settings)
    peer = loss_and_gradients(reference.alignment_loss, inputs, **settings)
    for name, *triple in zip(("loss", "gradient", "gradient of the prototypes"), found, exact, peer):
        assert_within_budget(name, *triple, factor=4.0 if name == "loss" else 2.0)  # a single number can be exact by luck


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cuda_graph_serves_other_values(backend, dtype):
    """New values in the same memory, replayed, give what a call gives, to the bit."""
    vision, text, prototypes = (torch.randn(n, 64, device=DEVICE, dtype=DTYPES[dtype]) for n in (32, 32, 3000))
    prior, valid = torch.arange(3000, device=DEVICE), torch.arange(32, device=DEVICE) != 5
    vision.requires_grad_()

    def step():
        loss = ck.alignment_loss(vision, text, prototypes, prior=prior, valid=valid, epsilon=0.05, backend=backend)
        return loss.detach(), torch.autograd.grad(loss, vision)[0]

    replay = captured(step)
    for _ in range(2):
        for x in (vision, text, prototypes):
            x.detach().normal_()
        found = [x.clone() for x in replay()]
        for ours, expected in zip(found, step()):
            assert torch.equal(ours, expected)
