"""Text files: what is read as documents, and what is refused."""

import gzip
import json
import os
import pathlib
import random
import tempfile

import pytest
from absl.testing import absltest, parameterized

from dsv3_jax.data import corpus, text_files

TEXT = "One line.\nAnother line, longer.\n"


def temporary_directory(test):
  """A directory that is gone after the test."""
  return pathlib.Path(test.enter_context(tempfile.TemporaryDirectory()))


@pytest.mark.fault(
  "F38",
  "bad UTF-8, NUL, BOM, CRLF, empty files, lines of 100 MB",
  "by policy: refused with the offset, replaced, skipped",
)
class ReadTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = temporary_directory(self)

  def write(self, name, content):
    path = self.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    return str(path)

  def read(self, path, policy="error"):
    documents = text_files.read_documents(str(path), policy)
    return [(d.name, d.text) for d in documents]

  def test_default_is_the_two_novels(self):
    first, second = text_files.read_documents("", "error")
    self.assertStartsWith(first.text, "PRIDE AND PREJUDICE")
    self.assertStartsWith(second.text, "SENSE AND SENSIBILITY")
    # The sizes that PROVENANCE.md states.
    self.assertLen(corpus.text_bytes([first, second]), 684_767 + 673_687)

  @parameterized.parameters("a.txt", "a", "a.txt.gz", "a.GZ.md")
  def test_text_file(self, name):
    path = self.write(name, TEXT)
    self.assertEqual(self.read(path), [(name, TEXT)])

  @parameterized.product(
    name=("a.json", "a.JSON.gz", "a.txt", "a.ndjson"),
    text=(
      '[\n  {"id": 1, "text": "one"},\n  {"id": 2, "text": "two"}\n]',
      '{"text": "one"}\n{"text": "two"}\n',
      ' [{"text": "cut off"}, {"te',
    ),
  )
  def test_records_of_another_name_are_refused(self, name, text):
    path = self.write(name, text)
    with self.assertRaisesRegex(
      ValueError, f"{name}: has JSON records .*jsonl"
    ):
      self.read(path)

  @parameterized.parameters('["a", "b"]', '{"name": 1}', "[1", '{"text": 1}')
  def test_other_json_is_plain_text_and_told(self, text):
    path = self.write("a.json", text)
    with self.assertLogs(level="WARNING") as log:
      self.assertEqual(self.read(path), [("a.json", text)])
    self.assertIn("1 JSON files read as plain text", log.output[0])

  @parameterized.parameters("a.jsonl", "a.jsonl.gz")
  def test_json_lines(self, name):
    lines = [json.dumps({"text": t, "id": 1}) for t in ("x\ny", "é")]
    path = self.write(name, lines[0] + "\r\n\n" + lines[1] + "\n")
    self.assertEqual(
      self.read(path), [(f"{name}:1", "x\ny"), (f"{name}:3", "é")]
    )

  def test_directory_is_read_by_name_without_hidden_files_and_links(self):
    outside = temporary_directory(self) / "outside.txt"
    outside.write_text("outside")
    self.write("b/2.txt", "second")
    self.write("b/10.txt.gz", "first")
    self.write("c.jsonl", '{"text": "third"}')
    self.write("a/empty.txt", " \n")
    self.write(".hidden", "no")
    self.write(".git/x.txt", "no")
    os.symlink(outside, self.root / "link.txt")
    os.symlink(outside.parent, self.root / "linked")
    self.assertEqual(
      self.read(self.root),
      [("b/10.txt.gz", "first"), ("b/2.txt", "second"), ("c.jsonl:1", "third")],
    )

  @pytest.mark.fault(
    "F40", "directory listing in another order", "the same rows"
  )
  def test_listing_order_does_not_matter(self):
    for i in range(12):
      self.write(f"{i % 3}/{i}.txt", f"text {i}")
    expected = self.read(self.root)
    walk = os.walk

    def shuffled(*args, **kwargs):
      for parent, directories, names in walk(*args, **kwargs):
        random.Random(0).shuffle(directories)
        random.Random(1).shuffle(names)
        yield parent, directories, names

    with absltest.mock.patch.object(os, "walk", shuffled):
      self.assertEqual(self.read(self.root), expected)

  def test_byte_order_mark_and_line_ends_are_normalised(self):
    path = self.write("a.txt", b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    self.assertEqual(self.read(path), [("a.txt", "one\ntwo\rthree\n")])

  @parameterized.named_parameters(
    ("utf8", b"good \xff\xfe text", 5, "good \ufffd\ufffd text"),
    ("cut_short", "né".encode()[:-1], 1, "n\ufffd"),
    ("nul", b"a\0b\xff", 1, "a\ufffdb\ufffd"),
    ("nul_last", b"ab\0", 2, "ab\ufffd"),
    ("after_mark", b"\xef\xbb\xbfa\xff", 4, "a\ufffd"),
  )
  def test_bad_bytes(self, raw, offset, replaced):
    path = self.write("bad.txt", raw)
    with self.assertRaisesRegex(ValueError, f"bad.txt.* at offset {offset} "):
      self.read(path)
    with self.assertLogs(level="WARNING") as log:
      self.assertEqual(self.read(path, "replace"), [("bad.txt", replaced)])
    self.assertIn("1 texts with bytes replaced", log.output[0])
    self.write("good.txt", TEXT)
    with self.assertLogs(level="WARNING") as log:
      self.assertEqual(self.read(self.root, "skip"), [("good.txt", TEXT)])
    self.assertIn("1 documents dropped: not valid UTF-8", log.output[0])

  @parameterized.named_parameters(
    ("raw", b'{"text": "ok"}\n{"text": "\xff"}\n', 25, "\ufffd"),
    ("nul", b'{"text": "ok"}\n{"text": "\\u0000"}', 0, "\ufffd"),
    ("surrogate", b'{"text": "ok"}\n{"text": "\\ud800"}', 0, "\ufffd" * 3),
  )
  def test_bad_text_in_json_lines(self, raw, offset, replaced):
    path = self.write("a.jsonl", raw)
    with self.assertRaisesRegex(
      ValueError, rf"a.jsonl, line 2.* at offset {offset} "
    ):
      self.read(path)
    first = ("a.jsonl:1", "ok")
    self.assertEqual(
      self.read(path, "replace"), [first, ("a.jsonl:2", replaced)]
    )
    self.assertEqual(self.read(path, "skip"), [first])

  @parameterized.named_parameters(
    ("syntax", '{"text": "a"}\n{"text": ', "a.jsonl, line 2: not JSON"),
    ("depth", "[" * 100_000, "line 1: not JSON"),
    ("number", "1" * 5000, "line 1: not JSON"),
    ("no_text", '{"body": "a"}', 'line 1: expected an object {"text"'),
    ("text_is_no_string", '{"text": 3}', "line 1: expected an object"),
    ("no_object", '["text"]', "line 1: expected an object"),
  )
  def test_bad_json_names_file_and_line(self, content, message):
    path = self.write("a.jsonl", content)
    with self.assertRaises(ValueError) as raised:
      self.read(path)
    self.assertIn(message, str(raised.exception))

  @parameterized.named_parameters(
    ("empty_file", "a.txt", b""),
    ("white_space", "a.txt", b" \n\t\r\n"),
    ("empty_gz", "a.gz", b""),
    ("blank_lines", "a.jsonl", b"\n\n"),
    ("empty_texts", "a.jsonl", b'{"text": ""}\n'),
  )
  def test_nothing_to_read_says_what_is_allowed(self, name, raw):
    file = self.write(name, raw)
    for path in (file, self.root):
      with self.assertRaisesRegex(ValueError, "no text in it; allowed: a UTF"):
        self.read(path)

  def test_empty_directory(self):
    with self.assertRaisesRegex(ValueError, "no text in it; allowed"):
      self.read(self.root)

  def test_missing_path_proposes_the_nearest(self):
    self.write("novels.txt", TEXT)
    with self.assertRaisesRegex(
      ValueError, "no such file.*did you mean 'novels.txt'.*allowed"
    ):
      self.read(self.root / "novel.txt")

  @parameterized.parameters("a\0b", "x" * 5000, "~nobody/x", "/no/such/place")
  def test_impossible_path(self, path):
    with self.assertRaisesRegex(ValueError, "no such file or directory"):
      self.read(path)

  @parameterized.named_parameters(
    ("truncated", gzip.compress(os.urandom(999))[:-20]),
    ("empty", b""),
    ("not_gzip", b"plain text"),
    ("corrupt", gzip.compress(b"a" * 999)[:14] + b"\xff" * 30),
  )
  def test_damaged_gzip_names_the_file(self, raw):
    path = self.root / "a.txt.gz"
    path.write_bytes(raw)
    with self.assertRaisesRegex(ValueError, "cannot read .*a.txt.gz"):
      self.read(path)

  def test_unknown_policy(self):
    with self.assertRaisesRegex(ValueError, "must be error, replace or skip"):
      text_files.read_documents("", "ignore")

  def test_a_line_of_many_megabytes(self):
    path = self.write("a.txt", b"word " * (4 << 20))
    self.assertLen(self.read(path)[0][1], 5 * (4 << 20))


if __name__ == "__main__":
  absltest.main()
