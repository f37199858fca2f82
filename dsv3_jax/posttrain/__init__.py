"""Post-training: fine-tuning on conversations, rewards, tasks (section 5)."""
