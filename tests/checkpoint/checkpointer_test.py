"""Tests of saving and restoring, and of what damage does to it."""

import os
import pathlib
import resource
import shutil
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import testing
from absl import logging
from absl.testing import absltest, parameterized

from dsv3_jax import config, train
from dsv3_jax.checkpoint import checkpointer, manifest
from dsv3_jax.errors import NotFiniteError
from dsv3_jax.parallel import device_mesh

RUN = testing.run("optim.moments=bfloat16")
FACTS = {"data": {"seed": 3, "train_text": "5f"}, "rows": 40}


def noisy_state(run=RUN, step=0):
  """A state whose every float differs from every initial one."""
  shapes = jax.eval_shape(lambda: train.init_state(run, jax.random.key(0)))
  rng = np.random.default_rng(step)

  def leaf(s):
    if jnp.issubdtype(s.dtype, jax.dtypes.prng_key):
      return jax.random.key(9)
    return jnp.asarray(rng.normal(size=s.shape, scale=9), s.dtype)

  return jax.tree.map(leaf, shapes).replace(step=jnp.int32(step))


def like(run=RUN):
  return train.abstract_state(run, device_mesh.make_mesh({}))


def damages(path):
  """Ways to damage a file, by name."""
  size = path.stat().st_size
  return {
    "halved": lambda: os.truncate(path, size // 2),
    "zeroed": lambda: path.write_bytes(bytes(size)),
    "emptied": lambda: path.write_bytes(b""),
    "deleted": path.unlink,
  }


def flip(path, rng):
  """Another value of a bit of a byte of a file; says which."""
  raw = bytearray(path.read_bytes())
  place, bit = int(rng.integers(len(raw))), int(rng.integers(8))
  raw[place] ^= 1 << bit
  path.write_bytes(raw)
  return f"{path.name}: bit {bit} of byte {place}"


def files(folder):
  return sorted(path for path in folder.rglob("*") if path.is_file())


class Case(parameterized.TestCase):
  def open(self, folder, **settings):
    store = checkpointer.Checkpointer(folder, config.Checkpoint(**settings))
    self.addCleanup(store.close)
    return store

  def saved(self, *steps, average=None, **settings):
    store = self.open(testing.folder(self) / "checkpoints", **settings)
    for step in steps:
      store.save(noisy_state(step=step), FACTS, average)
    store.wait()
    return store

  def assert_restores(self, store, step):
    """Every bit and the facts."""
    state = store.restore(step, like())
    testing.assert_same(
      testing.host(state), testing.host(noisy_state(step=step))
    )
    self.assertEqual(store.metadata(step), FACTS)


class SaveTest(Case):
  def test_restores_every_bit_and_the_facts(self):
    store = self.saved(40)
    self.assertEqual(store.steps(), [40])
    self.assert_restores(store, 40)

  def test_the_restored_key_draws_the_same(self):
    state = self.saved(1).restore(1, like())
    np.testing.assert_array_equal(
      jax.random.bits(state.key), jax.random.bits(jax.random.key(9))
    )

  def test_restores_parameters_alone(self):
    state = noisy_state(step=1)
    found = self.saved(1).restore_parameters(1, like())
    testing.assert_same(
      *jax.device_get((found, (state.params, state.router_bias)))
    )

  def test_restores_the_average(self):
    average = noisy_state(step=7).params
    store = self.saved(1, average=average)
    found, bias = store.restore_parameters(1, like(), average=True)
    testing.assert_same(*jax.device_get((found, average)))
    testing.assert_same(
      *jax.device_get((bias, noisy_state(step=1).router_bias))
    )

  def test_says_that_there_is_no_average(self):
    with self.assertRaisesRegex(ValueError, "average/params/.*not there"):
      self.saved(1).restore_parameters(1, like(), average=True)

  def test_keeps_the_newest(self):
    self.assertEqual(self.saved(1, 2, 3, keep=2).steps(), [2, 3])

  def test_keeps_every_so_many(self):
    store = self.saved(0, 2, 3, 4, 5, 6, 7, keep=1, keep_every=3)
    self.assertEqual(store.steps(), [0, 3, 6, 7])

  def test_check_says_when_it_is_done(self):
    store = self.saved()
    self.assertIsNone(store.check())
    store.save(noisy_state(step=5), FACTS)
    while (done := store.check()) is None:
      pass
    self.assertEqual(done, 5)
    self.assertIsNone(store.check())
    self.assertEqual(store.steps(), [5])

  @pytest.mark.fault("F29")
  def test_what_is_not_finite_is_not_saved(self):
    store, state = self.saved(1), noisy_state(step=2)
    nu = state.opt_state[1].nu
    bad = nu | {"head": nu["head"].at[3, 2].set(jnp.inf)}
    inner = state.opt_state[1]._replace(nu=bad)
    opt_state = (state.opt_state[0], inner, state.opt_state[2])
    average = state.params | {"norm": state.params["norm"].at[0].set(jnp.nan)}
    for args in (
      (state.replace(opt_state=opt_state), FACTS),
      (state, FACTS, average),
    ):
      with self.assertRaisesRegex(
        NotFiniteError, "2 is not saved.*(head|norm)"
      ):
        store.save(*args)
    self.assertEqual(store.steps(), [1])

  @pytest.mark.fault("F29")
  def test_what_is_not_finite_is_not_restored(self):
    store, state = self.saved(1), noisy_state(step=2)
    # As versions before did.
    with mock.patch.object(checkpointer, "_false", lambda checks: ""):
      store.save(state.replace(router_bias=state.router_bias / 0), FACTS)
      store.wait()
    load = lambda step: store.restore(step, like())
    step, _ = store.newest(load, quarantine=True)
    self.assertEqual(step, 1)
    self.assertTrue((store.directory / "2.corrupt").exists())

  def test_an_empty_folder_has_no_step(self):
    store = self.saved()
    self.assertEqual((store.steps(), store.problems()), ([], {}))
    self.assertIsNone(store.newest(self.fail, quarantine=True))


class RefuseTest(Case):
  @parameterized.parameters(
    ("attention.q_rank=0", r"state/params/.*mla/q_down.*'float32\[.*not there"),
    ("mtp.depth=0", r"state/params/mtp.*not there"),
    ("mtp.depth=2", r"state/params/mtp.*float32\[1,.* -> 'float32\[2,"),
    ("router.n_experts=16", r"state/router_bias: 'float32\[.,8\]' -> "),
    ("optim.moments=float32", r"opt_state.*'bfloat16\[.*' -> 'float32\["),
  )
  @pytest.mark.fault(
    "F18",
    "a checkpoint of another architecture",
    "refused, listing arrays and settings that differ",
  )
  @pytest.mark.fault(
    "F19", "a checkpoint of other dtypes", "refused, never cast"
  )
  def test_another_architecture(self, change, line):
    store = self.saved(1)
    run = config.override(RUN, change)
    with self.assertRaisesRegex(ValueError, "another architecture") as caught:
      store.restore(1, like(run))
    self.assertRegex(str(caught.exception), line)
    self.assertNotIsInstance(caught.exception, checkpointer.DamagedError)
    self.assert_restores(store, 1)

  @pytest.mark.fault(
    "F16",
    "a checkpoint folder partly copied, renamed, of another version",
    "not taken for a checkpoint",
  )
  def test_what_was_never_finished(self):
    store = self.saved(1, 2)
    (store.folder(2) / manifest.NAME).unlink()
    self.assertEqual(store.steps(), [1])
    self.assertRegex(store.problems()[2], "half written or half copied")

  @pytest.mark.fault("F16")
  def test_a_folder_of_another_name(self):
    store = self.saved(1)
    store.folder(1).rename(store.folder(9))
    self.assertRegex(store.problems()[9], "holds step 1")

  @pytest.mark.fault(
    "F22",
    "a checkpoint with unknown files, links, names, a forged manifest",
    "refused; nothing outside is read, no code is run",
  )
  def test_links_and_files_of_others(self):
    store = self.saved(1, 2, 3, keep=9)
    secret = testing.folder(self) / "secret"
    secret.write_text("x")
    (store.folder(1) / "more").symlink_to(secret)
    (store.folder(2) / "array.npy").write_bytes(b"\x93NUMPY")
    data = max(files(store.folder(3)), key=lambda path: path.stat().st_size)
    shutil.move(data, secret)
    data.symlink_to(secret)
    self.assertEmpty(store.steps())
    found = store.problems()
    self.assertRegex(found[1], "more: is neither a file nor a folder")
    self.assertRegex(found[2], "array.npy: 6 bytes, none were written")
    self.assertRegex(found[3], "neither a file nor a folder")

  @parameterized.parameters("05", "-1", "5.0", "٣", "1.corrupt", "last")
  @pytest.mark.fault("F22")
  def test_other_names_are_no_steps(self, name):
    store = self.saved(1)
    (store.directory / name).mkdir()
    self.assertEqual((store.steps(), store.problems()), ([1], {}))

  @pytest.mark.fault("F16")
  def test_a_manifest_of_another_version(self):
    store = self.saved(1)
    path = store.folder(1) / manifest.NAME
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    self.assertRegex(store.problems()[1], "not as it was written")
    testing.reseal(store.folder(1))
    self.assertRegex(store.problems()[1], "of version 2; .* reads 1")

  @parameterized.parameters(
    ({"step": "1"}, "'1' where int is expected"),
    ({"step": True}, "True where int is expected"),
    ({"arrays": []}, r"\[\] where dict is expected"),
    ({"arrays": {"a": {"type": "float32[2]"}}}, "digest"),
    ({"arrays": {"a": {"type": "[2", "digest": ""}}}, "no type of an array"),
    ({"files": {"d": "7"}}, "'7' where int is expected"),
    ({"facts": None}, "None where dict is expected"),
    ({"more": 1}, "more"),
  )
  @pytest.mark.fault("F22")
  def test_a_manifest_that_somebody_else_made(self, change, message):
    store = self.saved(1)
    testing.reseal(store.folder(1), **change)
    self.assertRegex(store.problems()[1], f"cannot be read: .*{message}")

  @pytest.mark.fault("F22")
  def test_a_manifest_without_end(self):
    store = self.saved(1)
    (store.folder(1) / manifest.NAME).write_text("[" * 100_000)
    self.assertRegex(store.problems()[1], "cannot be read: Recursion")


class DamageTest(Case):
  """Damage is found, and the step before is taken."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    folder = cls.enterClassContext(tempfile.TemporaryDirectory())
    cls.kept = pathlib.Path(folder) / "checkpoints"
    store = checkpointer.Checkpointer(cls.kept, config.Checkpoint(keep=9))
    for step in (1, 2):
      store.save(noisy_state(step=step), FACTS)
    store.wait()
    store.close()

  def copy(self):
    folder = testing.folder(self) / "checkpoints"
    shutil.copytree(self.kept, folder)
    return self.open(folder)

  def newest(self, store):
    load = lambda step: store.restore(step, like())
    with self.assertLogs(logging.get_absl_logger(), "ERROR") as logs:
      logging.error("so that there is one")
      found = store.newest(load, quarantine=True)
    return found, "\n".join(logs.output[1:])

  def test_a_copy_is_as_good(self):
    self.assert_restores(self.copy(), 2)

  @pytest.mark.fault(
    "F14",
    "each file of the newest checkpoint truncated, zeroed, emptied, deleted",
    "quarantined with a warning; the previous checkpoint is loaded",
  )
  def test_every_file_damaged(self):
    for i, path in enumerate(files(self.kept / "2")):
      ways = list(damages(path))
      self.check_damage(path, ways[i % len(ways) :][:1])

  @pytest.mark.slow
  @pytest.mark.fault("F14")
  def test_every_file_damaged_in_every_way(self):
    for path in files(self.kept / "2"):
      self.check_damage(path, damages(path))

  def check_damage(self, path, ways):
    for way in ways:
      with self.subTest(f"{path.name} {way}"):
        store = self.copy()
        name = path.relative_to(self.kept)
        damages(store.directory / name)[way]()
        (step, state), said = self.newest(store)
        # Of some of orbax's files nothing is restored.
        expected = testing.host(noisy_state(step=step))
        testing.assert_same(testing.host(state), expected)
        lines = store.repair()
        self.assertTrue(step == 2 or said or lines)
        aside = store.directory / f"2{checkpointer.CORRUPT}"
        self.assertEqual(aside.exists(), step == 1)

  def check_flips(self, seed, n):
    rng = np.random.default_rng(seed)
    found = {True: 0, False: 0}
    everything = files(self.kept / "2")
    sizes = np.array([path.stat().st_size for path in everything])
    expected = {s: testing.host(noisy_state(step=s)) for s in (1, 2)}
    for i in range(n):
      # Half of them anywhere, half in each file alike.
      share = sizes / sizes.sum() if i % 2 else None
      path = everything[rng.choice(len(everything), p=share)]
      store = self.copy()
      what = flip(store.directory / path.relative_to(self.kept), rng)
      (step, state), said = self.newest(store)
      with self.subTest(what):
        testing.assert_same(testing.host(state), expected[step])
        self.assertEqual(store.metadata(step), FACTS)
        self.assertTrue(step == 2 or said or store.problems())
      found[step == 1] += 1
      shutil.rmtree(store.directory)
    return found

  @pytest.mark.fault(
    "F15",
    "one bit flipped anywhere, 200 times",
    "detected, array named; or in bytes that are never read",
  )
  def test_one_bit_anywhere(self):
    found = self.check_flips(seed=0, n=12)
    self.assertTrue(found[True])

  @pytest.mark.slow
  @pytest.mark.fault("F15")
  def test_one_bit_anywhere_many_times(self):
    found = self.check_flips(seed=1, n=200)
    # Not how many must be found, which `check_flips` says of each: that this is
    # no test of nothing. Nothing is read of almost half of orbax's files.
    self.assertGreater(found[True], 50)

  @pytest.mark.fault("F15")
  def test_names_the_array_that_is_not_as_saved(self):
    store = self.copy()
    path = store.folder(2) / manifest.NAME
    saved = manifest.read(store.folder(2))
    saved.arrays["state/params/head"]["digest"] = "0" * 16
    path.unlink()
    manifest.write(store.folder(2), 2, saved.arrays, saved.metadata)
    with self.assertRaisesRegex(
      checkpointer.DamagedError, "2 is damaged: .*: state/params/head$"
    ):
      store.restore(2, like())

  @pytest.mark.fault(
    "F17",
    "all checkpoints damaged, or gone",
    "exits 4 with the list; never restarts from step 0 silently",
  )
  def test_with_all_damaged_there_is_none(self):
    store = self.copy()
    for step in (1, 2):
      (store.folder(step) / manifest.NAME).write_text("{}")
    for _ in range(2):  # found again when they are quarantined
      with self.assertRaises(checkpointer.MissingError) as caught:
        self.newest(store)
      for step in (1, 2):
        self.assertIn(f"checkpoints/{step}", str(caught.exception))
      store.repair()

  def test_cleaning_removes_what_was_left_half_done(self):
    store = self.copy()
    for name in ("3.orbax-checkpoint-tmp", "0.removed"):
      shutil.copytree(store.folder(1), store.directory / name)
    shutil.copytree(store.folder(1), store.folder(5))
    (line,) = store.repair()
    self.assertRegex(line, "5.corrupt: .*/5: holds step 1")
    names = {path.name for path in store.directory.iterdir()}
    self.assertEqual(names, {"1", "2", "5.corrupt"})

  def test_a_quarantined_step_is_kept_once(self):
    store = self.copy()
    for _ in range(2):
      shutil.copytree(self.kept / "1", store.folder(7))
      store.quarantine(7, checkpointer.SUSPECT)
    names = {path.name for path in store.directory.iterdir()}
    self.assertEqual(names, {"1", "2", "7.suspect"})


@pytest.mark.fault(
  "F20",
  "repeated failed saves with one checkpoint retained",
  "that checkpoint stays",
)
@pytest.mark.fault(
  "F21", "the writer thread fails", "raised at the next step at the latest"
)
class FailedSaveTest(Case):
  """Saves with files limited to a size, as on a full disk."""

  def limit(self, n_bytes):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, old[1]))
    self.addCleanup(resource.setrlimit, resource.RLIMIT_FSIZE, old)
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, old)

  def test_is_said_and_leaves_the_last_good_one(self):
    store = self.saved(1, keep=1)
    lift = self.limit(2000)
    for step in (2, 3, 4):
      with self.assertRaisesRegex(
        checkpointer.SaveError,
        f"checkpoints/{step} could not be saved: .*; the newest good one is 1$",
      ):
        store.save(noisy_state(step=step), FACTS)
        while store.check() is None:
          pass
      self.assertEqual(store.steps(), [1])
      self.assertEqual([path.name for path in store.directory.iterdir()], ["1"])
    lift()
    self.assert_restores(store, 1)
    store.save(noisy_state(step=5), FACTS)
    self.assertEqual(store.wait(), 5)
    self.assertEqual(store.steps(), [5])


if __name__ == "__main__":
  absltest.main()
