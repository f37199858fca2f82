"""Tests of how packages become a corpus; what needs no network."""

import collections
import contextlib
import gzip
import json
import pathlib
import shutil
import subprocess
from unittest import mock

import testing
from absl.testing import absltest, parameterized

from dsv3_jax import config
from dsv3_jax.data import prepare
from scripts import data_sources, prepare_data

PAGE = """<html><head><title>no</title><style>p {}</style></head><body>
<nav>menu</nav><h1>Title</h1><p>One &amp;
two <b>three</b>.</p><script>x<y</script>
<div id="DisplayArea"><p>Four</p><ul><li>five</li></ul></div></body></html>"""

DATABASE = """$( first section $)
a1 $a |- x $.
$(
=-=-=-=-
  Second
=-=-=-=-
$)
t1 $p |- y $= a1 b2
  c3 $.
"""


def one(extract, text):
  (document,) = extract(text)
  return document


class ExtractTest(parameterized.TestCase):
  def test_pages_lose_their_markup(self):
    text = one(data_sources.html_text, PAGE)
    self.assertEqual(text, "Title\n\nOne &\ntwo three.\n\nFour\n\nfive\n")
    self.assertEqual(one(data_sources.help_text, PAGE), "Four\n\nfive\n")

  def test_pages_need_not_be_well_formed(self):
    self.assertEqual(
      one(data_sources.html_text, "a</div></script>b<p>c"), "a\nb\nc\n"
    )

  def test_theorems_lose_their_proofs(self):
    first, second = data_sources.theorems(DATABASE)
    self.assertIn("|- x", first)
    self.assertStartsWith(second, "$(\n=-=-=-=-\n  Second")
    self.assertEndsWith(second, "t1 $p |- y $.\n")

  def test_poems(self):
    poems = [
      {"title": "T", "author": "A", "paragraphs": ["x", "y"]},
      {"rhythmic": "R", "paragraphs": ["z"]},
      {"title": "no lines"},
    ]
    found = list(data_sources.poems(json.dumps(poems)))
    self.assertEqual(found, ["T\nA\nx\ny\n", "R\nz\n"])


class DocumentsTest(absltest.TestCase):
  def source(self, files, extract=data_sources.whole_file):
    return data_sources.Source("d", "p", files, "PD", 1, extract)

  def test_files_are_read_in_order_and_what_is_left_out_is_counted(self):
    root = testing.folder(self)
    (root / "b").mkdir()
    (root / "b" / "2.txt").write_text("B" * 50 + "\r\n")
    (root / "a.txt.gz").write_bytes(gzip.compress(b"A" * 50))
    (root / "a.txt").write_text("short")
    (root / "c.txt").write_bytes(b"\xff" * 99)
    (root / "link.txt").symlink_to("a.txt.gz")
    (root / "folder.txt").mkdir()
    left_out = collections.Counter()
    found = prepare_data.documents(self.source("**/*.txt*"), root, left_out)
    self.assertEqual(
      list(found),
      [("p/a.txt.gz:0", "A" * 50), ("p/b/2.txt:0", "B" * 50 + "\n")],
    )
    self.assertEqual(left_out, {"short": 1, "not UTF-8": 1})

  def test_a_part_is_chosen_by_hash_and_fits(self):
    found = [(str(i), str(i) * 10) for i in range(100)]
    kept = prepare_data.sample_by_hash(found, 500)
    size = sum(len(text) for _, text in kept)
    self.assertBetween(size, 480, 500)
    self.assertEqual(kept, [d for d in found if d in kept])
    self.assertEqual(prepare_data.sample_by_hash(found, 1e9), found)
    # More of it holds the same and more.
    self.assertLess(set(prepare_data.sample_by_hash(found, 200)), set(kept))

  def test_the_same_documents_give_the_same_bytes(self):
    root = testing.folder(self)
    found = [("a", "x\n漢"), ("b", "y")]
    digests = {
      prepare_data._write(found, root / name / "text.jsonl.gz")
      for name in ("one", "two")
    }
    self.assertLen(digests, 1)
    self.assertLen(list((root / "one").iterdir()), 1)


class UnpackTest(absltest.TestCase):
  def test_a_folder_may_be_relative(self):
    self.enter_context(contextlib.chdir(testing.folder(self)))
    folder, file = pathlib.Path("unpacked"), pathlib.Path("a_1_all.deb")
    folder.mkdir()
    file.touch()
    (source, *_) = (s for s in data_sources.SOURCES if s.client == "apt")
    done = subprocess.CompletedProcess([], 0)
    with (
      mock.patch.object(shutil, "which", return_value="/usr/bin/dpkg-deb"),
      mock.patch.object(subprocess, "run", return_value=done) as run,
    ):
      prepare_data._unpack(source, file, folder)
    ((_, _, *paths),) = run.call_args.args
    seen = [run.call_args.kwargs["cwd"] / path for path in paths]
    self.assertEqual(seen, [file.absolute(), folder.absolute()])


class PrepareTest(parameterized.TestCase):
  def call(self, *arguments):
    return testing.command_line(prepare_data.main, *arguments)

  def test_the_interpreters_library_is_a_domain_to_train_on(self):
    root = testing.folder(self)
    ask = f"--out={root}", "--domains=python", "--most=0.3"
    code, out, err = self.call(*ask)
    self.assertEqual((code, err), (0, ""))
    self.assertIn("0.3 MB", out)
    facts = json.loads((root / "manifest.json").read_text())["python"]
    self.assertEqual(facts["most_megabytes"], 0.3)
    self.assertEqual(facts["sources"][0]["licence"], "PSF-2.0")
    self.assertGreater(facts["documents_found"], 10 * facts["documents"])
    self.assertBetween(facts["megabytes"], 0.29, 0.3)
    _, out, _ = self.call(*ask)
    self.assertEqual(out, "python: there already\n")

    data = config.Data(path=str(root), domains="python=1", seq_len=64)
    prepared = prepare.prepare(data, 400, root / "run")
    n_bytes = prepared.train_bytes + prepared.heldout_bytes
    self.assertEqual(round(n_bytes / 1e6, 3), facts["megabytes"])

    (root / "python" / "text.jsonl.gz").write_bytes(b"damaged")
    _, out, _ = self.call(*ask)
    self.assertNotIn("there already", out)

  def test_a_missing_client_is_named(self):
    root = testing.folder(self)
    with mock.patch.dict("os.environ", PATH=""):
      code, _, err = self.call(f"--out={root}", "--domains=go")
    self.assertEqual(code, 2)
    self.assertIn("apt-get is not installed, which golang-1.19-src", err)
    self.assertFalse((root / "manifest.json").exists())

  @parameterized.parameters(
    ((), "--out is missing"),
    (
      ("--out=x", "--domains=prose,gow"),
      "--domains=gow: must be one of prose,",
    ),
    (("--out=x", "--most=0"), "most"),
    (("--out=x", "y"), "stray argument 'y'"),
    (("--outt=x",), "outt"),
  )
  def test_refuses(self, arguments, message):
    with contextlib.chdir(testing.folder(self)):
      code, _, err = self.call(*arguments)
      self.assertEqual(code, 2)
      self.assertIn(message, err)
      self.assertEmpty(list(pathlib.Path().iterdir()))

  def test_sources_are_unique_and_of_known_clients(self):
    packages = [source.package for source in data_sources.SOURCES]
    self.assertLen(set(packages), len(packages))
    clients = {source.client for source in data_sources.SOURCES}
    self.assertLessEqual(clients, {"apt", "npm", "python"})


if __name__ == "__main__":
  absltest.main()
