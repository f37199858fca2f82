"""GGUF file of a run, or of random parameters, for llama.cpp."""

import pathlib

import numpy as np

from dsv3_jax import config, param_spec
from dsv3_jax.data import tokenizer
from dsv3_jax.interop import gguf, hf_mapping, hf_write, open_run
from dsv3_jax.interop.tokenizer_files import TOKENIZER
from dsv3_jax.model import transformer

MAX_LEN = 1 << 20  # positions: prompts are as long as the benchmark likes
_TEXT = "It is a truth " * 20  # llama.cpp needs a tokenizer with merges


def _random(model: config.Model) -> hf_write.ParamArrays:
  """Draws parameters; scales of norms are 1, and biases of routers 0."""
  rng = np.random.default_rng(0)

  def draw(spec: param_spec.ParamSpec) -> np.ndarray:
    if spec.axes[-1] == "norm":
      return np.ones(spec.shape, np.float32)
    p = rng.standard_normal(spec.shape, np.float32)
    return np.multiply(p, model.init_std, out=p)

  specs = param_spec.flatten_with_paths(transformer.specs(model))
  arrays = {path: draw(spec) for path, spec in specs.items()}
  shape = model.n_routers, model.router.n_experts
  arrays[hf_mapping.BIAS] = np.zeros(shape, np.float32)
  return hf_write.ParamArrays(model, arrays)


def write(path: pathlib.Path, workdir: str | None, model: config.Model) -> None:
  """Writes a float32 GGUF file of a workdir's run; of None random parameters.

  Raises:
    InputError: the workdir holds no run, or llama.cpp cannot read its model.
    MissingError: the run has no checkpoint.
  """
  if workdir:
    folder = pathlib.Path(workdir)
    source, _ = open_run.open_source(folder, average=False)
    tok = tokenizer.load(folder / "data" / TOKENIZER)
  else:
    source, tok = _random(model), tokenizer.train((_TEXT,), 300)
  export_format = hf_write.ExportFormat(source, "float32")
  gguf.write(export_format, tok, path, MAX_LEN, lambda n_bytes: None)
