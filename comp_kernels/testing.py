"""Cases, hostile inputs and error budgets for the operators, shared by tests and benchmarks; of use to your own backend too."""

from __future__ import annotations

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .ops.rope_attention import reference, rope_attention
from .ops.rope_attention.tables import axial_freqs, rope_tables


def assert_within_budget(
    name: str, actual: Tensor, exact: Tensor, peer: Tensor, factor: float = 2.0, largest_term: float = 0.0
) -> None:
    """The error of `actual` is at most `factor` times the error of `peer`, a plain PyTorch version in the working dtype.

    exact: the reference in float64. One rounding of the largest value is added to the peer's error, so that a peer that
    happens to be exact does not make the budget zero. Infinities must sit at the same places.
    largest_term: of sums whose terms cancel, the largest; it is rounded too, whatever is left of it.
    """
    check_places(name, actual, exact, peer)
    error, allowed = error_and_allowance(actual, exact, peer, largest_term)
    assert error <= factor * allowed, f"{name}: max error {error:.3e} exceeds the budget {factor * allowed:.3e}"


def check_places(name: str, actual: Tensor, exact: Tensor, peer: Tensor) -> None:
    """Assert that infinities sit at the same places and that everything else is finite."""
    actual64 = actual.detach().double()
    finite = exact.isfinite()
    assert torch.equal(actual64[~finite], exact[~finite]), f"{name}: infinities differ from the reference"
    assert actual64[finite].isfinite().all(), f"{name}: {int((~actual64[finite].isfinite()).sum())} non-finite values"
    assert peer.detach()[finite].isfinite().all(), f"{name}: no budget, the peer is not finite where the reference is"


def error_and_allowance(actual: Tensor, exact: Tensor, peer: Tensor, largest_term: float = 0.0) -> tuple[float, float]:
    """(largest error of `actual`, that of `peer` and one rounding of the largest value or term), where `exact` is finite."""
    finite = exact.isfinite()
    if not finite.any():
        return 0.0, 0.0
    error, allowed = (float((x.detach().double() - exact)[finite].abs().max()) for x in (actual, peer))
    return error, allowed + torch.finfo(peer.dtype).eps * max(float(exact[finite].abs().max()), largest_term)


# --- rotary layouts of the vision transformers in use ----------------------------------------------------------------------


@dataclass(frozen=True)
class RotaryLayout:
    """How one family of models arranges its rotary embedding; `tables` makes cos and sin."""

    name: str
    rotary_dim: Callable[[int], int]  # head_dim -> rotary_dim
    pair_stride: Callable[[int], int]  # rotary_dim -> pair stride
    tables: Callable[[Tensor, int, int], tuple[Tensor, Tensor]]  # positions [T, 3] (t, row, col), heads, rotary_dim


def _axial(layout: str, base: float = 10000.0):
    def tables(positions: Tensor, heads: int, rotary_dim: int) -> tuple[Tensor, Tensor]:
        return rope_tables(positions[:, 1:], axial_freqs(rotary_dim, base, layout))

    return tables


def _half_width(positions: Tensor, heads: int, rotary_dim: int) -> tuple[Tensor, Tensor]:
    return rope_tables(positions[:, 1:], axial_freqs(rotary_dim)[:, : rotary_dim // 2])


def _alternating(positions: Tensor, heads: int, rotary_dim: int) -> tuple[Tensor, Tensor]:
    """Kimi-VL, Pixtral: pair j turns with the column (even j) or the row (odd j); tiled for both halves."""
    freqs = torch.pow(10000.0, -torch.arange(rotary_dim // 2) / (rotary_dim // 2))
    even = (torch.arange(rotary_dim // 2) % 2 == 0).float()
    return rope_tables(positions[:, 1:], torch.stack((freqs * (1 - even), freqs * even)).repeat(1, 2))


def _per_head(positions: Tensor, heads: int, rotary_dim: int) -> tuple[Tensor, Tensor]:
    """RoPE-Mixed (timm): one direction per head and frequency, half width."""
    generator = torch.Generator().manual_seed(7)
    freqs = torch.randn(heads, 2, rotary_dim // 2, generator=generator)
    return rope_tables(positions[:, 1:].float() * 0.3, freqs)


def _three_axes(positions: Tensor, heads: int, rotary_dim: int) -> tuple[Tensor, Tensor]:
    """V-JEPA 2: the angles are tiled *inside* interleaved pairs, so the two channels of a pair turn by different angles.
    Not a rotation; only the true transpose gives right gradients."""
    pairs = rotary_dim // 2
    freqs = torch.pow(10000.0, -torch.arange(pairs) / pairs)
    axis = torch.arange(pairs) * 3 // pairs
    table = torch.zeros(3, pairs).scatter_(0, axis[None], freqs[None])
    return rope_tables(positions, torch.cat((table, table), dim=1))


LAYOUTS = {
    layout.name: layout
    for layout in (
        RotaryLayout("half_hwhw", lambda d: d // 4 * 4, lambda r: r // 2, _axial("hwhw")),  # Qwen-VL, GLM-4V, CoMP C-RoPE
        RotaryLayout("half_hwhw_halfwidth", lambda d: d // 4 * 4, lambda r: r // 2, _half_width),
        RotaryLayout("half_whwh", lambda d: d // 4 * 4, lambda r: r // 2, _axial("whwh")),  # Step-3.7
        RotaryLayout("half_alternating", lambda d: d // 2 * 2, lambda r: r // 2, _alternating),  # Kimi-VL, Pixtral
        RotaryLayout("quarter_hhww", lambda d: d // 4 * 4, lambda r: r // 4, _axial("hhww", 100.0)),  # Gemma 4
        RotaryLayout("interleaved", lambda d: d // 4 * 4, lambda r: 1, _axial("interleaved")),  # Llama 4, SAM 3, EVA-02
        RotaryLayout("partial", lambda d: d // 2, lambda r: r // 2, _alternating),  # MiniMax-M3-VL: the tail passes through
        RotaryLayout("per_head_interleaved", lambda d: d // 2 * 2, lambda r: 1, _per_head),  # timm RoPE-Mixed
        RotaryLayout("not_orthogonal", lambda d: d // 6 * 6 or 2, lambda r: 1, _three_axes),  # V-JEPA 2
    )
}


# --- packed inputs ---------------------------------------------------------------------------------------------------------

# patches per image; lengths are hostile on purpose
PACKED = {
    "one_token": [1],
    "one_image": [65],
    "awkward": [1, 0, 63, 65, 127],
    "windows": [16] * 9,
    "empty": [],
    "only_empty": [0, 0],
}


@dataclass(frozen=True)
class AttentionCase:
    """One call of rope_attention, described by sizes; `make_attention_inputs` builds its tensors."""

    name: str
    lengths: list[int]
    heads: int = 2
    head_dim: int = 16
    kv_heads: int | None = None  # default: heads
    layout: str | None = "half_hwhw"  # key of LAYOUTS; None = no rotation
    layout_k: str | None = None  # of the keys, which then have tables of their own; default: that of the queries
    lengths_k: list[int] | None = None  # cross attention; tables for the keys are then separate
    slack: int = 0  # rows beyond cu_seqlens[-1], filled with NaN
    packed_qkv: bool = False  # q, k, v are strided views of one tensor
    magnitude: float = 1.0  # q and k are multiplied by this: 1e2 gives logits of about 1e4
    scale: float | None = None
    seed: int = 0


@dataclass
class AttentionInputs:
    """Tensors of one case: positional arguments, keyword arguments, and the cotangents for its gradients."""

    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor | None
    sin: Tensor | None
    cu_seqlens: Tensor
    kwargs: dict[str, Any]
    grad_out: Tensor
    grad_lse: Tensor

    def leaves(self) -> dict[str, Tensor]:
        """The tensors that can receive gradients, by name."""
        named = dict(q=self.q, k=self.k, v=self.v, cos=self.cos, sin=self.sin)
        named.update({name: self.kwargs.get(name) for name in ("cos_k", "sin_k")})
        return {name: x for name, x in named.items() if x is not None}


def cumulative(lengths: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def grid_positions(lengths: list[int]) -> Tensor:
    """(t, row, column) of every token, rows of seven patches: [sum lengths, 3]."""
    index = torch.cat([torch.arange(n) for n in lengths]) if lengths else torch.arange(0)
    return torch.stack((index * 0, index // 7, index % 7), dim=1)


def make_attention_inputs(
    case: AttentionCase, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> AttentionInputs:
    """Random tensors of `case`, drawn in float64 on the CPU and rounded to `dtype`, so every dtype sees the same numbers."""
    generator = torch.Generator().manual_seed(case.seed)
    kv_heads = case.kv_heads or case.heads
    lengths_k = case.lengths if case.lengths_k is None else case.lengths_k
    tokens, tokens_k = sum(case.lengths) + case.slack, sum(lengths_k) + case.slack

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q = normal(tokens, case.heads, case.head_dim) * case.magnitude
    k = normal(tokens_k, kv_heads, case.head_dim) * case.magnitude
    v = normal(tokens_k, kv_heads, case.head_dim)
    grad_out, grad_lse = normal(*q.shape), normal(case.heads, tokens)
    if case.slack:
        for x, lengths in ((q, case.lengths), (k, lengths_k), (v, lengths_k), (grad_out, case.lengths)):
            x[sum(lengths) :] = torch.nan
        grad_lse[:, sum(case.lengths) :] = torch.nan
    q, k, v, grad_out = (x.to(dtype) for x in (q, k, v, grad_out))
    if case.packed_qkv:  # [T, heads of q, k and v, D] in one allocation, as a fused projection leaves them
        q, k, v = torch.cat((q, k, v), dim=1).split((case.heads, kv_heads, kv_heads), dim=1)

    table_dtype = torch.promote_types(dtype, torch.float32)
    cos = sin = None
    kwargs: dict = {}
    if case.layout is not None:
        layout = LAYOUTS[case.layout]
        rotary_dim = layout.rotary_dim(case.head_dim)

        def tables(lengths: list[int], heads: int, layout: RotaryLayout = layout) -> tuple[Tensor, Tensor]:
            pair = layout.tables(grid_positions(lengths), heads, rotary_dim)
            slack = pair[0].new_full((case.slack, *pair[0].shape[1:]), torch.nan)
            cos, sin = (torch.cat((table, slack)).to(table_dtype).to(device) for table in pair)
            return cos, sin

        kwargs.update(rotary_dim=rotary_dim, pair_stride=layout.pair_stride(rotary_dim))
        cos, sin = tables(case.lengths, case.heads)
        if case.lengths_k is not None or case.layout_k is not None or (cos.dim() == 3 and kv_heads != case.heads):
            kwargs["cos_k"], kwargs["sin_k"] = tables(lengths_k, kv_heads, LAYOUTS[case.layout_k or case.layout])
    if case.lengths_k is not None:
        kwargs["cu_seqlens_k"] = cumulative(lengths_k).to(device)
    if case.scale is not None:
        kwargs["scale"] = case.scale
    return AttentionInputs(
        q.to(device),
        k.to(device),
        v.to(device),
        cos,
        sin,
        cumulative(case.lengths).to(device),
        kwargs,
        grad_out.to(device),
        grad_lse.to(torch.promote_types(dtype, torch.float32)).to(device),
    )


ATTENTION_CASES = {
    case.name: case
    for case in (
        *(AttentionCase(name, lengths) for name, lengths in PACKED.items()),
        *(AttentionCase(f"layout_{name}", [1, 33, 0, 20], layout=name, head_dim=24) for name in LAYOUTS),
        *(AttentionCase(f"dim_{d}", [40, 65], head_dim=d) for d in (32, 64, 72, 80, 88, 96, 128, 256)),
        AttentionCase("dim_2", [5, 9], head_dim=2, layout=None),
        AttentionCase("dim_10", [5, 19], head_dim=10),
        AttentionCase("no_rope", [30, 71], layout=None),
        AttentionCase("gqa", [30, 71], heads=6, kv_heads=2),
        AttentionCase("gqa_per_head", [30, 17], heads=4, kv_heads=2, layout="per_head_interleaved"),
        AttentionCase("cross", [30, 0, 17, 4], lengths_k=[12, 5, 0, 70]),
        AttentionCase("no_keys_first", [3, 40], lengths_k=[0, 50], kv_heads=1),
        AttentionCase("half_width_of_keys", [30, 17], layout_k="half_hwhw_halfwidth"),
        AttentionCase("half_width_of_queries", [30, 17], layout="half_hwhw_halfwidth", layout_k="half_hwhw"),
        AttentionCase("slack_of_nan", [30, 17], slack=13),
        AttentionCase("slack_of_nan_cross", [30, 17], lengths_k=[9, 31], slack=5),
        AttentionCase("views_of_qkv", [30, 65], packed_qkv=True, heads=4),
        AttentionCase("logits_of_1e4", [40, 9], magnitude=50.0),
        AttentionCase("scale_one", [40, 9], scale=1.0),
    )
}


def plain_rope_attention(q, k, v, cos=None, sin=None, cu_seqlens=None, **kwargs) -> tuple[Tensor, Tensor]:
    """What one would write by hand in the working dtype: rotate in float32 and round back, then matmul, softmax, matmul.

    The peer that sets the error budget of the kernels. Returns (out, lse).
    """
    compute = torch.promote_types(q.dtype, torch.float32)
    scale = kwargs.get("scale") or q.shape[-1] ** -0.5
    bounds = cu_seqlens.tolist()
    bounds_k = kwargs.get("cu_seqlens_k", cu_seqlens).tolist()
    out = torch.zeros_like(q)
    lse = q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=compute)
    cos_k, sin_k = kwargs.get("cos_k", cos), kwargs.get("sin_k", sin)
    for i0, i1, j0, j1 in zip(bounds, bounds[1:], bounds_k, bounds_k[1:]):
        if i0 == i1 or j0 == j1:
            continue
        q_i, k_j, v_j = q[i0:i1], k[j0:j1], v[j0:j1]
        if cos is not None:
            turn = partial(reference.rotate, rotary_dim=kwargs["rotary_dim"], pair_stride=kwargs["pair_stride"])
            q_i = turn(q_i.to(compute), cos[i0:i1], sin[i0:i1]).to(q.dtype)
            k_j = turn(k_j.to(compute), cos_k[j0:j1], sin_k[j0:j1]).to(q.dtype)
        group = q.shape[1] // k.shape[1]
        k_j, v_j = k_j.repeat_interleave(group, 1), v_j.repeat_interleave(group, 1)
        scores = (q_i.transpose(0, 1) @ k_j.permute(1, 2, 0)).to(compute) * scale  # [H, i, j]
        probabilities = scores.softmax(-1).to(q.dtype)
        out = out.index_copy(0, torch.arange(i0, i1, device=q.device), (probabilities @ v_j.transpose(0, 1)).transpose(0, 1))
        lse = lse.index_copy(1, torch.arange(i0, i1, device=q.device), scores.logsumexp(-1))
    return out, lse


def attention_with_gradients(
    inputs: AttentionInputs, function: Callable, dtype: torch.dtype | None = None, *, lse_gradient: bool = True
) -> dict[str, Tensor]:
    """Run `function(q, k, v, cos, sin, cu_seqlens, **kwargs) -> (out, lse)` and its backward.

    dtype: convert the floating inputs first (float64 for the truth). Returns out, lse and the gradient of every leaf, by name.
    """

    def leaf(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        return (x.detach() if dtype is None else x.detach().to(dtype)).requires_grad_()

    def cast(x: Tensor) -> Tensor:
        return x if dtype is None else x.to(dtype)

    kwargs = {name: leaf(x) if name in ("cos_k", "sin_k") else x for name, x in inputs.kwargs.items()}
    leaves = [leaf(x) for x in (inputs.q, inputs.k, inputs.v, inputs.cos, inputs.sin)]
    out, lse = function(*leaves, inputs.cu_seqlens, **kwargs)
    names = ("q", "k", "v", "cos", "sin", "cos_k", "sin_k")
    named = {n: x for n, x in zip(names, [*leaves, kwargs.get("cos_k"), kwargs.get("sin_k")]) if x is not None}
    outputs, cotangents = [out], [cast(inputs.grad_out)]
    if lse_gradient:
        # The rows without keys have lse = -inf, a constant: they take part with cotangent zero.
        outputs.append(torch.where(lse.isfinite(), lse, 0.0))
        cotangents.append(torch.where(lse.isfinite(), cast(inputs.grad_lse).to(lse.dtype), 0.0))
    pairs = [(y, dy) for y, dy in zip(outputs, cotangents) if y.requires_grad]  # lse of nothing hangs on nothing
    gradients = torch.autograd.grad([y for y, _ in pairs], list(named.values()), [dy for _, dy in pairs], allow_unused=True)
    result = {"out": out.detach(), "lse": lse.detach()}
    for (name, x), gradient in zip(named.items(), gradients):
        result[f"d{name}"] = torch.zeros_like(x) if gradient is None else gradient
    return result


def check_rope_attention(
    case: AttentionCase,
    dtype: torch.dtype,
    backend: str,
    device: str | torch.device = "cpu",
    factor: float = 2.0,
    draws: int = 16,
    change: Callable[[AttentionInputs], None] | None = None,
) -> None:
    """Assert that `backend` computes out, lse and all gradients of `case`, of its inputs after `change`, within the error
    budget of `dtype`.

    The largest of a few thousand rounding errors is a matter of luck on both sides, and that of plain PyTorch of the machine
    too, whose sums run in another order. So where one draw does not settle it the largest error over `draws` of them counts,
    against `factor` times the largest that plain PyTorch makes over the same ones.
    """

    def draw(seed: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        actual, exact, peer = three_ways(dataclasses.replace(case, seed=seed), dtype, backend, device, change)
        return {f"{case.name} {name}": (actual[name], exact[name], peer[name]) for name in exact}

    check_draws(draw, range(case.seed, case.seed + draws), factor)


def check_draws(draw: Callable[[int], dict[str, tuple[Tensor, Tensor, Tensor]]], seeds: range, factor: float = 2.0) -> None:
    """Assert that of all that `draw(seed)` gives by name, (actual, exact, peer), the largest error over the seeds is within
    `factor` times that of the peer. Where the first seed settles it, the others are not drawn."""
    largest: dict[str, tuple[float, float]] = {}
    for seed in seeds:
        for name, (actual, exact, peer) in draw(seed).items():
            check_places(name, actual, exact, peer)
            error, allowed = error_and_allowance(actual, exact, peer)
            before, allowed_before = largest.get(name, (error, allowed))
            largest[name] = (max(error, before), max(allowed, allowed_before))
        if seed == seeds[0] and all(error <= factor * allowed for error, allowed in largest.values()):
            return
    for name, (error, allowed) in largest.items():
        budget = factor * allowed
        assert error <= budget, f"{name}: max error {error:.3e} of {len(seeds)} draws exceeds the budget {budget:.3e}"


def check_median_error(
    case: AttentionCase,
    dtype: torch.dtype,
    backend: str,
    draws: int = 9,
    factor: float = 2.0,
    device: str | torch.device = "cpu",
    change: Callable[[AttentionInputs], None] | None = None,
) -> None:
    """Assert that over several draws of `case`, after `change`, the median error is within `factor` of that of plain PyTorch.

    For logits of 1e4: the largest error of one draw is that of the nearest tie of two keys, decided by roundings of the
    logits that neither side controls, and either side may have it ten times as large as the other.
    """
    drawn: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for seed in range(draws):
        actual, exact, peer = three_ways(dataclasses.replace(case, seed=seed), dtype, backend, device, change)
        for name, value in exact.items():
            drawn[name].append(error_and_allowance(actual[name], value, peer[name]))
    for name, pairs in drawn.items():
        error, allowed = map(statistics.median, zip(*pairs))
        budget = factor * allowed
        assert error <= budget, f"{case.name} {name}: median error {error:.3e} of {draws} draws exceeds {budget:.3e}"


def check_huge_logits(dtype: torch.dtype, backend: str, device: str | torch.device = "cpu", magnitude: float = 2.5e4) -> None:
    """Assert that logits of 1e10 (more with `magnitude`), of which neighbouring floats differ by 1000, leave everything finite,
    and that a query whose best key is clear to `dtype` has that key's value (float32: but for a rounding, for tensor cores
    multiply numbers of fewer bits)."""
    inputs = make_attention_inputs(AttentionCase("huge", [200], head_dim=64, layout=None, magnitude=magnitude), torch.float64)
    limit = 2.0 * magnitude  # float16 ends at 6.5e4
    inputs.q, inputs.k = inputs.q.clamp(-limit, limit), inputs.k.clamp(-limit, limit)
    for name in ("q", "k", "v", "grad_out", "grad_lse"):
        x = getattr(inputs, name)
        x = x.to(torch.promote_types(dtype, torch.float32) if name == "grad_lse" else dtype)
        setattr(inputs, name, x.to(device))
    found = attention_with_gradients(
        inputs, lambda *args, **kwargs: rope_attention(*args, return_lse=True, backend=backend, **kwargs)
    )
    for name, x in found.items():
        assert x.isfinite().all(), f"{name}: {int((~x.isfinite()).sum())} of {x.numel()} values are not finite"
    scores = torch.einsum("ihd,jhd->hij", inputs.q.double(), inputs.k.double())
    best = scores.topk(2)
    clear = best.values[..., 0] - best.values[..., 1] > 1e-4 * best.values[..., 0].abs()
    assert clear.double().mean() > 0.9
    values = inputs.v.transpose(0, 1).gather(1, best.indices[..., :1].expand(-1, -1, inputs.v.shape[-1]))
    rounding = torch.finfo(dtype).eps if dtype == torch.float32 and backend != "cpu" else 0.0
    wrong = (found["out"].transpose(0, 1) - values).abs() > rounding * values.abs()
    assert not wrong[clear].any(), "out: not the value of the best key"


def three_ways(
    case: AttentionCase,
    dtype: torch.dtype,
    backend: str,
    device: str | torch.device = "cpu",
    change: Callable[[AttentionInputs], None] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """out, lse and all gradients by `backend`, by the definition in float64, and by plain PyTorch in `dtype`."""
    inputs = make_attention_inputs(case, dtype, device)
    if change is not None:
        change(inputs)

    def kernel(*args, **kwargs):
        return rope_attention(*args, return_lse=True, backend=backend, **kwargs)

    def definition(*args, **kwargs):
        return reference.rope_attention(*args, return_lse=True, **kwargs)

    return (
        attention_with_gradients(inputs, kernel),
        attention_with_gradients(inputs, definition, torch.float64),
        attention_with_gradients(inputs, plain_rope_attention),
    )


# --- sinkhorn --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SinkhornCase:
    """One call of sinkhorn, described by sizes; `make_sinkhorn_inputs` builds its tensors."""

    name: str
    shape: tuple[int, ...]  # [..., n, K]
    epsilon: float = 0.1
    num_iters: int = 3
    # "shared", "per_item": random, some of them zero; "rows_per_item": the columns are left to the default;
    # "expanded": one item's rows and one number's columns, without a copy.
    marginals: str = "default"
    seed: int = 0


SINKHORN_CASES = {
    case.name: case
    for case in (
        SinkhornCase("one_entry", (1, 1)),
        SinkhornCase("small", (5, 7), num_iters=1),
        SinkhornCase("odd", (2, 3, 33, 131)),
        SinkhornCase("many_columns", (7, 3001), epsilon=0.02),
        SinkhornCase("many_rows", (300, 40), epsilon=0.05),
        SinkhornCase("marginals_shared", (3, 10, 70), marginals="shared", num_iters=5),
        SinkhornCase("marginals_per_item", (3, 10, 70), marginals="per_item", num_iters=2),
        SinkhornCase("marginals_of_rows_per_item", (3, 10, 70), marginals="rows_per_item"),
        SinkhornCase("marginals_expanded", (3, 10, 70), marginals="expanded"),
        SinkhornCase("sharp", (12, 200), epsilon=0.005, num_iters=10),
    )
}


def make_sinkhorn_inputs(case: SinkhornCase, dtype: torch.dtype = torch.float32) -> tuple[Tensor, dict[str, Tensor]]:
    """Scores in [-1, 1) like cosines, of `dtype`; the marginals as keyword arguments, of the dtype that it is computed in."""
    generator = torch.Generator().manual_seed(case.seed)
    scores = (torch.rand(case.shape, generator=generator, dtype=torch.float64) * 2 - 1).to(dtype)
    if case.marginals == "default":
        return scores, {}
    *batch, rows, cols = case.shape
    per_item = batch if case.marginals in ("per_item", "rows_per_item") else []
    a, b = (torch.rand(*per_item, size, generator=generator, dtype=torch.float64) for size in (rows, cols))
    a[..., 2], b[..., 3:6] = 0, 0
    b *= a.sum(-1, keepdim=True) / b.sum(-1, keepdim=True)
    compute = torch.promote_types(dtype, torch.float32)
    a, b = a.to(compute), b.to(compute)
    if case.marginals == "rows_per_item":
        return scores, dict(row_marginals=a)
    if case.marginals == "expanded":
        a, b = a.expand(*batch, rows), (a.sum() / cols).expand(*batch, cols)
    return scores, dict(row_marginals=a, col_marginals=b)


# --- alignment_loss --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AlignmentCase:
    """One call of alignment_loss, described by sizes; `make_alignment_inputs` builds its tensors."""

    name: str
    rows: int
    dim: int
    words: int
    prior: bool = True
    invalid: tuple[int, ...] = ()  # rows that do not count, filled with NaN
    seed: int = 0


ALIGNMENT_CASES = {
    case.name: case
    for case in (
        AlignmentCase("small", 3, 8, 20, prior=False, invalid=(1,)),
        AlignmentCase("one_row", 1, 8, 300),
        AlignmentCase("several_tiles", 13, 24, 600, invalid=(0, 7)),
    )
}


@dataclass
class AlignmentInputs:
    features: tuple[Tensor, Tensor, Tensor]  # vision [n, D], text [n, D], prototypes [V, D]
    prior: Tensor | None  # [V] int64, a third of the words never seen
    valid: Tensor | None  # [n] bool


def make_alignment_inputs(case: AlignmentCase, dtype: torch.dtype = torch.float32) -> AlignmentInputs:
    """Features that lean towards some prototypes, so that targets are neither flat nor one-hot."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    prototypes = normal(case.words, case.dim) * (0.5 + normal(case.words, 1).abs())
    vision, text = (normal(case.rows, case.dim) + prototypes[: case.rows] for _ in range(2))
    counts = torch.randint(-500, 1000, (case.words,), generator=generator).clamp(min=0)
    valid = torch.ones(case.rows, dtype=torch.bool)
    for row in case.invalid:
        vision[row], text[row], valid[row] = torch.nan, torch.nan, False
    features = (vision.to(dtype), text.to(dtype), prototypes.to(dtype))
    return AlignmentInputs(features, counts if case.prior else None, valid if case.invalid else None)
