"""Table of attentions: the functions of each, by the `type` of its settings.

The rest of the code knows an attention by this table alone. A new one is a file
with its settings (a subclass of `config.Attention`) and its functions, and an
entry here; docs/extend.md has an example.
"""

import dataclasses
from collections.abc import Callable

import jax

from dsv3_jax import config, param_spec
from dsv3_jax.model import mla, mla_decode


def _same(tree: param_spec.Specs, cfg: config.Attention) -> param_spec.Specs:
  """The parameters of training, or their specs, unchanged."""
  del cfg
  return tree


@dataclasses.dataclass(frozen=True)
class Attention:
  """Functions of an attention; `cfg` is its settings.

  `decode` and `prefill` take (p, x [B, T, D], cache [B, S, ...], start [B],
  cfg), write positions start .. start + T - 1, and return y [B, T, D] and the
  cache. `decode` is for a few tokens of each row, `prefill` for a chunk of a
  prompt, whose length is at most 128 or a multiple of that.
  """

  specs: Callable[..., param_spec.Specs]  # (cfg, d_model, init_std)
  # (p, x [B, T, D], cfg, segments [B, T] or None) -> [B, T, D]
  forward: Callable[..., jax.Array]
  # (cfg) -> ((logical axis, size), ...) of what a cache holds per position
  cache_spec: Callable[..., tuple[tuple[str, int], ...]]
  decode: Callable[..., tuple[jax.Array, jax.Array]]
  prefill: Callable[..., tuple[jax.Array, jax.Array]] | None = None  # decode
  # (p, cfg): parameters as `decode` and `prefill` read them; and their specs
  inference_params: Callable[..., param_spec.Params] = _same
  inference_specs: Callable[..., param_spec.Specs] = _same


ATTENTIONS = {
  "mla": Attention(
    mla.specs,
    mla.mla,
    mla_decode.cache_spec,
    mla_decode.decode,
    mla_decode.prefill,
    mla_decode.inference_params,
    mla_decode.inference_specs,
  )
}


def functions(cfg: config.Attention) -> Attention:
  """The functions that belong to settings."""
  return ATTENTIONS[cfg.type]
