"""Products of activations with weights, in FP32, BF16 and FP8."""
