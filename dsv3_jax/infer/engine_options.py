"""Options of an engine, and the validation of options and requests."""

import dataclasses

import numpy as np

from dsv3_jax import config
from dsv3_jax.errors import InputError
from dsv3_jax.infer import forward_form, kvcache, serving_mesh
from dsv3_jax.infer.request import GenerationRequest

DEFAULT_MAX_LEN = 4096
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}  # and their recipes


@dataclasses.dataclass(frozen=True)
class EngineOptions:
  """Settings of an engine."""

  dtype: str = "float32"  # of parameters and cache, one of DTYPES
  max_batch: int = 8  # slots: requests at the same time
  # Positions of a text, prompt included. None: DEFAULT_MAX_LEN, or the length
  # that YaRN extends to if that is less.
  max_len: int | None = None
  chunk: int = 512  # tokens of a prompt that are read together, a power of two
  n_drafts: int = 0  # tokens that the MTP module drafts in a step
  serving: serving_mesh.ServingConfig | None = None  # None: one device
  rebalance_every: int = 0  # steps between moves of experts; 0: never
  form: str = forward_form.AUTO  # of the forward pass, of `forward_form.NAMES`
  trace: bool = False  # the last event of a text has its `Event.trace`

  def resolve(self, cfg: config.Model) -> "EngineOptions":
    """Fills in the default of `max_len` for a model."""
    if self.max_len is not None:
      return self
    longest = int(min(DEFAULT_MAX_LEN, cfg.attention.max_len))
    return dataclasses.replace(self, max_len=longest)

  def n_positions(self, n: int) -> int:
    """Positions of the cache that a text of n tokens needs."""
    # The last step may write as many positions too many as there are drafts.
    return n + self.n_drafts


def validate_options(
  cfg: config.Model,
  options: EngineOptions,
  mesh: serving_mesh.ServingMesh | None = None,
) -> list[str]:
  """Lists what is wrong with the options of an engine, a line each.

  The mesh is by default the one that the options describe.
  """
  options, problems = options.resolve(cfg), []
  if (dtype := options.dtype) not in DTYPES:
    problems.append(f"dtype={dtype}: must be one of {', '.join(DTYPES)}")
  if (form := options.form) not in (names := forward_form.NAMES):
    problems.append(f"form={form}: must be one of {', '.join(names)}")
  for name in ("max_batch", "max_len"):
    if (value := getattr(options, name)) < 1:
      problems.append(f"{name}={value}: must be at least 1")
  if options.max_len > (longest := cfg.attention.max_len):
    problems.append(
      f"max_len={options.max_len}: must be at most {longest:g}, the length that"
      " the model's attention allows"
    )
  if options.chunk < kvcache.MIN_LENGTH or options.chunk & (options.chunk - 1):
    problems.append(
      f"chunk={options.chunk}: must be a power of two, at least"
      f" {kvcache.MIN_LENGTH}"
    )
  if options.n_drafts < 0:
    problems.append(f"n_drafts={options.n_drafts}: must be at least 0")
  elif options.n_drafts and not cfg.mtp.depth:
    problems.append(
      f"n_drafts={options.n_drafts}: the model has no MTP module to draft with"
      " (mtp.depth=0)"
    )
  every = options.rebalance_every
  if every < 0 or (every and not (mesh or options.serving)):
    problems.append(
      f"rebalance_every={every}: must be at least 0, and 0 without a mesh"
      " that experts are divided over"
    )
  if options.trace and (mesh or options.serving):
    problems.append(
      "trace=True: must be False with a serving mesh; one device (serving=None)"
      " records traces"
    )
  try:
    if options.serving and not mesh:
      mesh = serving_mesh.make_serving_mesh(options.serving, cfg)
    if mesh:
      problems += serving_mesh.validate(mesh, cfg, options.max_batch)
  except InputError as error:
    problems += str(error).splitlines()
  return problems


def validate_request(
  cfg: config.Model, options: EngineOptions, request: GenerationRequest
) -> list[str]:
  """Lists what is wrong with a request in token ids, a line each."""
  options, vocab, problems = options.resolve(cfg), cfg.vocab_size, []
  ids = np.asarray(request.prompt)
  if not ids.size:
    problems.append("prompt: is empty; at least one token is needed")
  elif ids.dtype.kind not in "iu":
    problems.append("prompt: token ids must be integers of 64 bits at most")
  elif ids.min() < 0 or ids.max() >= vocab:
    wrong = ids[(ids < 0) | (ids >= vocab)][0]
    problems.append(f"prompt: token id {wrong} must be in [0, {vocab})")
  problems += request.validate()
  if (needed := len(request.prompt) + request.max_tokens) > options.max_len:
    problems.append(
      f"prompt of {ids.size} tokens with max_tokens={request.max_tokens}:"
      f" needs {needed} positions of the cache, which has at most"
      f" max_len={options.max_len}"
    )
  return problems
