"""Evaluation: problems, generated answers judged by `sft.answers`, and accuracy with intervals."""
