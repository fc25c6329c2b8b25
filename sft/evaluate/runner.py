"""Run suites on a model: generate, check, record every sample, and sum up. A killed run continues where it stopped."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from sft.answers.judge import Judge, Verdict
from sft.answers.pool import RESULT_LIMIT
from sft.evaluate.metrics import summarize
from sft.evaluate.progress import SuiteLines
from sft.evaluate.suites import Problem, load_problems, render_prompt
from sft.evaluate.verdicts import Sample, judged, submit
from sft.recipe.schema import EvaluateSection, SuiteSection, Templates
from sft.utils.errors import UserError
from sft.utils.files import atomic_open, read_sealed, remove_file, sha256_file, sha256_json, write_sealed

VERSION = 3
"""Changes when what is generated or how it is judged changes: results of another version are not looked up."""
CHECK = "check"
Progress = Callable[[str, int, int, int], None]


def evaluate(
    model: Any,
    tokenizer: Any,
    section: EvaluateSection,
    *,
    prompt_defaults: Templates | None,
    out_dir: str | Path,
    point: str,
    model_key: str | None = None,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Run every suite of `section`; returns the metrics by suite name.

    Writes `<out_dir>/<suite>/samples.jsonl` (a line per sample, as they come) and `metrics.json` (at the end).
    With the same model and settings, finished results are looked up and interrupted ones continued.

    Args:
        prompt_defaults: the prompt_template and system_prompt that a suite without its own uses.
        out_dir: the folder of this point's results, `RunPaths.eval_dir(point)` in a run.
        point: `start` or the name of the stage that has just ended; a label.
        model_key: what identifies the weights; default: `model_fingerprint(model)`.
        progress: called with (suite, samples done, samples in all, right ones so far); default: a line on stderr.

    Raises UserError for data that can't be used, a model whose logits aren't finite, and files that can't be written.
    """
    key = model_key if model_key is not None or not section.suites else model_fingerprint(model)
    progress = progress or SuiteLines(point, section.suites)
    results = {}
    for suite in section.suites:
        run = _SuiteRun(model, tokenizer, suite, section, prompt_defaults, Path(out_dir) / suite.name, point)
        try:
            results[suite.name] = run.result(str(key), progress)
        except OSError as error:
            raise UserError(
                f"Evaluating {suite.name} stopped at {error.filename or run.folder}: {error.strerror or error}. "
                "What was answered so far is kept; run the same command again to go on."
            ) from error
    return results


def model_fingerprint(model: Any) -> str:
    """A hash over names, shapes, types and 64 values of every tensor of the model: other weights, other hash."""
    import torch

    entries = []
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        places = torch.linspace(0, max(flat.numel() - 1, 0), min(64, flat.numel()), dtype=torch.float64).long()
        values = flat[places.to(flat.device)].double().cpu()
        entries.append([name, list(tensor.shape), str(tensor.dtype), values.numpy().tobytes().hex()])
    return sha256_json(entries)


@dataclass(frozen=True)
class _Task:
    """One sample to make: `number` is its place among all samples of the suite."""

    number: int
    problem: int
    sample: int


class _SuiteRun:
    """One suite on one model."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        suite: SuiteSection,
        section: EvaluateSection,
        defaults: Templates | None,
        folder: Path,
        point: str,
    ) -> None:
        self.model, self.tokenizer, self.suite, self.section = model, tokenizer, suite, section
        self.folder, self.point = folder, point
        self.problems: list[Problem] = load_problems(suite)
        self.prompts = [render_prompt(tokenizer, problem, suite, defaults) for problem in self.problems]
        self.ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in self.prompts]

    def result(self, model_key: str, progress: Progress | None) -> dict[str, Any]:
        """The metrics: looked up, or made from what samples are there and those still to be made."""
        from sft.models.end_tokens import end_token_ids

        ends = end_token_ids(self.tokenizer, self.model)
        key = self._key(model_key, sorted(ends))
        metrics_path = self.folder / "metrics.json"
        samples_path = self.folder / "samples.jsonl"
        known = read_sealed(metrics_path)
        if known and known["key"] == key and samples_path.is_file() and known["content"] == sha256_file(samples_path):
            return known
        done = _open_samples(self.folder, key)
        started = time.monotonic()
        with _Recorder(self, done, progress) as recorder:
            self._generate(recorder, ends)
        seconds = time.monotonic() - started
        write_samples(samples_path, recorder.samples)
        metrics = {
            "key": key,
            "content": sha256_file(samples_path),
            "point": self.point,
            "suite": self.suite.name,
            **summarize(recorder.samples),
            "settings": self._settings(),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "seconds": round(seconds, 3),
            "generated_tokens": recorder.tokens,
            "tokens_per_second": round(recorder.tokens / seconds, 1) if recorder.tokens else None,
            "resumed_samples": len(done),
        }
        write_sealed(metrics_path, metrics)
        return metrics

    def _settings(self) -> dict[str, Any]:
        names = ("max_new_tokens", "temperature", "top_p", "samples_per_problem", "seed", "batch_size")
        settings = {name: getattr(self.suite, name) for name in names}
        if self.suite.max_length is not None:
            settings["max_length"] = self.suite.max_length
        return {**settings, "verify_timeout": self.section.verify_timeout, "example_prompt": self.prompts[0]}

    def _key(self, model_key: str, ends: list[int]) -> str:
        """What the samples are a function of. The batch size isn't part of it."""
        settings = {k: v for k, v in self._settings().items() if k not in ("batch_size", "example_prompt")}
        asked = [
            [ids, problem.id, problem.gold, problem.group, problem.steps]
            for ids, problem in zip(self.ids, self.problems, strict=True)
        ]
        return sha256_json([VERSION, model_key, settings, ends, sha256_json(asked)])

    def _generate(self, recorder: _Recorder, ends: list[int]) -> None:
        """Make the samples that aren't recorded yet."""
        from sft.generate import Generation, generate_batch

        each = self.suite.samples_per_problem
        tasks = [_Task(p * each + s, p, s) for p in range(len(self.problems)) for s in range(each)]
        tasks = [task for task in tasks if (task.problem, task.sample) not in recorder.known]

        def on_done(index: int, generation: Generation) -> None:
            recorder.add(tasks[index], generation.ids, generation.finished)

        generate_batch(
            self.model,
            self.tokenizer,
            [self.ids[task.problem] for task in tasks],
            max_new_tokens=self.suite.max_new_tokens,
            max_length=self.suite.max_length,
            temperature=self.suite.temperature,
            top_p=self.suite.top_p,
            seed=self.suite.seed,
            batch_size=self.suite.batch_size,
            eos_ids=ends,
            requests=[task.number for task in tasks],
            on_done=on_done,
        )


class _Recorder:
    """Has completions checked while others are generated, and appends each to samples.jsonl when its verdict is in."""

    def __init__(self, run: _SuiteRun, done: list[Sample], progress: Progress | None) -> None:
        self.run, self.progress = run, progress
        self.samples = list(done)
        self.known = {(sample["problem"], sample["sample"]) for sample in done}
        self.total = len(run.problems) * run.suite.samples_per_problem
        self.tokens = 0
        self.right = sum(sample["verdict"] == "right" for sample in done)
        self._waiting: deque[tuple[Sample, Future[Verdict]]] = deque()

    def __enter__(self) -> _Recorder:
        section = self.run.section
        self._file: IO[str] = open(self.run.folder / "samples.jsonl", "a", encoding="utf-8")
        self._judge = Judge(section.verify_timeout, section.verify_workers)
        self._report()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._write(wait=True)
        finally:
            self._judge.close(at_once=error is not None)
            self._file.close()

    def add(self, task: _Task, ids: list[int], finished: bool) -> None:
        """Take a completion."""
        problem = self.run.problems[task.problem]
        completion = self.run.tokenizer.decode(ids, skip_special_tokens=False)
        sample: Sample = {
            "problem": task.problem,
            "sample": task.sample,
            "id": problem.id,
            "group": problem.group,
            "steps": problem.steps,
            "question": problem.text,
            "options": problem.choices(),
            "prompt": self.run.prompts[task.problem],
            "completion": completion,
            "tokens": len(ids),
            "finished": finished,
            "gold": problem.gold,
        }
        self.tokens += len(ids)
        self._waiting.append((sample, submit(self._judge, sample)))
        self._write(wait=False)

    def _write(self, wait: bool) -> None:
        """Append what has its verdict; all of them with `wait`."""
        while self._waiting and (wait or self._waiting[0][1].done()):
            sample, future = self._waiting.popleft()
            verdict = future.result(timeout=RESULT_LIMIT)
            sample = judged(sample, verdict)
            self._file.write(sample_line(sample))
            self._file.flush()
            self.samples.append(sample)
            self.right += verdict.status == "right"
            self._report()

    def _report(self) -> None:
        if self.progress is not None:
            self.progress(self.run.suite.name, len(self.samples), self.total, self.right)


def _open_samples(folder: Path, key: str) -> list[Sample]:
    """The samples of an interrupted run under this key; what belongs to another key is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    path, mark = folder / "samples.jsonl", folder / "progress.json"
    if (read_sealed(mark) or {}).get("key") == key:
        samples = read_samples(path)
        # A line torn by the kill is dropped before anything is appended to it.
        write_samples(path, samples)
        return samples
    for stale in (folder / "metrics.json", path):
        remove_file(stale)
    write_sealed(mark, {"key": key})
    return []


def read_samples(path: Path) -> list[Sample]:
    """The whole lines of a samples file, each sample once; one that is torn or changed is left out."""
    if not path.is_file():
        return []
    samples: dict[tuple[int, int], Sample] = {}
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                sample = json.loads(line)
            except ValueError:
                continue
            if isinstance(sample, dict) and sample.pop(CHECK, None) == _check(sample):
                samples[sample["problem"], sample["sample"]] = sample
    return list(samples.values())


def write_samples(path: Path, samples: list[Sample]) -> None:
    """Write a samples file anew, in the order of problems and samples."""
    with atomic_open(path) as handle:
        for sample in sorted(samples, key=lambda sample: (sample["problem"], sample["sample"])):
            handle.write(sample_line(sample))


def sample_line(sample: Sample) -> str:
    """A line of samples.jsonl, with a sum of itself: one changed byte in it is noticed."""
    return json.dumps({**sample, CHECK: _check(sample)}, ensure_ascii=False) + "\n"


def _check(sample: Sample) -> str:
    return sha256_json(sample)[:16]
