"""How much the fuzz tests try: the same examples in every run, or as many new ones as `pytest --fuzz N` asks for."""

import os

from hypothesis import HealthCheck, settings


def budget(examples: int) -> settings:
    """Decorator of a fuzz test. `examples` are a fixed choice, meant for some 20 seconds on one core."""
    wanted = int(os.environ.get("FUZZ_EXAMPLES", 0))
    return settings(
        max_examples=wanted or examples,
        derandomize=not wanted,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )
