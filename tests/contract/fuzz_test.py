"""Inputs changed at random: each is taken rightly or refused in words."""

import contextlib
import gzip
import json
import math
import pathlib
import shutil
import tempfile

import numpy as np
import pytest
import safetensors.numpy
import testing
from absl import flags
from absl.testing import absltest, flagsaver, parameterized

from dsv3_jax import config, train
from dsv3_jax.checkpoint import checkpointer, manifest
from dsv3_jax.config import presets
from dsv3_jax.data import corpus, text_files, token_file, tokenizer
from dsv3_jax.interop import open_run
from dsv3_jax.interop import safetensors as ours
from dsv3_jax.parallel import device_mesh, layout_check
from experiments import cli, pretrain

FEW = 150
VALUES = (
  *("0", "-1", "1", "2", "7", "64", "1e3", "1e-9", "1e999", "-1e999", "nan"),
  *("inf", "", " ", "None", "true", "True", "maybe", "0x10", "1_000", "3.5"),
  *("\N{ARABIC-INDIC DIGIT THREE}", "9" * 40, "9" * 400, "9" * 5000),
  *("bf16", "fp8", "zero1", "dualpipe", "a=1", "a=1,b=2", "../x"),
  *("\0", "\ud800", "1;2"),
)
FIELDS = "version", "step", "arrays", "facts", "files", "another"
OBJECTS = (
  *(None, True, 0, 1, 3, 3.0, -1, 1 << 80, "", "3", [], [3], {}, {"": {}}),
  *({"d": 4}, {"d": 4.0}, {"d": "4"}, {"d": None}, {"a": {"type": "int8[]"}}),
  *({"a": {"type": "float32[2]", "digest": "0"}}, {"a": {"digest": "0"}}),
  *({"a": {"type": 3, "digest": "0"}}, {"a": {"type": "2", "digest": "0"}}),
)
MESHES = "data expert node pipe model dta =".split()


def changed(raw, rng):
  """Bytes with one to three random changes."""
  raw = bytearray(raw)
  for _ in range(rng.integers(1, 4)):
    at = int(rng.integers(len(raw) + 1))
    n = int(rng.integers(1, 9))
    match rng.integers(7):
      case 0:
        raw[at : at + 1] = bytes([rng.integers(256)])
      case 1 if at < len(raw):
        raw[at] ^= 1 << int(rng.integers(8))
      case 2:
        del raw[at : at + n]
      case 3:
        raw[at:at] = rng.bytes(n)
      case 4:
        raw[at:at] = raw[at : at + 10 * n]
      case 5:
        raw[at:at] = b"[" * 20_000  # deeper than a parser likes
      case _:
        del raw[at:]
  return bytes(raw)


@contextlib.contextmanager
def about(**what):
  """Says of what an error is."""
  try:
    yield
  except BaseException as error:
    error.add_note(f"with {what}")
    raise


class Case(parameterized.TestCase):
  def taken(self, work):
    """Returns what work returns; None where it refuses with an InputError."""
    try:
      return work()
    except ValueError as error:
      # Ours say what and where: in more words than one.
      self.assertGreater(len(str(error).split()), 2, repr(error))
      return None


@pytest.mark.fault("F41")
class SettingsTest(Case):
  """Assignments, and command lines."""

  def assignment(self, rng):
    paths = list(config.flatten(presets.TINY))
    path = paths[rng.integers(len(paths))]
    value = VALUES[rng.integers(len(VALUES))]
    match rng.integers(8):
      case 0:
        at = int(rng.integers(len(path)))
        path = path[:at] + path[at + 1 :]
      case 1:
        return path
      case 2:
        return f"={value}"
      case 3:
        path = path.removeprefix("model.")
    return f"{path}={value}"

  def check_settings(self, seed, n):
    rng = np.random.default_rng(seed)
    good = 0
    for _ in range(n):
      texts = [self.assignment(rng) for _ in range(rng.integers(1, 4))]
      with about(texts=ascii(texts)):
        run = self.taken(lambda t=texts: config.override(presets.TINY, *t))
        if run is None:
          continue
        good += 1
        values = config.flatten(run)
        # The last of several for one setting counts.
        asked = dict(text.split("=", 1) for text in texts)
        for path, text in asked.items():
          value = values.get(path, values.get(f"model.{path}"))
          self.assertIsNotNone(value)
          if isinstance(value, bool):
            self.assertIn(text.lower(), ("true", "false", "0", "1"))
          elif isinstance(value, (int, float)):
            self.assertTrue(math.isfinite(value))
            self.assertEqual(value, float(text))
          else:
            self.assertEqual(value, text)
        # What is accepted can be planned, or is refused for the mesh.
        self.assertIsInstance(layout_check.validate(run, {}), list)
        self.assertGreaterEqual(run.total_steps, 1)
    self.assertGreater(good, n // 50)

  def check_commands(self, seed, n):
    rng = np.random.default_rng(seed)
    names = list(flags.FLAGS)
    for _ in range(n):
      name = names[rng.integers(len(names))]
      mesh = ",".join(
        f"{MESHES[rng.integers(len(MESHES))]}"
        f"={VALUES[rng.integers(len(VALUES))]}"
        for _ in range(rng.integers(3))
      )
      flag = ("--", "-", "")[rng.integers(3)] + name
      argv = ["program", f"--mesh={mesh}", "--variant=tiny"]
      argv.append(f"{flag}={VALUES[rng.integers(len(VALUES))]}")
      if "help" in name or name in ("flagfile", "undefok"):
        continue
      with about(argv=ascii(argv)), flagsaver.flagsaver():
        flags.FLAGS.unparse_flags()
        problems = cli.parse_flags(argv)
        if flags.FLAGS.is_parsed():
          command, more = cli._command(pretrain.variants())
          problems += more
        else:
          self.assertTrue(problems)
        for problem in problems:
          self.assertGreater(len(problem.split()), 2, problem)
        if not problems:
          self.assertEqual(command.variant, "tiny")
          self.assertFalse(layout_check.validate(command.run, command.mesh))

  def test_some(self):
    self.check_settings(0, FEW)
    self.check_commands(0, FEW)

  @pytest.mark.slow
  def test_many(self):
    self.check_settings(1, 3000)
    self.check_commands(1, 1500)


@pytest.mark.fault("F43")
class FilesTest(Case):
  """Text to train on, safetensors, checkpoints and what is beside them."""

  TEXTS = (
    ("a.txt", "It was a bright day.\n\nÄ \u4f60\u597d \N{PARTY POPPER}\n"),
    ("a.jsonl", '{"text": "one"}\n{"text": "tw\\u00f6", "n": 1}\n'),
    ("a.txt.gz", "It was a bright cold day.\n"),
  )

  def content(self, name, text):
    raw = text.encode()
    return gzip.compress(raw) if name.endswith(".gz") else raw

  def check_texts(self, seed, n):
    rng = np.random.default_rng(seed)
    folder = testing.folder(self)
    for i in range(n):
      name, text = self.TEXTS[i % len(self.TEXTS)]
      path = folder / name
      raw = changed(self.content(name, text), rng)
      path.write_bytes(raw)
      policy = ("error", "replace", "skip")[rng.integers(3)]
      with about(name=name, raw=raw, policy=policy):
        found = self.taken(
          lambda p=path, q=policy: text_files.read_documents(str(p), q)
        )
        if found is None:
          continue
        self.assertNotEmpty(found)
        for document in found:
          document.text.encode()  # no lone surrogates
        if policy == "error" and name == "a.txt":
          raw.decode()  # it was UTF-8
        if policy == "error" and name == "a.jsonl":
          lines = [line for line in raw.decode("utf-8-sig").splitlines()]
          objects = [json.loads(line) for line in lines if line.strip()]
          self.assertLessEqual(len(found), len(objects))

  def check_tensors(self, seed, n):
    rng = np.random.default_rng(seed)
    path = testing.folder(self) / "a.safetensors"
    arrays = {
      "w": np.arange(12, dtype=np.float32).reshape(3, 4),
      "b.bias": np.ones(3, np.float16),
      "n": np.arange(5),
    }
    good = safetensors.numpy.save(arrays, {"format": "np"})
    refused = 0
    for _ in range(n):
      raw = changed(good, rng)
      path.write_bytes(raw)
      with about(raw=raw):
        found = self.taken(lambda: ours.read_header(path))
        if found is None:
          refused += 1
          continue
        # The library agrees that it is one, and on what it holds.
        theirs = safetensors.numpy.load(raw)
        self.assertEqual(found.keys(), theirs.keys())
        for name, tensor in found.items():
          self.assertEqual(tuple(tensor.shape), theirs[name].shape)
          self.assertEqual(tensor.n_bytes, theirs[name].nbytes)
    self.assertGreater(refused, n // 4)

  def check_checkpoints(self, seed, n):
    rng = np.random.default_rng(seed)
    root = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
    run, cfg = testing.run(), config.Checkpoint(keep=9)
    store = checkpointer.Checkpointer(root / "good", cfg)
    state = testing.state(run)
    states = {}
    for step in (1, 2):
      states[step] = state.replace(step=state.step + step)
      store.save(states[step], {"rows": step})
    store.wait()
    store.close()
    like = train.abstract_state(run, device_mesh.make_mesh({}))
    files = [p for p in (root / "good" / "2").rglob("*") if p.is_file()]
    found = {1: 0, 2: 0}
    for _ in range(n):
      shutil.copytree(root / "good", root / "bad")
      path = files[rng.integers(len(files))].relative_to(root / "good")
      raw = changed((root / "bad" / path).read_bytes(), rng)
      (root / "bad" / path).write_bytes(raw)
      store = checkpointer.Checkpointer(root / "bad", cfg)
      with about(path=str(path)):
        step, restored = store.newest(
          lambda step, s=store: s.restore(step, like), quarantine=True
        )
        testing.assert_same(testing.host(restored), testing.host(states[step]))
        self.assertEqual(store.metadata(step), {"rows": step})
        found[step] += 1
      store.close()
      shutil.rmtree(root / "bad")
    self.assertTrue(found[1])

  def check_configs(self, seed, n):
    rng = np.random.default_rng(seed)
    folder = testing.folder(self)
    facts = {
      "variant": "tiny",
      "seed": 0,
      "settings": config.flatten(presets.TINY),
    }
    good = json.dumps(facts, indent=1).encode()
    for _ in range(n):
      raw = changed(good, rng)
      (folder / open_run.CONFIG).write_bytes(raw)
      with about(raw=raw):
        found = self.taken(lambda: open_run.read_config(folder))
        if found is not None:
          run = self.taken(lambda f=found: open_run.run_from_config(f))
          self.assertIn(type(run), (config.Run, type(None)))

  def check_tokens(self, seed, n):
    rng = np.random.default_rng(seed)
    path = testing.folder(self) / "train.bin"
    documents = [corpus.Document("a", "It was a bright cold day.")]
    tok = tokenizer.train([documents[0].text], 300)
    whole = token_file.write(documents, path, tok, 300)
    names = path, token_file.manifest_path(path)
    goods = [name.read_bytes() for name in names]
    for i in range(n):
      for name, good in zip(names, goods, strict=True):
        name.write_bytes(good)
      raw = changed(goods[i % 2], rng)
      names[i % 2].write_bytes(raw)
      with about(raw=raw):
        found = self.taken(lambda: token_file.write(documents, path, tok, 300))
        if found is not None:
          self.assertEqual(found, whole)
          self.assertEqual(path.read_bytes(), goods[0])

  def check_manifests(self, seed, n):
    rng = np.random.default_rng(seed)
    folder = testing.folder(self) / "3"
    folder.mkdir()
    (folder / "d").write_bytes(b"data")
    arrays = {"state/a": {"type": "float32[2]", "digest": "0" * 16}}
    manifest.write(folder, 3, arrays, {"rows": 4})
    whole = manifest.read(folder)
    good = (folder / manifest.NAME).read_bytes()
    for _ in range(n):
      raw = changed(good, rng)
      (folder / manifest.NAME).write_bytes(raw)
      with about(raw=raw):
        found = self.taken(lambda: manifest.read(folder))
        if found is not None:  # spaces, between what counts
          self.assertEqual(found, whole)
    for _ in range(n):
      (folder / manifest.NAME).write_bytes(good)
      name = FIELDS[rng.integers(len(FIELDS))]
      value = OBJECTS[rng.integers(len(OBJECTS))]
      testing.reseal(folder, **{name: value})
      with about(name=name, value=value):
        found = self.taken(lambda: manifest.read(folder))
        if found is not None:
          self.assertEqual((found.step, found.files), (whole.step, whole.files))
          self.assertIsInstance(found.metadata, dict)
          types = [array["type"] for array in found.arrays.values()]
          self.assertEqual(types, ["float32[2]"] * len(types))

  def test_some(self):
    self.check_texts(0, FEW)
    self.check_tensors(0, FEW)
    self.check_configs(0, FEW)
    self.check_manifests(0, FEW)
    self.check_tokens(0, FEW)
    self.check_checkpoints(0, 10)

  @pytest.mark.slow
  def test_many(self):
    self.check_texts(1, 1500)
    self.check_tensors(1, 1500)
    self.check_configs(1, 1000)
    self.check_manifests(1, 500)
    self.check_tokens(1, 500)
    self.check_checkpoints(1, 500)


if __name__ == "__main__":
  absltest.main()
