"""Next-token loss and pooling against their plain definitions."""

import torch
import torch.nn.functional as F

from comp.model.losses import masked_mean, mean_by_segment, next_token_loss


def example():
    hidden = torch.randn(3, 7, 8, requires_grad=True)
    labels = torch.randint(0, 11, (3, 7))
    labels[0, :4] = labels[1, 5:] = labels[2] = -100
    return hidden, labels, torch.nn.Linear(8, 11)


def plain(hidden, labels, lm_head):
    return F.cross_entropy(lm_head(hidden[:, :-1]).flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


def test_equals_the_definition_in_any_number_of_chunks():
    hidden, labels, lm_head = example()
    inputs = (hidden, lm_head.weight)
    exact = plain(hidden, labels, lm_head)
    exact_gradients = torch.autograd.grad(exact, inputs)
    for logits_at_once in (1, 11 * 2, 11 * 3, 10**6):
        loss, count = next_token_loss(hidden, labels, lm_head, 11, logits_at_once)
        assert count == int((labels[:, 1:] != -100).sum()) == 7
        torch.testing.assert_close(loss, exact)
        for gradient, expected in zip(torch.autograd.grad(loss, inputs), exact_gradients):
            torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


def test_logits_are_made_for_learned_positions_only_and_in_bounds():
    hidden, labels, lm_head = example()
    rows = []
    next_token_loss(hidden, labels, lambda x: (rows.append(len(x)), lm_head(x))[1], 11, logits_at_once=11 * 3)
    assert rows == [3, 3, 1]


def test_nothing_to_learn_is_zero_and_keeps_the_graph():
    hidden, labels, lm_head = example()
    loss, count = next_token_loss(hidden, torch.full_like(labels, -100), lm_head, 11)
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
    mask = torch.tensor([[True, False, True], [False, False, False]])
    assert masked_mean(x.detach().expand(2, 3, 2), mask).tolist() == [[3, 5.5], [0, 0]]
