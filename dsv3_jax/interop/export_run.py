"""Opens the parameters of a workdir for export."""

import pathlib
from typing import Any

import numpy as np

from dsv3_jax import param_spec
from dsv3_jax.data import tokenizer
from dsv3_jax.errors import InputError
from dsv3_jax.interop import (
  hf_config,
  hf_import,
  hf_mapping,
  hf_write,
  open_run,
)
from dsv3_jax.parallel import device_mesh


def open_source(
  workdir: pathlib.Path, *, average: bool
) -> tuple[hf_write.ParamSource, dict[str, Any]]:
  """Returns the parameters of a run or an import, and their config.json.

  Args:
    workdir: the folder of the run.
    average: take the moving average of a run's parameters instead.

  Raises:
    InputError: the workdir holds no run, the run has no average, or a
      released checkpoint cannot express it.
    MissingError: the run has no checkpoint.
  """
  run = open_run.run_from_config(open_run.read_config(workdir))
  if (workdir / hf_import.FOLDER).is_dir():
    if average:
      raise InputError(f"--ema: {workdir} is imported and has no average")
    source = hf_import.open_import(workdir)
    return source, source.config_json
  params, bias = open_run.load_newest_params(
    workdir, run, device_mesh.make_mesh({}), average=average
  )
  arrays = {
    path: np.asarray(a)
    for path, a in param_spec.flatten_with_paths(params).items()
  }
  arrays[hf_mapping.BIAS] = np.asarray(bias)
  score = run.model.router.score
  if not hf_config.has_router_bias(score) and arrays[hf_mapping.BIAS].any():
    raise InputError(
      f"router.score={score} with a bias that is not 0: the format of V2 has"
      " none; train with router.bias_speed=0"
    )
  config_json = hf_config.make_config_json(run) | {
    "torch_dtype": "float32",
    "bos_token_id": tokenizer.BOS_ID,
    "eos_token_id": tokenizer.EOS_ID,
    "pad_token_id": tokenizer.PAD_ID,
  }
  return hf_write.ParamArrays(run.model, arrays), config_json
