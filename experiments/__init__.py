"""Experiments: programs that train and generate; flags live here."""
