"""The judge's verdict on a recorded sample, alike when it is made and when it is judged again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

from sft.answers.choices import options_in
from sft.answers.judge import Judge, Verdict
from sft.answers.pool import RESULT_LIMIT
from sft.evaluate.suites import after_thinking

Sample = dict[str, Any]
CUT_OFF = "cut off"


def submit(judge: Judge, sample: Sample) -> Future[Verdict]:
    """The verdict on a sample, in the future; an answer that didn't end is wrong whatever stands in it: the model may
    not have been done.

    `sample` has gold, question, prompt, completion and finished; and `options`, the choices that its question lists,
    where it is of a version that recorded them.
    """
    if not sample["finished"]:
        verdict: Future[Verdict] = Future()
        verdict.set_result(Verdict("wrong", CUT_OFF))
        return verdict
    options = sample["options"] if "options" in sample else options_in(sample["question"])
    return judge.submit(after_thinking(sample["prompt"], sample["completion"]), sample["gold"], options=options)


def judged(sample: Sample, verdict: Verdict) -> Sample:
    """The sample with what became of its answer."""
    gold = sample["gold"]
    kept = {key: value for key, value in sample.items() if key not in ("answer", "gold", "verdict", "reason")}
    return {**kept, "answer": verdict.answer, "gold": gold, "verdict": verdict.status, "reason": verdict.reason}


def judged_again(judge: Judge, samples: Sequence[Sample]) -> Iterator[Sample]:
    """Recorded samples, each once the judge of now has its verdict."""
    verdicts = [submit(judge, sample) for sample in samples]
    for sample, verdict in zip(samples, verdicts, strict=True):
        yield judged(sample, verdict.result(timeout=RESULT_LIMIT))
