"""Divergence-aware sampling (arXiv 2601.09088): in which sentences of an answer teacher and student part ways."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft.data.steps.score.teacher_tokens import TextTokens
from sft.data.text.sentences import sentence_spans

DIGITS = 6  # of what is noted: beyond them, numbers depend on the batch that a row was scored in


def student_facts(tokens: TextTokens) -> dict[str, Any]:
    """What is noted of an answer's tokens (at least one) under the student alone."""
    return {"tokens": len(tokens.logprobs), "student_mean_logprob": rounded(tokens.logprobs.mean())}


def compare(
    text: str,
    student: TextTokens,
    teacher: TextTokens,
    covered: NDArray[np.bool_],
    *,
    margin: float,
    keep_sentences: bool = False,
) -> dict[str, Any] | None:
    """How the sentences of an answer divide between teacher and student.

    A sentence's probability under a model is the geometric mean of its tokens' probabilities, each model by its own
    tokens. It is a teacher sentence where the teacher's is more than `margin` above the student's, a student sentence
    where it is more than `margin` below, else shared.

    Args:
        text: the answer.
        student, teacher: their tokens in it.
        covered: (len(text),), the characters that the teacher wrote; the student's tokens elsewhere don't count.
    Returns:
        The counts `sentences`, `teacher`, `shared`, `student`; `teacher_share` of the sentences, `teacher_token_share`
        of the student's tokens; `mean_gap`, the mean over sentences of teacher's minus student's probability;
        `teacher_mean_logprob` by token; `same_tokens`, the share of the teacher's tokens that are the student's too;
        with `keep_sentences` also `per_sentence`. None when no sentence has tokens of both.
    """
    ends = np.array([end for _, end in sentence_spans(text)], np.int64)
    inside = covered[np.minimum(student.starts, len(text) - 1)] if len(text) else np.zeros(0, bool)
    student = TextTokens(student.starts[inside], student.ends[inside], student.logprobs[inside])
    student_means, student_counts = _sentence_means(student, ends)
    teacher_means, teacher_counts = _sentence_means(teacher, ends)
    both = (student_counts > 0) & (teacher_counts > 0)
    if not both.any():
        return None
    student_p, teacher_p = np.exp(student_means[both]), np.exp(teacher_means[both])
    gap, counts = teacher_p - student_p, student_counts[both]
    is_teacher, is_student = gap > margin, gap < -margin
    facts: dict[str, Any] = {
        "sentences": len(gap),
        "teacher": int(is_teacher.sum()),
        "shared": int((~is_teacher & ~is_student).sum()),
        "student": int(is_student.sum()),
        "teacher_share": rounded(is_teacher.mean()),
        "teacher_token_share": rounded(counts[is_teacher].sum() / counts.sum()),
        "mean_gap": rounded(gap.mean()),
        "teacher_mean_logprob": rounded(teacher.logprobs.mean()),
        "same_tokens": rounded(_same_tokens(student, teacher)),
    }
    if keep_sentences:
        numbers = {"end": ends[both].tolist(), "teacher": _list(teacher_p), "student": _list(student_p)}
        facts["per_sentence"] = numbers
    return facts


def _sentence_means(tokens: TextTokens, ends: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """(mean log probability, number of tokens) of each sentence; the mean is 0 where there are none."""
    index = np.searchsorted(ends, tokens.starts, side="right")
    counts = np.bincount(index, minlength=len(ends))[: len(ends)]
    sums = np.bincount(index, weights=tokens.logprobs, minlength=len(ends))[: len(ends)]
    return sums / np.maximum(counts, 1), counts


def _same_tokens(student: TextTokens, teacher: TextTokens) -> float:
    places = [tokens.starts << 32 | tokens.ends for tokens in (student, teacher)]
    return float(np.isin(places[1], places[0]).mean())


def rounded(value: Any) -> float:
    """As it is noted."""
    return round(float(value), DIGITS)


def _list(values: NDArray[np.float64]) -> list[float]:
    return [round(float(value), 4) for value in values]
