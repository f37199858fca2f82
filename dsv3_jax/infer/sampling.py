"""Choosing a token from logits."""

import jax
import jax.numpy as jnp


def sample(
    logits: jax.Array, key: jax.Array, temperature: float, top_p: float
) -> jax.Array:
  """Token ids [B] from logits [B, C].

  Args:
    logits: [B, C] f32.
    key: PRNG key.
    temperature: 0 takes the most likely token.
    top_p: the smallest set of most likely tokens with at least this
      probability is sampled from, in (0, 1].
  """
  if temperature == 0:
    return logits.argmax(-1)
  logits = logits / temperature
  if top_p < 1:
    order = jnp.argsort(-logits, axis=-1)
    sorted_p = jnp.take_along_axis(jax.nn.softmax(logits), order, axis=-1)
    before = jnp.cumsum(sorted_p, axis=-1) - sorted_p
    # The most likely token has nothing before it and always stays.
    kept = jnp.take_along_axis(before < top_p, jnp.argsort(order), axis=-1)
    logits = jnp.where(kept, logits, -jnp.inf)
  return jax.random.categorical(key, logits)
