"""Rounding errors of rope_attention on the CPU by instruction set: of scores, and of random calls beside their error budgets.

    python -m benchmarks.precision [--sets avx512 amx_bf16x3] [--dtype float32] [--calls 500] [--seed 0]

Scores: a sequence of one query and one key has its score as lse. Root mean square of the errors of 4,096 of them against
float64, as parts of 2^-24 |q| |k|, and of those that plain PyTorch makes in a product of 64 queries and 64 keys in float32.

Random calls: lengths, head sizes, layouts, strides, magnitudes; out, lse and all gradients against float64. Beyond their
budget are those off by more than `check_rope_attention` allows (where logits are large: `check_median_error`). A few are
by chance, so compare sets; all get the same calls. The tests draw fixed cases, this draws others.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from comp_kernels import _native
from comp_kernels.ops.rope_attention import cpu
from comp_kernels.ops.rope_attention.call import checked_call
from comp_kernels.testing import LAYOUTS, AttentionCase, check_median_error, check_rope_attention

from .turns import Build

SCORES = 4096
HEAD_DIMS = (16, 32, 64, 72, 80, 96, 128, 256)


def draw(rows: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of queries and of keys."""
    q, k = torch.randn(2, rows, head_dim, generator=torch.Generator().manual_seed(head_dim)).to(dtype)
    return q, k


def rms(scores: Tensor, q: Tensor, k: Tensor) -> float:
    """Of the errors of `scores`, sums over the last dimension of q k, as parts of 2^-24 |q| |k|."""
    q, k = q.double(), k.double()
    errors = (scores.double() - (q * k).sum(-1)) / (2.0**-24 * q.norm(dim=-1) * k.norm(dim=-1))
    return errors.square().mean().sqrt().item()


def rms_of_kernel(head_dim: int, dtype: torch.dtype) -> float:
    q, k = draw(SCORES, head_dim, dtype)
    bounds = torch.arange(SCORES + 1, dtype=torch.int32)
    call = checked_call((q[:, None], k[:, None], k[:, None], None, None, None, None, bounds, None), None, None, 1.0)
    return rms(cpu.forward(call)[1][0], q, k)  # lse as the backward pass gets it, in float64


def rms_of_torch(head_dim: int, dtype: torch.dtype) -> float:
    q, k = (x.float() for x in draw(math.isqrt(SCORES), head_dim, dtype))
    return rms(q @ k.T, q[:, None], k[None])


def random_case(rng: random.Random) -> AttentionCase:
    head_dim = rng.choice((2, 6, 8, 16, 24, 32, 40, 48, 56, 64, 64, 72, 72, 80, 88, 96, 112, 128, 128, 160, 192, 256))
    kv_heads, sequences = rng.choice((1, 1, 2)), rng.randint(1, 5)
    heads = kv_heads * rng.choice((1, 2))

    def lengths() -> list[int]:
        return [rng.choice((0, 1, 2, 5, 15, 16, 17, 31, 33, 63, 65, 97, 128, 129, 200, 257, 330)) for _ in range(sequences)]

    lengths_k = None if rng.random() < 0.6 else lengths()
    layouts = [None, *LAYOUTS] if head_dim % 8 == 0 else [None, "half_hwhw"] if head_dim % 4 == 0 else [None]
    return AttentionCase(
        "random",
        lengths(),
        heads=heads,
        head_dim=head_dim,
        kv_heads=kv_heads,
        layout=rng.choice(layouts),
        lengths_k=lengths_k,
        slack=rng.choice((0, 0, 3)),
        packed_qkv=lengths_k is None and kv_heads == heads and rng.random() < 0.5,
        magnitude=rng.choice((1e-2, 0.1, 1.0, 1.0, 1.0, 3.0, 10.0)),
        scale=rng.choice((None, None, 0.3, -0.3)),
        seed=rng.randrange(10**6),
    )


def beyond_budget(case: AttentionCase, dtype: torch.dtype) -> str | None:
    """What is, or None."""
    try:
        if case.magnitude < 3:
            check_rope_attention(case, dtype, "cpu")
        else:  # near ties decide the largest error of a draw
            check_median_error(dataclasses.replace(case, seed=0), dtype, "cpu")
    except AssertionError as error:
        return str(error)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sets = _native.INSTRUCTION_SETS
    parser.add_argument("--sets", nargs="+", choices=sets, default=sets, help="those the processor lacks are left out")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--calls", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    builds = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.sets:
            try:
                builds.append(Build(f"now:{name}", Path(folder)))
            except ValueError as error:
                print(f"left out: {error}")
    if not builds:
        parser.error("none of the sets can be used here")
    print("rms error of scores by head size:", *HEAD_DIMS)
    print(f"{'plain PyTorch':16s}", *(f"{rms_of_torch(d, dtype):.2f}" for d in HEAD_DIMS))
    for build in builds:
        with build.in_place():
            print(f"{build.instruction_set:16s}", *(f"{rms_of_kernel(d, dtype):.2f}" for d in HEAD_DIMS))
    for build in builds:
        rng, beyond = random.Random(arguments.seed), 0
        with build.in_place():
            for _ in range(arguments.calls):
                case = random_case(rng)
                wrong = beyond_budget(case, dtype)
                if wrong is not None:
                    beyond += 1
                    print(f"    {wrong}: {case}")
        print(f"{build.instruction_set}: {beyond} of {arguments.calls} random calls beyond their budget", flush=True)


if __name__ == "__main__":
    main()
