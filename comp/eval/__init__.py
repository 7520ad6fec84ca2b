"""Scores of a model: answers to visual questions (benchmarks, metrics, harness adapter), and what its tower knows of pages."""
