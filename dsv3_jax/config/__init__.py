"""Configuration of a run: frozen dataclasses that validate themselves.

A config holds numbers and names only (no mesh, array or function), is hashable
and therefore a static argument of `jit`. `override` applies `a.b=value`
assignments and reports all their problems at once.
"""

from dsv3_jax.config.model import MLA
from dsv3_jax.config.model import MTP
from dsv3_jax.config.model import Model
from dsv3_jax.config.model import MoE
from dsv3_jax.config.model import Router
from dsv3_jax.config.model import Yarn
from dsv3_jax.config.overrides import defaults
from dsv3_jax.config.overrides import difference
from dsv3_jax.config.overrides import leaves
from dsv3_jax.config.overrides import override
from dsv3_jax.config.run import ACTIVATIONS
from dsv3_jax.config.run import Checkpoint
from dsv3_jax.config.run import Data
from dsv3_jax.config.run import Evaluate
from dsv3_jax.config.run import Optim
from dsv3_jax.config.run import Parallel
from dsv3_jax.config.run import Phase
from dsv3_jax.config.run import Precision
from dsv3_jax.config.run import Run
from dsv3_jax.config.run import Schedule
from dsv3_jax.config.run import Train

__all__ = [
    "ACTIVATIONS",
    "MLA",
    "MTP",
    "Checkpoint",
    "Data",
    "Evaluate",
    "Model",
    "MoE",
    "Optim",
    "Parallel",
    "Phase",
    "Precision",
    "Router",
    "Run",
    "Schedule",
    "Train",
    "Yarn",
    "defaults",
    "difference",
    "leaves",
    "override",
]
