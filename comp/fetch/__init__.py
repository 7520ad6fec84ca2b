"""Data and weights from package registries: the recipe `smollm2` and the probes of frozen encoders."""
