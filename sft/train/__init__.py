"""Training: stages chained, on TRL's SFTTrainer with the model's own loss, resumable bit for bit."""
