"""The contrastive loss against a loop, over the forward passes of a step, and over processes."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from comp.model.losses import contrastive_loss

ROWS, WIDTH = 8, 6


def make_inputs():
    generator = torch.Generator().manual_seed(0)
    vision, text = (torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    return vision, text, torch.arange(ROWS) != 5


def loss_and_gradient(vision, text, valid, group=None):
    vision = vision.clone().requires_grad_()
    loss = contrastive_loss(vision, text, temperature=0.2, valid=valid, group=group)
    loss.backward()
    return loss.detach(), vision.grad


def test_by_hand():
    vision, text, valid = make_inputs()
    rows = [i for i in range(ROWS) if valid[i]]
    expected = 0.0
    for i in rows:
        weights = [math.exp(F.cosine_similarity(vision[i], text[j], dim=0).item() / 0.2) for j in rows]
        expected -= math.log(weights[rows.index(i)] / sum(weights)) / len(rows)
    loss, gradient = loss_and_gradient(vision, text, valid)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert gradient[5].eq(0).all() and gradient[valid].abs().sum(1).gt(0).all()


def test_texts_do_not_learn_and_what_they_say_in_invalid_rows_does_not_count():
    vision, text, valid = make_inputs()
    before = loss_and_gradient(vision, text.requires_grad_(), valid)
    assert text.grad is None
    text = torch.where(valid.unsqueeze(1), text.detach(), torch.nan)
    vision = torch.where(valid.unsqueeze(1), vision, 3.0)
    for a, b in zip(before, loss_and_gradient(vision, text, valid)):
        assert torch.equal(a, b)


def test_a_feature_of_zeros_receives_no_gradient():
    vision, text, valid = make_inputs()
    vision[2] = 0
    loss, gradient = loss_and_gradient(vision, text, valid)
    assert loss.isfinite() and gradient[2].eq(0).all()
    assert gradient.abs().max() < 10  # that of dividing by a length of 1e-12 would be about 1e11


def test_without_valid_rows_it_is_zero_on_the_graph():
    vision, text, valid = make_inputs()
    loss, gradient = loss_and_gradient(vision, text, valid & False)
    assert loss.item() == 0 and gradient.eq(0).all()


def test_forward_passes_of_a_step_add_up():
    """Rows of other passes have vision features zero and loss log(choices): comp.model.StepText."""
    vision, text, valid = make_inputs()
    whole, gradient = loss_and_gradient(vision, text, valid)
    total = 0.0
    for begin, end in ((0, 3), (3, ROWS)):
        mine = (torch.arange(ROWS) >= begin) & (torch.arange(ROWS) < end)
        part, part_gradient = loss_and_gradient(torch.where(mine.unsqueeze(1), vision, 0.0), text, valid)
        total += part
        torch.testing.assert_close(part_gradient[mine], gradient[mine])
    torch.testing.assert_close(total - math.log(int(valid.sum())), whole)


def work(rank, shares, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(shares))
    begin = sum(shares[:rank])
    rows = slice(begin, begin + shares[rank])
    torch.save(loss_and_gradient(*(x[rows] for x in make_inputs()), group=dist.group.WORLD), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_shares_equal_the_whole(tmp_path):
    shares = (3, 5)
    mp.spawn(work, (shares, str(tmp_path)), nprocs=len(shares))
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(shares))]
    loss, gradient = loss_and_gradient(*make_inputs())
    for share_loss, _ in results:
        torch.testing.assert_close(share_loss, loss)
    torch.testing.assert_close(torch.cat([g for _, g in results]), gradient)
