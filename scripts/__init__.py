"""Scripts: tools around runs, checkpoints and benchmarks."""
