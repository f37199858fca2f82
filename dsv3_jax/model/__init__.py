"""The network: pure functions over nested dicts of parameters."""
