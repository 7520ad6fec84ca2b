"""Ablations in small: the default run with one part left out or changed, over seeds."""
