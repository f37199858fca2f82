"""The network: sizes, and rules for routing and balancing.

Sections 2.1, 2.2 and 4.2 of arXiv:2412.19437.
"""

import dataclasses
import math
from collections.abc import Iterator

from dsv3_jax.config import fields
from dsv3_jax.config.fields import choice, number


@fields.checked
class Yarn:
  """Longer contexts after pre-training (section 4.3; arXiv:2309.00071)."""

  factor: float = number(1.0, low=1)  # 1: none
  original_len: int = number(4096, low=1)  # tokens of pre-training's rows
  beta_fast: float = number(32.0, above=0)
  beta_slow: float = number(1.0, above=0)
  mscale: float = number(1.0, low=0)  # V2 has 0.707

  @property
  def max_len(self) -> float:
    """The longest context; without extension there is none."""
    return self.factor * self.original_len if self.factor > 1 else math.inf


@fields.checked
class Attention:
  """Base of the settings of an attention, which `Model.attention` holds.

  A subclass is a `fields.checked` class with a field `type`, its name: it picks
  the functions in `model/attentions.py`, and is the key of its parameters.
  """

  type: str
  n_heads: int = number(low=1)  # divided over the mesh axis `model`

  @property
  def max_len(self) -> float:
    """The longest context that the settings allow."""
    return math.inf


def attention_types() -> dict[str, type[Attention]]:
  """Settings classes by the name of their attention."""
  return {cls.type: cls for cls in Attention.__subclasses__()}


@fields.checked
class MLA(Attention):
  """Multi-head latent attention (section 2.1.1)."""

  type: str = "mla"
  q_rank: int = number(low=0)  # 0: no query compression (V2-Lite)
  kv_rank: int = number(low=1)
  nope_dim: int = number(low=1)
  rope_dim: int = number(low=2)
  v_dim: int = number(low=1)
  rope_theta: float = number(10_000.0, above=0)
  yarn: Yarn = Yarn()
  # Of the latents' norms: DeepSeek's code has this number whatever the others.
  norm_eps: float = number(1e-6, above=0)

  def relations(self) -> Iterator[str]:
    if self.rope_dim % 2:
      yield (
        f"MLA.rope_dim={self.rope_dim}: must be even, components rotate in"
        f" pairs; try {self.rope_dim + 1}"
      )

  @property
  def qk_dim(self) -> int:
    return self.nope_dim + self.rope_dim

  @property
  def max_len(self) -> float:
    """The longest context that YaRN extends to; infinite without YaRN."""
    return self.yarn.max_len

  @property
  def softmax_divisor(self) -> float:
    """The divisor of attention scores, 1 / softmax_scale; YaRN lowers it."""
    root_t = 0.1 * self.yarn.mscale * math.log(self.yarn.factor) + 1
    return math.sqrt(self.qk_dim) / root_t**2


# Names that `Router.score` may have; `model/router.py` adds those of its table.
ROUTER_SCORES = ["sigmoid", "softmax"]


@fields.checked
class Router:
  """Expert choice, its loss-free balancing and the balance loss (2.1.2)."""

  n_experts: int = number(low=1)
  top_k: int = number(low=1)
  n_groups: int = number(1, low=1)
  top_groups: int = number(1, low=1)
  score: str = dataclasses.field(  # softmax: DeepSeek-V2's gate
    default="sigmoid", metadata={"choices": ROUTER_SCORES}
  )
  renormalize: bool = True
  scale: float = number(2.5, above=0)
  bias_speed: float = number(0.001, low=0)  # gamma
  balance_weight: float = number(1e-4, low=0)  # alpha
  balance_map: str = choice("scores", "routed")  # what f_i counts, eq. 18

  def relations(self) -> Iterator[str]:
    experts, groups = self.n_experts, self.n_groups
    if experts % groups:
      fits = [g for g in range(1, experts + 1) if experts % g == 0]
      yield (
        f"Router.n_groups={groups}: must divide n_experts={experts}; "
        f"{', '.join(map(str, fits))} do"
      )
    elif self.top_groups > groups:
      yield (
        f"Router.top_groups={self.top_groups}: must be at most"
        f" n_groups={groups}"
      )
    elif self.top_k > self.top_groups * (experts // groups):
      yield (
        f"Router.top_k={self.top_k}: must be at most"
        f" {self.top_groups * (experts // groups)}, the experts in"
        f" top_groups={self.top_groups} of n_groups={groups} groups of"
        f" n_experts={experts}"
      )


@fields.checked
class MoE:
  """Sizes of the experts of a mixture layer."""

  n_shared: int = number(1, low=0)
  ffn_dim: int = number(low=1)


@fields.checked
class MTP:
  """Multi-token prediction (section 2.2)."""

  depth: int = number(1, low=0, high=100)
  weight: float = number(0.3, low=0)  # lambda
  late_weight: float = number(0.1, low=0)  # lambda after Schedule.mtp_until
  # The hidden state of the main model that depth 1 reads: after or before its
  # last norm.
  input_state: str = choice("post_norm", "pre_norm")


@fields.checked
class Model:
  """The whole network."""

  vocab_size: int = number(low=4)
  d_model: int = number(low=1)
  n_layers: int = number(low=1, high=10_000)
  n_dense_layers: int = number(low=0)
  dense_ffn_dim: int = number(low=1)
  attention: Attention
  moe: MoE
  router: Router
  mtp: MTP = MTP()
  norm_eps: float = number(1e-6, above=0)
  init_std: float = number(0.006, above=0)

  def relations(self) -> Iterator[str]:
    if self.n_dense_layers > self.n_layers:
      yield (
        f"Model.n_dense_layers={self.n_dense_layers}: must be at most"
        f" n_layers={self.n_layers}"
      )

  @property
  def n_moe_layers(self) -> int:
    """MoE layers of the main model."""
    return self.n_layers - self.n_dense_layers

  @property
  def n_routers(self) -> int:
    """MoE layers of the main model and of the MTP modules together."""
    return self.n_moe_layers + self.mtp.depth
