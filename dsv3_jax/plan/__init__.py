"""Cost of a run before it is started: parameters and FLOPs."""
