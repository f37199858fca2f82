"""Settings of the network: sizes, and rules for routing and balancing.

Sections 2.1, 2.2 and 4.2 of arXiv:2412.19437.
"""

import dataclasses
import math
from collections.abc import Iterator

from dsv3_jax.config import fields
from dsv3_jax.config.fields import choice, number, plain


@fields.checked
class Yarn:
  """Extension of the context by YaRN (section 4.3; arXiv:2309.00071)."""

  factor: float = number(
    1.0, low=1, doc="how many times longer the context becomes; 1: no extension"
  )
  original_len: int = number(4096, low=1, doc="context length of pre-training")
  beta_fast: float = number(
    32.0, above=0, doc="pairs that turn more often keep their frequency"
  )
  beta_slow: float = number(
    1.0, above=0, doc="pairs that turn less often are slowed by `factor`"
  )
  mscale: float = number(
    1.0, low=0, doc="growth of the softmax scale with `factor`; V2: 0.707"
  )

  def validate(self) -> Iterator[str]:
    if self.beta_fast < (slow := self.beta_slow):
      yield (
        f"Yarn.beta_fast={self.beta_fast:g}: must be at least"
        f" beta_slow={slow:g}"
      )

  @property
  def max_len(self) -> float:
    """The longest context; infinite without extension."""
    return self.factor * self.original_len if self.factor > 1 else math.inf


@fields.checked
class Attention:
  """Base of the settings of an attention, which `Model.attention` holds.

  A subclass is a `fields.checked` class whose `type` is the name of its
  functions in `model/attentions.py` and the key of its parameters.
  """

  type: str
  n_heads: int = number(low=1, doc="heads; the mesh axis model divides them")

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

  type: str = plain("mla", "attention, a name of model/attentions.py")
  q_rank: int = number(
    low=0, doc="rank of the queries; 0: not compressed (V2-Lite)"
  )
  kv_rank: int = number(low=1, doc="rank of keys and values, which is cached")
  nope_dim: int = number(low=1, doc="dims of a head's query without position")
  rope_dim: int = number(
    low=2, high=65_536, doc="dims of a head's query with RoPE; even"
  )
  v_dim: int = number(low=1, doc="dims of a head's value")
  rope_theta: float = number(10_000.0, above=0, doc="base of RoPE")
  yarn: Yarn = Yarn()
  # DeepSeek's code has a constant for it.
  norm_eps: float = number(1e-6, above=0, doc="epsilon of the latents' norms")

  def validate(self) -> Iterator[str]:
    if (dim := self.rope_dim) % 2:
      pairs = f"must be even, components rotate in pairs; try {dim + 1}"
      yield f"MLA.rope_dim={dim}: {pairs}"
    if self.yarn.factor > 1 >= self.rope_theta:
      yield (
        f"MLA.rope_theta={self.rope_theta:g}: must be above 1 with YaRN, which"
        " tells pairs apart by how fast they turn"
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


# Allowed values of `Router.score`; `model/router.py` sets them from its table.
ROUTER_SCORES = ["sigmoid", "softmax"]


@fields.checked
class Router:
  """Expert choice, its loss-free balancing, and balance loss (2.1.2)."""

  n_experts: int = number(low=1, high=100_000, doc="routed experts of a layer")
  top_k: int = number(low=1, doc="experts chosen for a token")
  n_groups: int = number(1, low=1, doc="groups of experts; 1: no groups")
  top_groups: int = number(1, low=1, doc="groups that a token may choose from")
  score: str = dataclasses.field(
    default="sigmoid",
    metadata={
      "choices": ROUTER_SCORES,
      "doc": "affinities from logits; V3: sigmoid, V2: softmax",
    },
  )
  renormalize: bool = plain(True, "weights of the chosen experts sum to 1")
  scale: float = number(2.5, above=0, doc="factor of the experts' weights")
  bias_speed: float = number(
    0.001, low=0, doc="gamma, step of the load-balancing bias; 0: none"
  )
  balance_weight: float = number(
    1e-4, low=0, doc="alpha, weight of the balance loss in a sequence"
  )
  balance_map: str = choice(
    "scores", "routed", doc="what the balance loss counts by f_i (eq. 18)"
  )

  def validate(self) -> Iterator[str]:
    experts, groups, top = self.n_experts, self.n_groups, self.top_groups
    eligible = top * (experts // groups)
    if experts % groups:
      divisors = [str(g) for g in range(1, experts + 1) if experts % g == 0]
      must = f"must divide n_experts={experts}; {', '.join(divisors)} do"
      yield f"Router.n_groups={groups}: {must}"
    elif top > groups:
      yield f"Router.top_groups={top}: must be at most n_groups={groups}"
    elif self.top_k > eligible:
      yield (
        f"Router.top_k={self.top_k}: must be at most {eligible}, the experts in"
        f" top_groups={top} of n_groups={groups} groups of n_experts={experts}"
      )


@fields.checked
class MoE:
  """Sizes of the experts of an MoE layer."""

  n_shared: int = number(1, low=0, doc="shared experts, which see all tokens")
  ffn_dim: int = number(low=1, doc="width of an expert")


@fields.checked
class MTP:
  """Multi-token prediction (section 2.2)."""

  depth: int = number(
    1, low=0, high=100, doc="MTP modules, further tokens predicted; 0: none"
  )
  weight: float = number(0.3, low=0, doc="lambda, weight of the MTP loss")
  late_weight: float = number(0.1, low=0, doc="lambda after schedule.mtp_until")
  input_state: str = choice(
    "post_norm",
    "pre_norm",
    doc="depth 1 reads the state after, or before, the model's last norm",
  )
  trains_trunk: bool = plain(
    True, "the MTP loss has a gradient for the main model too"
  )


@fields.checked
class Model:
  """The whole network."""

  vocab_size: int = number(low=4, doc="token ids, the rows of the embedding")
  d_model: int = number(low=1, doc="width of the residual stream")
  n_layers: int = number(low=1, high=10_000, doc="layers, without MTP modules")
  n_dense_layers: int = number(low=0, doc="first layers, which have no experts")
  dense_ffn_dim: int = number(low=1, doc="feed-forward width of those layers")
  attention: Attention
  moe: MoE
  router: Router
  mtp: MTP = MTP()
  norm_eps: float = number(1e-6, above=0, doc="epsilon of the RMSNorms")
  init_std: float = number(
    0.006, above=0, doc="standard deviation of initial weights"
  )
  reward_head: bool = plain(
    False, "scalar head: a reward model, trained on pairs of answers"
  )

  def validate(self) -> Iterator[str]:
    dense, layers = self.n_dense_layers, self.n_layers
    if dense > layers:
      yield f"Model.n_dense_layers={dense}: must be at most n_layers={layers}"

  @property
  def n_moe_layers(self) -> int:
    """The number of MoE layers of the main model."""
    return self.n_layers - self.n_dense_layers

  @property
  def n_routers(self) -> int:
    """The number of MoE layers of main model and MTP modules together."""
    return self.n_moe_layers + self.mtp.depth
