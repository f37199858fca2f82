"""Evaluation: likelihood of held-out text, logits, needles in haystacks."""
