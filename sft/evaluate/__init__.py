"""Evaluation: problems, generated answers judged by `sft.answers`, and accuracy with intervals."""

from sft.evaluate.runner import evaluate, model_fingerprint, read_samples

__all__ = ["evaluate", "model_fingerprint", "read_samples"]
