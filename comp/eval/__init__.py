"""Answers to visual questions: benchmarks, metrics, and the harness adapter."""
