"""Trains a run in a workdir: `Trainer(run, workdir).fit()`."""

from dsv3_jax.trainer.run_args import RunArgs
from dsv3_jax.trainer.trainer import FitResult, Trainer

__all__ = ["FitResult", "RunArgs", "Trainer"]
