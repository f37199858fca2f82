"""Tests of atomic writes, checksums and readers of JSON."""

import testing
from absl.testing import absltest, parameterized

from dsv3_jax import io
from dsv3_jax.errors import InputError


class IoTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = testing.folder(self)
    self.path = self.folder / "file"

  def test_a_write_that_fails_changes_nothing(self):
    for before in (None, "old"):
      if before:
        self.path.write_text(before)
      with (
        self.assertRaises(ZeroDivisionError),
        io.atomic_write(self.path) as f,
      ):
        f.write("new")
        raise ZeroDivisionError
      there = [p.read_text() for p in self.folder.iterdir()]
      self.assertEqual(there, [before] if before else [])

  @parameterized.parameters(("w", "é"), ("wb", b"\xff"))
  def test_a_write_replaces_the_file(self, mode, content):
    self.path.write_text("old")
    with io.atomic_write(self.path, mode) as file:
      file.write(content)
      self.assertEqual(self.path.read_text(), "old")
    data = content.encode() if mode == "w" else content
    self.assertEqual(self.path.read_bytes(), data)
    self.assertLen(list(self.folder.iterdir()), 1)
    self.assertEqual(io.file_sha256(self.path), io.sha256(content))

  def test_sha256(self):
    self.assertStartsWith(io.sha256("abc"), "ba7816bf")
    self.assertEqual(io.sha256(b"abc"), io.sha256("abc"))

  @parameterized.parameters("", "[1]", "{", "[" * 100_000, "{}{}")
  def test_what_is_no_object_is_an_input_error(self, text):
    self.path.write_text(text)
    with self.assertRaisesRegex(InputError, str(self.path)):
      io.read_json_object(self.path)

  def test_objects_are_read(self):
    with self.assertRaisesRegex(InputError, "cannot be read"):
      io.read_json_object(self.path)
    io.write_json(self.path, {"a": [1]})
    self.assertEqual(io.read_json_object(self.path), {"a": [1]})

  def test_lines_that_are_no_objects_are_left_out(self):
    self.path.write_bytes(b'{"a": 1}\n[2]\n\xff\n\n{"b": 2}\n{"c": 3')
    self.assertEqual(io.read_jsonl(self.path), [{"a": 1}, {"b": 2}])

  def test_flatten(self):
    tree = {"a": {"b": 1, "c": {"d": [2]}}, "e": {}}
    self.assertEqual(io.flatten(tree), {"a.b": 1, "a.c.d": [2]})


if __name__ == "__main__":
  absltest.main()
