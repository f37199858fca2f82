"""Inference: text generation with a trained model."""
