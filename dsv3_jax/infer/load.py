"""Opens the folder of a run, or of a released checkpoint, to generate texts.

model = load.open_model("runs/demo")
for text in model.generator().generate("It is a truth"):
  print(text, end="", flush=True)
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from dsv3_jax import config, display, param_spec
from dsv3_jax.data import tokenizer
from dsv3_jax.errors import InputError, raise_problems
from dsv3_jax.infer import (
  engine,
  engine_options,
  generate,
  inference_params,
  serving_mesh,
  serving_params,
)
from dsv3_jax.infer.engine_options import EngineOptions
from dsv3_jax.infer.inference_params import InferenceParams
from dsv3_jax.infer.request import GenerationRequest
from dsv3_jax.interop import hf_read, load_sharded, open_run, tokenizer_files
from dsv3_jax.interop.tokenizer_files import GenerationDefaults
from dsv3_jax.linear import recipe as recipe_lib
from dsv3_jax.model import transformer
from dsv3_jax.parallel import device_mesh
from dsv3_jax.plan import flops, memory

Params = tuple[param_spec.Params, jax.Array]  # and router bias, in float32


@dataclasses.dataclass(frozen=True, repr=False)
class LoadedModel(display.Table):
  """The model and tokenizer of a folder; parameters are read by `generator`."""

  model: config.Model
  tok: tokenizers.Tokenizer
  defaults: GenerationDefaults
  notes: tuple[str, ...]  # messages for the user
  # Reads parameters onto a mesh, or one device; MTP modules only if asked to.
  read_params: Callable[[serving_mesh.ServingMesh | None, bool], Params]
  folder: pathlib.Path
  variant: str  # of a run, or the type of a released model

  def _rows(self) -> dict[str, object]:
    longest = self.model.attention.max_len
    return {
      "folder": self.folder,
      "variant": self.variant,
      **flops.describe(self.model),
      "tokenizer": f"{tokenizer.n_ids(self.tok):,} ids",
      "context": "unlimited" if longest == math.inf else f"{longest:,.0f}",
      "notes": "; ".join(self.notes) or "none",
    }

  def validate(
    self, options: EngineOptions, *requests: GenerationRequest
  ) -> list[str]:
    """Lists what is wrong with options or requests; reads no parameters."""
    cfg = self._served_config(options)
    problems = engine_options.validate_options(cfg, options)
    for request in () if problems else requests:
      try:
        request = generate.tokenize(self.tok, request, self.defaults)
        problems += engine_options.validate_request(cfg, options, request)
      except InputError as error:
        problems += str(error).splitlines()
    return problems

  def generator(
    self, options: EngineOptions | None = None
  ) -> generate.Generator:
    """Reads parameters, each device its part alone; returns a generator.

    Raises:
      InputError: an option is out of range, parameters cannot be read, or the
        devices have not the memory for them.
      manifest.MissingError: the run has no checkpoint.
    """
    options = options or EngineOptions()
    raise_problems(self.validate(options))
    cfg, mesh = self._served_config(options), None
    if options.serving:
      mesh = serving_mesh.make_serving_mesh(options.serving, cfg)
    _check_memory(cfg, options.dtype, mesh)
    params, bias = self.read_params(mesh, cfg.mtp.depth > 0)
    if not cfg.mtp.depth:
      params.pop("mtp", None)
    bias = bias[: cfg.n_routers]
    if not mesh:
      params, bias = jax.tree.map(
        lambda a: a.addressable_data(0), (params, bias)
      )
    if not mesh and options.dtype == "float32":
      params = _convert_on_host(params, bias, cfg)
    else:
      recipe = engine_options.DTYPES[options.dtype]
      params = _convert(params, bias, cfg=cfg, recipe=recipe)
    served = engine.Engine(params, cfg, options, mesh=mesh)
    return generate.Generator(served, self.tok, self.defaults)

  def _served_config(self, options: EngineOptions) -> config.Model:
    """Returns the model that is served: with MTP modules only if they draft."""
    if options.n_drafts:
      return self.model
    return config.override(self.model, "mtp.depth=0")


def _check_memory(
  cfg: config.Model, dtype: str, mesh: serving_mesh.ServingMesh | None
) -> None:
  """Raises InputError if there is no room for parameters as read and served."""
  specs = serving_params.load_specs(cfg, mesh)
  read = load_sharded.sharded(transformer.specs(cfg), specs, _devices(mesh))
  layers = {name: read[name] for name in ("dense", "moe") if name in read}
  # Layers are served apart, in copies; what is not stacked may be as read.
  copied = memory.bytes_per_device(layers) * jnp.dtype(dtype).itemsize / 4
  memory.check_fits(
    f"the parameters in float32 as they are read, and in {dtype}",
    memory.bytes_per_device(read) + copied,
    _devices(mesh).local_devices,
    "--dtype=bfloat16 needs less, --mesh=expert=N divides them",
  )


def _convert_on_host(
  params: param_spec.Params, bias: jax.Array, cfg: config.Model
) -> InferenceParams:
  """Converts without a program to compile; on a CPU most arrays are views."""
  arrays = jax.tree.map(np.asarray, (params, bias))
  return jax.device_put(inference_params.from_params(*arrays, cfg))


@jax.jit(static_argnames=("cfg", "recipe"))
def _convert(
  params: param_spec.Params, bias: jax.Array, *, cfg: config.Model, recipe: str
) -> InferenceParams:
  precision = config.Precision(recipe=recipe)
  params = recipe_lib.compute_params(params, transformer.specs(cfg), precision)
  return inference_params.from_params(params, bias, cfg)


def open_model(
  folder: str | pathlib.Path,
  *,
  average: bool = False,
  ignore_auto_map: bool = False,
  follow_links: bool = False,
) -> LoadedModel:
  """Opens a folder: reads its configuration and tokenizer, no parameters.

  Args:
    folder: of a run with a checkpoint or imported parameters, or of a released
      checkpoint in safetensors.
    average: read the average of a run's parameters instead.
    ignore_auto_map, follow_links: see `hf_read.open_folder`.

  Raises:
    InputError: it does not hold a model and its tokenizer.
  """
  folder = pathlib.Path(folder)
  if (folder / hf_read.INDEX).exists() or (folder / hf_read.SINGLE).exists():
    if average:
      raise InputError(f"{folder}: a released checkpoint has no average")
    source = hf_read.open_folder(
      folder, ignore_auto_map=ignore_auto_map, follow_links=follow_links
    )
    path, model = folder / tokenizer_files.TOKENIZER, source.model
    defaults = tokenizer_files.read_defaults(folder, source.config_json)
    notes = source.notes + defaults.notes
    variant = str(source.config_json.get("model_type"))

    def read_params(mesh, drafting):
      served = source if drafting else source.without_mtp()
      specs = serving_params.load_specs(served.model, mesh)
      return load_sharded.load(served, specs, _devices(mesh), np.float32)

  else:
    metadata = open_run.read_config(folder)
    run, variant = open_run.run_from_config(metadata), metadata["variant"]
    path, model = folder / "data" / tokenizer_files.TOKENIZER, run.model
    if model.reward_head:
      raise InputError(
        f"{folder}: is a reward model, which scores answers and writes none;"
        " experiments.sample --rewards=model --reward_model=DIR uses it"
      )
    defaults = open_run.read_defaults(folder)
    notes = defaults.notes

    def read_params(mesh, drafting):
      del drafting  # a checkpoint is verified as a whole
      specs = serving_params.load_specs(run.model, mesh)
      return open_run.load_newest_params(
        folder, run, _devices(mesh), average=average, specs=specs
      )

  problems = GenerationRequest("", **defaults.settings).validate()
  raise_problems(problems, f"{folder}: {tokenizer_files.GENERATION}: ")
  tok = tokenizer.load(path)
  tokenizer.check_fits(tok, model.vocab_size)
  return LoadedModel(model, tok, defaults, notes, read_params, folder, variant)


def _devices(mesh: serving_mesh.ServingMesh | None) -> jax.sharding.Mesh:
  return mesh.mesh if mesh else device_mesh.make_mesh({})
