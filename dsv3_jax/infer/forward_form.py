"""Forms of the forward pass with a KV cache, and the choice between them.

All compute the same; XLA's works everywhere.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from absl import logging

from dsv3_jax import config
from dsv3_jax.errors import InputError
from dsv3_jax.infer import cached_forward
from dsv3_jax.infer.inference_params import InferenceParams
from dsv3_jax.model import moe

try:
  from dsv3_jax.infer import native
except ImportError:
  native = None

AUTO = "auto"


@dataclasses.dataclass(frozen=True)
class ForwardForm:
  """Functions of a form; signatures are those of `cached_forward`."""

  name: str
  forward: Callable[..., Any]
  forward_mtp: Callable[..., Any]
  logits: Callable[..., Any]
  experts: moe.Experts | None = None  # None: all on this device
  max_tokens: float = math.inf  # of each row, that it reads at a time
  skips_idle_rows: bool = False  # rows that are not valid cost nothing


XLA = ForwardForm(
  "xla",
  cached_forward.forward,
  cached_forward.forward_mtp,
  cached_forward.logits,
)
NATIVE = "native"
NAMES = (AUTO, XLA.name, NATIVE)


def choose(
  name: str, params: InferenceParams, cfg: config.Model, *, divided: bool
) -> ForwardForm:
  """Returns the form of a name, AUTO the fastest; a log line says which.

  Args:
    name: one of NAMES.
    params: what it reads.
    cfg: the model.
    divided: whether the parameters are divided over devices.

  Raises:
    InputError: NATIVE is asked for, and cannot be had; says why.
  """
  if name == XLA.name:
    return XLA
  form = _load_native(params, cfg, divided)
  if isinstance(form, ForwardForm):
    logging.info("decoding with the native kernel, the fastest on a CPU")
    return form
  if name == NATIVE:
    raise InputError(f"form={name}: {form}; {XLA.name} works everywhere")
  logging.info("decoding with XLA's operations: %s", form)
  return XLA


def _load_native(
  params: InferenceParams, cfg: config.Model, divided: bool
) -> ForwardForm | str:
  """Returns the native form, or a sentence on why it cannot be had."""
  if native is None:
    return "this installation has no native kernel"
  if divided:
    return "the native kernel does not divide a model over devices"
  try:
    kernel = native.load(params, cfg)
  except native.Unavailable as error:
    return str(error)
  return ForwardForm(
    NATIVE,
    kernel.forward,
    kernel.forward_mtp,
    kernel.logits,
    max_tokens=native.MAX_TOKENS,
    skips_idle_rows=True,
  )
