"""Evaluation of a run: answers to visual questions, frozen probes, sweeps and the report page."""
