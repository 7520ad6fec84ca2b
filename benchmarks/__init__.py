"""Benchmarks: `pytest benchmarks/ --benchmark-only --benchmark-json=runs/bench.json`, then `python -m benchmarks.report`."""
