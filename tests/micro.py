"""A workdir with the smallest model that has every mechanism."""

import jax
import numpy as np
import testing

from dsv3_jax.checkpoint import checkpointer
from dsv3_jax.data import tokenizer
from dsv3_jax.trainer import workdir

TEXTS = ("It was a bright cold day in April.", "你好，世界。 1984 + 1\n")


def make(folder, *assignments):
  """A workdir with a checkpoint of random parameters and a tokenizer.

  Returns:
    The run, its state and the tokenizer.
  """
  run = testing.run("precision.recipe=fp32", *assignments)
  state = testing.state(run)
  rng = np.random.default_rng(0)
  bias = rng.normal(size=state.router_bias.shape).astype(np.float32)
  state = state.replace(router_bias=jax.numpy.asarray(bias))
  checkpoints = checkpointer.Checkpointer(
    folder / "checkpoints", run.checkpoint
  )
  average = jax.tree.map(lambda a: a + 1, state.params)
  average = average if run.optim.ema_decay else None
  checkpoints.save(state, {}, average)
  checkpoints.wait()
  checkpoints.close()
  workdir.write_config(folder, workdir.run_identity("test", 0, run))
  (folder / "data").mkdir()
  tok = tokenizer.train(TEXTS * 20, 300)
  tokenizer.save(tok, folder / "data" / "tokenizer.json")
  return run, state, tok
