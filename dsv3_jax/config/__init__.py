"""Configuration of a run: frozen dataclasses that validate themselves.

A config holds numbers and names only (no mesh, array or function), is hashable
and therefore a static argument of `jit`. `override` applies `a.b=value`
assignments and reports all their problems at once.
"""

from dsv3_jax.config.data import (
  CONVERSATIONS,
  PREFERENCES,
  SUPERVISED,
  TASKS,
  Data,
)
from dsv3_jax.config.grpo import SAMPLER, TRAINER, Grpo
from dsv3_jax.config.model import (
  MLA,
  MTP,
  ROUTER_SCORES,
  Attention,
  Model,
  MoE,
  Router,
  Yarn,
)
from dsv3_jax.config.overrides import (
  Setting,
  default_settings,
  describe,
  diff,
  flatten,
  override,
  with_current_names,
)
from dsv3_jax.config.run import (
  ACTIVATIONS,
  BatchPhase,
  Checkpoint,
  Evaluate,
  Optim,
  Parallel,
  Precision,
  Run,
  Schedule,
  Train,
)
