"""Next-token loss and pooling against their plain definitions."""

import pytest
import torch
import torch.nn.functional as F

from comp.model.losses import Head, Learned, mean_by_segment, next_token_loss


def example():
    hidden = torch.randn(3, 7, 8, requires_grad=True)
    labels = torch.randint(0, 11, (3, 7))
    labels[0, :4] = labels[1, 5:] = labels[2] = -100
    return hidden, labels, torch.nn.Linear(8, 11)


def plain(hidden, labels, lm_head):
    return F.cross_entropy(lm_head(hidden[:, :-1]).flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


def loss_of(hidden, labels, lm_head, logits_at_once=10**6, linear=False, per_sample=False):
    """Loss and number of learned tokens of rows without padding."""
    learned = Learned.of(labels, torch.ones_like(labels, dtype=torch.bool), per_sample=per_sample)
    head = Head(lm_head, 11, lm_head if linear else None)
    return next_token_loss(hidden.flatten(0, 1)[learned.predictors], learned, head, logits_at_once), len(learned.targets)


@pytest.mark.parametrize("linear", [False, True])
def test_equals_the_definition_in_any_number_of_chunks(linear):
    hidden, labels, lm_head = example()
    inputs = (hidden, lm_head.weight, lm_head.bias)
    exact = plain(hidden, labels, lm_head)
    exact_gradients = torch.autograd.grad(exact, inputs)
    for logits_at_once in (1, 11 * 2, 11 * 3, 10**6):
        loss, count = loss_of(hidden, labels, lm_head, logits_at_once, linear)
        assert count == int((labels[:, 1:] != -100).sum()) == 7
        torch.testing.assert_close(loss, exact)
        for gradient, expected in zip(torch.autograd.grad(loss, inputs), exact_gradients):
            torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("linear", [False, True])
def test_a_graph_that_is_retained_gives_the_same_gradients_again(linear):
    hidden, labels, lm_head = example()
    loss = 3 * loss_of(hidden, labels, lm_head, 22, linear)[0]
    inputs = (hidden, lm_head.weight, lm_head.bias)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    for again in (torch.autograd.grad(loss, inputs, retain_graph=True), torch.autograd.grad(loss, inputs), first):
        torch.testing.assert_close(list(again), kept, rtol=0, atol=0)


def test_means_of_samples_and_a_frozen_head():
    hidden, labels, lm_head = example()
    for frozen in (False, True):
        lm_head.requires_grad_(not frozen)
        losses = [loss_of(hidden, labels, lm_head, 22, linear, per_sample=True)[0] for linear in (False, True)]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*(torch.autograd.grad(3 * loss, hidden)[0] for loss in losses))


def test_a_linear_head_is_exact_in_float64_and_bounded_in_bfloat16():
    """The budget of bfloat16 is twice what cross_entropy errs with the same rounded logits."""
    hidden, labels, lm_head = example()
    exact = plain(hidden.double(), labels, lm_head.double())
    (wanted,) = torch.autograd.grad(exact, hidden)
    lm_head.float()
    errors = []
    for linear in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = loss_of(hidden, labels, lm_head, 22, linear)
        (gradient,) = torch.autograd.grad(loss, hidden)
        errors.append(((loss - exact).abs().item(), (gradient - wanted).abs().max().item()))
    assert errors[1][0] <= 2 * errors[0][0] + 1e-6 and errors[1][1] <= 2 * errors[0][1] + 1e-6, errors


def test_logits_are_made_for_learned_positions_only_and_in_bounds():
    hidden, labels, lm_head = example()
    rows = []
    lm_head.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    loss_of(hidden, labels, lm_head, logits_at_once=11 * 3)
    assert rows == [3, 3, 1]


@pytest.mark.parametrize("linear", [False, True])
def test_nothing_to_learn_is_zero_and_keeps_the_graph(linear):
    hidden, labels, lm_head = example()
    loss, count = loss_of(hidden, torch.full_like(labels, -100), lm_head, linear=linear)
    assert (loss.item(), count) == (0.0, 0)
    loss.backward()
    assert hidden.grad.eq(0).all()


def test_means():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 9.0]], requires_grad=True)
    means = mean_by_segment(x, [0, 2, 0, 1])
    assert means.tolist() == [[0, 0], [2, 3], [0, 0], [5, 9]]
    means.sum().backward()
    assert x.grad.tolist() == [[0.5, 0.5], [0.5, 0.5], [1, 1]]
    assert mean_by_segment(x[:0], [0, 0]).tolist() == [[0, 0]] * 2
