"""The truth about a GPU in ten minutes, part by part: `python -m benchmarks.gpu_session`."""
