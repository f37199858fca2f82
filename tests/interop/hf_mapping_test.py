import math

import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized

from dsv3_jax import config
from dsv3_jax.config import presets
from dsv3_jax.interop import hf_mapping

_V3 = presets.V3_671B.model
_TILE = 128, 128

# Rows of the table of the released files, some of each kind.
_TABLE = {
  "model.embed_tokens.weight": ((129280, 7168), None),
  "model.norm.weight": ((7168,), None),
  "lm_head.weight": ((129280, 7168), None),
  "model.layers.0.input_layernorm.weight": ((7168,), None),
  "model.layers.7.post_attention_layernorm.weight": ((7168,), None),
  "model.layers.1.self_attn.q_a_proj.weight": ((1536, 7168), (12, 56)),
  "model.layers.1.self_attn.q_a_layernorm.weight": ((1536,), None),
  "model.layers.60.self_attn.q_b_proj.weight": ((24576, 1536), (192, 12)),
  "model.layers.5.self_attn.kv_a_proj_with_mqa.weight": ((576, 7168), (5, 56)),
  "model.layers.5.self_attn.kv_a_layernorm.weight": ((512,), None),
  "model.layers.61.self_attn.kv_b_proj.weight": ((32768, 512), (256, 4)),
  "model.layers.2.self_attn.o_proj.weight": ((7168, 16384), (56, 128)),
  "model.layers.2.mlp.gate_proj.weight": ((18432, 7168), (144, 56)),
  "model.layers.0.mlp.up_proj.weight": ((18432, 7168), (144, 56)),
  "model.layers.0.mlp.down_proj.weight": ((7168, 18432), (56, 144)),
  "model.layers.3.mlp.gate.weight": ((256, 7168), None),
  "model.layers.61.mlp.gate.e_score_correction_bias": ((256,), None),
  "model.layers.3.mlp.experts.0.gate_proj.weight": ((2048, 7168), (16, 56)),
  "model.layers.61.mlp.experts.255.up_proj.weight": ((2048, 7168), (16, 56)),
  "model.layers.9.mlp.experts.17.down_proj.weight": ((7168, 2048), (56, 16)),
  "model.layers.9.mlp.shared_experts.up_proj.weight": ((2048, 7168), (16, 56)),
  "model.layers.61.enorm.weight": ((7168,), None),
  "model.layers.61.hnorm.weight": ((7168,), None),
  "model.layers.61.shared_head.norm.weight": ((7168,), None),
  "model.layers.61.eh_proj.weight": ((7168, 14336), None),
}


class TableTest(parameterized.TestCase):
  def test_is_that_of_the_released_files(self):
    found = {
      name: (b.tensor_shape, b.scales_shape(_TILE) if b.quantized else None)
      for b in hf_mapping.model_blocks(_V3)
      for name in b.names
    }
    for name, want in _TABLE.items():
      self.assertEqual(found[name], want, name)

  def test_counts_tensors_and_bytes(self):
    tensors, n_bytes = 0, 0
    for b in hf_mapping.model_blocks(_V3):
      size = 4 if b.path == hf_mapping.BIAS else 1 if b.quantized else 2
      n_bytes += len(b.names) * math.prod(b.tensor_shape) * size
      if b.quantized:
        n_bytes += len(b.names) * math.prod(b.scales_shape(_TILE)) * 4
      tensors += len(b.names) * (1 + b.quantized)
    copies = hf_mapping.mtp_copies(_V3)
    self.assertEqual(
      copies,
      {
        "model.layers.61.embed_tokens.weight": "model.embed_tokens.weight",
        "model.layers.61.shared_head.head.weight": "lm_head.weight",
      },
    )
    n_bytes += len(copies) * 129280 * 7168 * 2
    self.assertEqual(tensors + len(copies), 91_991)
    self.assertEqual(n_bytes, 688_574_839_360)

  def test_queries_that_are_not_compressed(self):
    found = hf_mapping.model_blocks(presets.V2_LITE_16B.model)
    names = {name: b.tensor_shape for b in found for name in b.names}
    name = "model.layers.26.self_attn.q_proj.weight"
    self.assertEqual(names[name], (16 * 192, 2048))
    self.assertFalse([n for n in names if "q_a_" in n or "e_score" in n])

  def test_names_are_of_one_tensor_each(self):
    for preset in ("v3_671b", "v2_236b", "tiny"):
      found = hf_mapping.model_blocks(presets.PRESETS[preset].model)
      names = [name for b in found for name in b.names]
      self.assertEqual(len(names), len(set(names)))


class SliceTest(parameterized.TestCase):
  @parameterized.parameters("tiny", "S")
  def test_slices_are_cut_out_of_their_bounding_slices(self, preset):
    model = config.override(presets.PRESETS[preset].model, "n_layers=2")
    rng = np.random.default_rng(0)
    seen = {b.path: b for b in hf_mapping.model_blocks(model)}
    for b in seen.values():
      dims = *b.inputs, *b.outputs
      whole = rng.random(dims, np.float32)
      for _ in range(4):
        inner = tuple(
          slice(*sorted(rng.choice(n + 1, 2, replace=False))) for n in dims
        )
        ins, outs = hf_mapping.bounding_slices(b, inner)
        matrix = whole.reshape(b.matrix_shape)
        if b.inputs:
          pairs = matrix.reshape(len(matrix), len(b.names), -1)
          matrix = pairs[ins][:, :, outs]
        else:
          matrix = matrix[outs]
        got = hf_mapping.take_slice(b, inner, np.ascontiguousarray(matrix))
        np.testing.assert_array_equal(got, whole[inner], b.path)


class NumbersTest(parameterized.TestCase):
  @parameterized.parameters(
    np.float32, np.uint8, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
  )
  def test_transpose_is_contiguous(self, dtype):
    matrix = np.arange(35).reshape(5, 7).astype(dtype)
    got = hf_mapping.transpose(matrix)
    self.assertEqual(got.dtype, matrix.dtype)
    self.assertTrue(got.flags.c_contiguous)
    np.testing.assert_array_equal(
      got.view(np.uint8), np.ascontiguousarray(matrix.T).view(np.uint8)
    )

  def test_dequantize_applies_scales_at_ragged_edges(self):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(10, 7)).astype(ml_dtypes.float8_e4m3fn)
    scales = rng.random((3, 2), np.float32)
    want = np.empty((10, 7))
    for r in range(10):
      for c in range(7):
        want[r, c] = float(values[r, c]) * float(scales[r // 4, c // 5])
    got = hf_mapping.dequantize(
      values, scales, np.arange(10) // 4, np.arange(7) // 5
    )
    np.testing.assert_array_equal(got, want.astype(np.float32))

  def test_tiles_of_two_tensors_are_counted_one_after_the_other(self):
    path = "moe/ffn/experts/gate_up"
    b = next(b for b in hf_mapping.model_blocks(_V3) if b.path == path)
    got = hf_mapping.output_tiles(b, slice(120, 130), 128)
    np.testing.assert_array_equal(got, [0] * 8 + [1, 1] + [16] * 8 + [17, 17])


if __name__ == "__main__":
  absltest.main()
