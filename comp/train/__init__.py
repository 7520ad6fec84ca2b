"""Training: the trainer, its step and optimiser, checkpoints, and what a run leaves on disk."""
