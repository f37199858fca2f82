import json
import os
import pathlib

import ml_dtypes
import numpy as np
import pytest
import testing
import torch
from absl.testing import absltest, parameterized
from safetensors import torch as library

from dsv3_jax.interop import safetensors

_ALL = {
  "f": torch.randn(5, 7),
  "b": torch.randn(4, 3, 2).to(torch.bfloat16),
  "e": torch.randn(9, 6).to(torch.float8_e4m3fn),
  "s": torch.tensor([[0.5, 2.0]]).to(torch.float8_e8m0fnu),
  "i": torch.arange(6),
  "empty": torch.zeros(0, 3),
  "scalar": torch.tensor(3.0),
}


def _as_numpy(tensor):
  kinds = {
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
    torch.float8_e8m0fnu: ml_dtypes.float8_e8m0fnu,
  }
  if tensor.dtype not in kinds:
    return tensor.numpy()
  bits = tensor.contiguous().view(torch.uint8).numpy()
  return bits.view(kinds[tensor.dtype]).reshape(tensor.shape)


class FileTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.path = testing.folder(self) / "a.safetensors"

  def test_reads_what_the_library_writes(self):
    library.save_file(_ALL, self.path, {"format": "pt"})
    found = safetensors.read_header(self.path)
    self.assertEqual(found.keys(), _ALL.keys())
    for name, tensor in _ALL.items():
      want = _as_numpy(tensor)
      self.assertEqual(found[name].shape, want.shape)
      if want.ndim:
        got = safetensors.read(found[name])
        self.assertEqual(got.dtype, want.dtype)
        self.assertEqual(got.tobytes(), want.tobytes(), name)

  def test_the_library_reads_what_we_write(self):
    arrays = {name: _as_numpy(t) for name, t in _ALL.items()}
    kinds = {name: (a.dtype, a.shape) for name, a in arrays.items()}
    head = safetensors.make_header(kinds)
    self.path.write_bytes(head)
    os.truncate(self.path, len(head) + sum(a.nbytes for a in arrays.values()))
    places = safetensors.read_header(self.path)
    for name in reversed(arrays):
      safetensors.write(places[name], arrays[name])
    found = library.load_file(self.path)
    for name, tensor in _ALL.items():
      self.assertEqual(found[name].dtype, tensor.dtype)
      self.assertEqual(_as_numpy(found[name]).tobytes(), arrays[name].tobytes())

  @parameterized.parameters(
    (slice(None), slice(None)),
    (slice(2, 5), slice(None)),
    (slice(0, 0), slice(None)),
    (slice(1, 4), slice(3, 6)),
    (slice(None), slice(6, 7)),
    (slice(4, 5), slice(0, 0)),
  )
  def test_reads_slices(self, rows, columns):
    library.save_file({"pad": torch.zeros(3), "f": _ALL["f"]}, self.path)
    tensor = safetensors.read_header(self.path)["f"]
    want = _ALL["f"].numpy()[rows, columns]
    np.testing.assert_array_equal(safetensors.read(tensor, rows, columns), want)
    out = np.empty_like(want)
    safetensors.read(tensor, rows, columns, out)
    np.testing.assert_array_equal(out, want)

  def test_a_file_cut_after_its_header_was_read(self):
    library.save_file({"f": _ALL["f"]}, self.path)
    tensor = safetensors.read_header(self.path)["f"]
    self.path.write_bytes(self.path.read_bytes()[:-1])
    with self.assertRaisesRegex(ValueError, "ends early"):
      safetensors.read(tensor)

  def test_refuses_memory_that_is_not_contiguous(self):
    with self.assertRaisesRegex(ValueError, "contiguous"):
      safetensors.as_bytes(np.zeros((4, 4))[:, 1:])


def _file(header, data=b"\0" * 16):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return len(text).to_bytes(8, "little") + text + data


def _entry(dtype="F32", shape=(4,), offsets=(0, 16)):
  return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


_TWICE = b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
_TWICE += b'"x":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}'
_GOOD = _file(_entry())


@pytest.mark.fault(
  "F43", "malformed safetensors; dtypes relabelled; random bytes", "refused"
)
class BadFileTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("empty", b"", "truncated"),
    ("seven_bytes", b"\1" * 7, "truncated"),
    ("long_header", (1 << 40).to_bytes(8, "little") + b"{}", "truncated"),
    ("header_cut", _GOOD[:20], "truncated"),
    ("data_cut", _GOOD[:-1], "truncated"),
    ("trailing", _GOOD + b"\0", "trailing bytes"),
    ("not_utf8", _file(b"\xff\xfe\xfd"), "bad header"),
    ("not_json", _file(b"{x"), "bad header"),
    ("list", _file([]), "bad header: not an object"),
    ("deep", _file(b"[" * 100_000), "bad header"),
    ("null_entry", _file({"x": None}), "bad header: x"),
    ("unknown_dtype", _file(_entry("F31")), "bad header: x"),
    ("list_as_dtype", _file(_entry(["F32"])), "bad header: x"),
    ("negative", _file(_entry(shape=[-4])), "bad header: x"),
    ("fraction", _file(_entry(shape=[4.0])), "bad header: x"),
    ("bool", _file(_entry(shape=[True, 4])), "bad header: x"),
    ("huge", _file(_entry(shape=[1 << 70])), "bad header: x"),
    ("no_shape", _file({"x": {"dtype": "F32"}}), "bad header: x"),
    ("one_offset", _file(_entry(offsets=[0])), "bad header: x"),
    ("backwards", _file(_entry(offsets=[16, 0])), "bad header: x"),
    ("wrong_size", _file(_entry(shape=[3])), "bad header: x"),
    ("other_dtype", _file(_entry("F64")), "bad header: x"),
    ("hole", _file(_entry(offsets=[4, 20]), b"\0" * 20), "begins at byte 4"),
    ("twice", _file(_TWICE), "duplicate names: x"),
  )
  def test_is_refused(self, content, message):
    path = testing.folder(self) / "bad.safetensors"
    path.write_bytes(content)
    with self.assertRaisesRegex(ValueError, message) as caught:
      safetensors.read_header(path)
    self.assertIn("bad.safetensors", str(caught.exception))

  def test_overlap_is_refused(self):
    both = _entry(shape=[4]) | {
      "y": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}
    }
    path = testing.folder(self) / "bad.safetensors"
    path.write_bytes(_file(both))
    with self.assertRaisesRegex(ValueError, "begins at byte"):
      safetensors.read_header(path)

  def test_missing_file(self):
    with self.assertRaisesRegex(ValueError, "cannot be read"):
      safetensors.read_header(pathlib.Path("/no/such.safetensors"))


if __name__ == "__main__":
  absltest.main()
