"""Samples from files to batches: datasets, mixtures, images, the chat template, packing, the loader."""
