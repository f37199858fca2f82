"""A training run in a workdir."""
