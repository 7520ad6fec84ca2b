"""In every test of this folder memory that no kernel wrote shows as NaN, and no call of another test is remembered."""

import pytest
from unwritten_memory import unwritten_memory_is_nan

from comp_kernels.ops.rope_attention import plan

__all__ = ["unwritten_memory_is_nan"]


@pytest.fixture(autouse=True)
def no_plans_of_other_tests(monkeypatch):
    """They know which backend was chosen: tests change the preference, and kernels."""
    monkeypatch.setattr(plan, "_plans", {})
