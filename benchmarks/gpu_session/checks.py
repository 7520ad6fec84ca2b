"""Whether rope_attention is right on this device: against float64 in every 16-bit dtype, equal bits from run to run."""

from __future__ import annotations

import torch

from comp_kernels.testing import ATTENTION_CASES, AttentionCase, check_median_error, check_rope_attention

from .attention import calls
from .session import Session, backend_of
from .workloads import TINY_CASES


def long_cases() -> list[AttentionCase]:
    """Sequences of several tiles at the head sizes that have kernels of their own on sm_90a."""
    cases = []
    for d in (64, 72, 80, 96, 128):
        cases += [
            AttentionCase(f"mixed_{d}", [1029, 197, 0, 64, 729], head_dim=d, slack=5),
            AttentionCase(f"edges_{d}", [256, 255, 257, 192, 193], head_dim=d, slack=5),
            AttentionCase(f"gqa_{d}", [300, 0, 500], heads=6, kv_heads=2, head_dim=d),
            AttentionCase(f"tables_{d}", [200, 177], heads=4, kv_heads=2, layout="per_head_interleaved", head_dim=d),
            AttentionCase(f"cross_{d}", [300, 0, 177, 400], lengths_k=[129, 555, 0, 700], head_dim=d, slack=7),
            AttentionCase(f"views_{d}", [130, 265], packed_qkv=True, heads=4, head_dim=d),
        ]
    return cases


def checks(session: Session) -> None:
    cases = [*ATTENTION_CASES.values(), *long_cases()]
    if session.tiny:
        cases = [ATTENTION_CASES[name] for name in TINY_CASES]
    for dtype in (torch.bfloat16, torch.float16):
        passed = 0
        for case in cases:
            try:
                if case.name == "logits_of_1e4":  # decided by single roundings of q and k: one draw says nothing
                    check_median_error(case, dtype, backend_of(session), device=session.device)
                else:
                    check_rope_attention(case, dtype, backend_of(session), session.device)
                passed += 1
            except (AssertionError, RuntimeError) as error:
                session.say(case=case.name, dtype=str(dtype), error=str(error)[:300])
        session.say(dtype=str(dtype), passed=passed, of=len(cases))
    for workload in session.workloads:
        _, both = calls(session, workload)
        first = both()
        session.say(workload=workload.name, equal_bits=all(torch.equal(a, b) for _ in range(2) for a, b in zip(first, both())))
