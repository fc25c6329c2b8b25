"""Evaluation: problems, generated answers checked by math-verify, and accuracy with intervals."""

from sft.evaluate.answers import AnswerChecker, Verdict, check, extract_answer
from sft.evaluate.runner import evaluate, model_fingerprint, read_samples

__all__ = [
    "AnswerChecker",
    "Verdict",
    "check",
    "evaluate",
    "extract_answer",
    "model_fingerprint",
    "read_samples",
]
