"""Memory that nobody wrote shows as NaN (integers: as their largest value) in all tests below a conftest.py with it."""

import pytest
import torch


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan(monkeypatch):
    """torch.empty and its relatives are filled; torch does so in its deterministic mode alone."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
