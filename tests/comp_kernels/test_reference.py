"""The definitions themselves: hand-made answers, gradients in float64, properties a person would state."""

import pytest
import torch

import comp_kernels as ck
from comp_kernels.ops.rope_attention import reference as rope
from comp_kernels.testing import ATTENTION_CASES, LAYOUTS, AttentionCase, attention_with_gradients, make_attention_inputs


def test_swap_pairs_by_hand():
    x = torch.arange(6.0)
    assert rope.swap_pairs(x, 3).tolist() == [-3, -4, -5, 0, 1, 2]
    assert rope.swap_pairs(x, 1).tolist() == [-1, 0, -3, 2, -5, 4]


def test_widen_table_by_hand():
    half = torch.tensor([10.0, 20.0, 30.0, 40.0])
    assert rope.widen_table(half, 8, 4).tolist() == [10, 20, 30, 40, 10, 20, 30, 40]
    assert rope.widen_table(half, 8, 2).tolist() == [10, 20, 10, 20, 30, 40, 30, 40]
    assert rope.widen_table(half, 8, 1).tolist() == [10, 10, 20, 20, 30, 30, 40, 40]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rope_attention_gradcheck(layout):
    inputs = make_attention_inputs(AttentionCase("small", [3, 0, 2], layout=layout, head_dim=12), torch.float64)
    leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.cos, inputs.sin)]

    def function(*leaves):
        return rope.rope_attention(*leaves, inputs.cu_seqlens, return_lse=True, **inputs.kwargs)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("name", ATTENTION_CASES)
def test_packed_equals_one_by_one(name):
    """Each sequence gives what it gives alone, and rows beyond the last one are zero."""
    inputs = make_attention_inputs(ATTENTION_CASES[name], torch.float64)
    result = attention_with_gradients(inputs, lambda *a, **k: rope.rope_attention(*a, return_lse=True, **k))
    for key, value in result.items():
        assert not value.isnan().any(), key
    assert (result["out"][inputs.cu_seqlens[-1] :] == 0).all()
    bounds = inputs.cu_seqlens.tolist()
    bounds_k = inputs.kwargs.get("cu_seqlens_k", inputs.cu_seqlens).tolist()
    for i0, i1, j0, j1 in zip(bounds, bounds[1:], bounds_k, bounds_k[1:]):
        kwargs = {key: x for key, x in inputs.kwargs.items() if key != "cu_seqlens_k"}
        kwargs.update({key: kwargs[key][j0:j1] for key in ("cos_k", "sin_k") if key in kwargs})
        tables = [None if table is None else table[i0:i1] for table in (inputs.cos, inputs.sin)]
        alone = rope.rope_attention(inputs.q[i0:i1], inputs.k[j0:j1], inputs.v[j0:j1], *tables, **kwargs)
        torch.testing.assert_close(result["out"][i0:i1], alone)


def test_scores_depend_on_relative_position_only():
    freqs = ck.axial_freqs(24)
    q, k = torch.randn(2, 1, 1, 24, dtype=torch.float64)

    def score(position_q, position_k):
        tables = [ck.rope_tables(torch.tensor([p]), freqs.double()) for p in (position_q, position_k)]
        turned = [rope.rotate(x, *table, 24, 12) for x, table in zip((q, k), tables)]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score((3, 5), (1, 9)), score((13, 105), (11, 109)))
    assert not torch.isclose(score((3, 5), (1, 9)), score((3, 5), (1, 8)))


GOLDEN_COUNTS = torch.tensor([500, 300, 150, 50, 0])
GOLDEN_SETTINGS = dict(prior=GOLDEN_COUNTS, epsilon=0.05, temperature=0.05, prior_temperature=1.0, normalize=False)
GOLDEN_TEXT = [[0.10, 0.08, 0.02, -0.01, 0.05], [0.00, 0.09, 0.11, 0.03, 0.02], [0.04, 0.04, 0.04, 0.12, 0.10]]
GOLDEN_VISION = [[0.05, 0.02, 0.01, 0.00, 0.03], [0.01, 0.02, 0.06, 0.02, 0.00], [0.00, 0.03, 0.02, 0.05, 0.04]]
# Targets computed once with an independent script in float64 (these settings, 3 iterations).
GOLDEN_TARGETS = {
    "released": [
        [0.645333, 0.237405, 0.045594, 0.018537, 0.053131],
        [0.120707, 0.400760, 0.381215, 0.057018, 0.040300],
        [0.254724, 0.139795, 0.089138, 0.327072, 0.189271],
    ],
    "literal": [
        [0.678161, 0.272751, 0.041075, 0.007514, 0.000499],
        [0.132935, 0.482525, 0.359921, 0.024222, 0.000397],
        [0.416330, 0.249798, 0.124899, 0.206209, 0.002765],
    ],
    "sinkhorn": [
        [0.758265, 0.208545, 0.028804, 0.004033, 0.000353],
        [0.189769, 0.471035, 0.322240, 0.016597, 0.000358],
        [0.543364, 0.222940, 0.102234, 0.129178, 0.002283],
    ],
}
GOLDEN_LOSS = {"released": 1.478371, "literal": 1.537971}


@pytest.mark.parametrize("mode", GOLDEN_TARGETS)
def test_alignment_golden_values(mode):
    vision, text = torch.tensor(GOLDEN_VISION, dtype=torch.float64), torch.tensor(GOLDEN_TEXT, dtype=torch.float64)
    target = torch.tensor(GOLDEN_TARGETS[mode], dtype=torch.float64)
    expected = -(target * (vision / 0.05).log_softmax(-1)).sum(-1).mean()
    if mode in GOLDEN_LOSS:
        assert abs(expected - GOLDEN_LOSS[mode]) < 2e-6
    loss = ck.alignment_loss(  # prototypes = identity, so the features are their own scores
        vision,
        text,
        torch.eye(5, dtype=torch.float64),
        mode=mode,
        backend="reference",
        **GOLDEN_SETTINGS,
    )
    assert abs(loss - expected) < 2e-6


@pytest.mark.parametrize("mode", ("sinkhorn", "literal", "released", "softmax"))
def test_alignment_loss_is_finite_at_cosine_one_and_ignores_invalid_rows(mode):
    prototypes = torch.randn(50, 8)
    vision, text = prototypes[:6].clone(), prototypes[:6].clone()
    vision[5], text[5] = torch.nan, torch.nan
    valid = torch.arange(6) < 5
    vision.requires_grad_()
    loss = ck.alignment_loss(vision, text, prototypes, mode=mode, valid=valid, backend="reference")
    loss.backward()
    alone = ck.alignment_loss(vision[:5], text[:5], prototypes, mode=mode, backend="reference")
    assert loss.isfinite() and vision.grad.isfinite().all() and (vision.grad[5] == 0).all()
    torch.testing.assert_close(loss, alone)
    nothing = ck.alignment_loss(
        vision, text, prototypes, mode=mode, valid=torch.zeros(6, dtype=torch.bool), backend="reference"
    )
    nothing.backward()
    assert nothing == 0


def test_sinkhorn_marginals():
    scores = torch.randn(3, 6, 10, dtype=torch.float64)
    rows = torch.rand(6, dtype=torch.float64)
    rows[2] = 0
    cols = torch.rand(3, 10, dtype=torch.float64)
    cols[:, 4] = 0
    cols *= rows.sum() / cols.sum(-1, keepdim=True)
    plan, u, v = ck.sinkhorn(
        scores, epsilon=0.5, num_iters=500, row_marginals=rows, col_marginals=cols, return_potentials=True, backend="reference"
    )
    torch.testing.assert_close(plan.sum(-1), rows.expand(3, 6))
    torch.testing.assert_close(plan.sum(-2), cols)
    torch.testing.assert_close(plan, (scores / 0.5 + u.unsqueeze(-1) + v.unsqueeze(-2)).exp())
    shifted = ck.sinkhorn(scores + torch.randn(3, 6, 1), epsilon=0.5, num_iters=500, row_marginals=rows, col_marginals=cols)
    torch.testing.assert_close(plan, shifted)
