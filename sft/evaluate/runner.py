"""Run suites on a model: generate, check, record every sample, and sum up. A killed run continues where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import time
from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from sft.answers.judge import Judge, Verdict
from sft.answers.pool import RESULT_LIMIT
from sft.evaluate.metrics import summarize
from sft.evaluate.progress import SuiteLines
from sft.evaluate.sharing import Crew
from sft.evaluate.suites import Problem, load_suite, render_prompt
from sft.evaluate.units import Share, units_of
from sft.evaluate.units import Task as _Task
from sft.evaluate.verdicts import Sample, judged, judged_again, submit
from sft.recipe.schema import EvaluateSection, SuiteSection, Templates
from sft.utils.distributed import beside, decide, is_alone, is_main, lose, lost_ranks, rank, together, world_size
from sft.utils.errors import UserError
from sft.utils.files import atomic_open, read_sealed, remove_file, sha256_file, sha256_json, write_sealed
from sft.utils.say import say
from sft.utils.tables import counted

VERSION = 3
"""Changes when what is generated or how it is judged changes: results of another version are not looked up."""
CHECK, MARK = "check", "progress.json"
"""The key of a line's sum; the file that says whose answers a folder holds, and the time that a check had."""
Progress = Callable[[str, int, int, int], None]
_APART = ("batch_size", "example_prompt", "verify_timeout")
"""Settings that answers don't follow from."""
_OTHERS = {"model": "another model", "problems": "other problems or prompts", "ends": "other end tokens"}
"""What else they follow from, where it has changed."""


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

    Of several processes, all of which call this alike, each makes samples (`samples-00001.jsonl` and so on until the
    end) and gets the metrics. Their number changes no result; what one that dies had to do the others do.

    Args:
        prompt_defaults: the prompt_template and system_prompt that a suite without its own uses.
        out_dir: the folder of this point's results, `RunPaths.eval_dir(point)` in a run.
        point: `start` or the name of the stage that has just ended; a label.
        model_key: what identifies the weights; default: `model_fingerprint(model)`.
        progress: called with (suite, samples done, samples in all, right ones so far) of all processes, on each;
            default: a line on stderr, of the main one.

    Raises UserError for data that can't be used, a model whose logits aren't finite, and files that can't be written.
    """
    if not section.suites:
        return {}
    asked = decide(lambda: [(suite, load_suite(suite)) for suite in section.suites])
    runs = together(
        lambda: [
            _SuiteRun(model, tokenizer, suite, found, section, prompt_defaults, Path(out_dir) / suite.name, point)
            for suite, found in asked
        ]
    )
    begun = decide(lambda: _begin(runs, model_key or model_fingerprint(model), Path(out_dir)))
    if progress is None and is_main():
        progress = SuiteLines(point, section.suites, processes=1 if is_alone() else world_size())
    todo = [(run, start) for run, start in zip(runs, begun.suites, strict=True) if start.metrics is None]
    made = _make(todo, begun.sharing, progress) if todo else {}
    return {
        run.suite.name: start.metrics or made[run.suite.name] for run, start in zip(runs, begun.suites, strict=True)
    }


def _make(todo: list[tuple[_SuiteRun, _Start]], folder: Path, progress: Progress | None) -> dict[str, dict[str, Any]]:
    """The metrics of suites, whose samples all processes make."""
    me, ranks = (0, [0]) if is_alone() else (rank(), [*{*range(world_size())} - lost_ranks()])
    with Crew(folder, me, ranks) as crew:
        makings = [_Making(run, start, crew, progress) for run, start in todo]
        for making in makings:
            making.go_on()
        # Nothing is left to take, but what others are at may be left behind by one that dies.
        while crew.results is None:
            for making in makings:
                making.go_on()
            if crew.leads() and all(making.metrics for making in makings):
                crew.end({making.run.suite.name: making.metrics for making in makings})
            else:
                crew.pause()
    if crew.lost:
        lose(crew.lost)
        say(f"{', '.join(f'rank {other}' for other in sorted(crew.lost))} died; the others have made all answers")
    return crew.results


def model_fingerprint(model: Any) -> str:
    """A hash over names, shapes, types and values of every tensor of the model: other weights, other hash."""
    import torch

    entries = []
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().reshape(-1).contiguous().cpu().view(torch.uint8).numpy()
        entries.append([name, list(tensor.shape), str(tensor.dtype), hashlib.sha256(values).hexdigest()])
    return sha256_json(entries)


@dataclass(frozen=True)
class _Start:
    """How a suite begins: what its results are kept under; its metrics, or which samples are there, right or not."""

    key: str
    metrics: dict[str, Any] | None = None
    known: dict[tuple[int, int], bool] = field(default_factory=dict)


@dataclass(frozen=True)
class _Begun:
    """How an evaluation begins, as the main process has found it: the suites, and a folder of this launch alone."""

    suites: list[_Start]
    sharing: Path


def _begin(runs: list[_SuiteRun], model_key: str, out: Path) -> _Begun:
    for left in out.glob(".sharing-*"):
        shutil.rmtree(left)
    return _Begun([run.begin(model_key) for run in runs], out / f".sharing-{secrets.token_hex(8)}")


class _SuiteRun:
    """One suite on one model."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        suite: SuiteSection,
        found: tuple[list[Problem], dict[str, Any]],
        section: EvaluateSection,
        defaults: Templates | None,
        folder: Path,
        point: str,
    ) -> None:
        from sft.models.end_tokens import end_token_ids

        self.model, self.tokenizer, self.suite, self.section = model, tokenizer, suite, section
        self.folder, self.point = folder, point
        self.problems, self.origin = found
        self.prompts = [render_prompt(tokenizer, problem, suite, defaults) for problem in self.problems]
        self.ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in self.prompts]
        self.ends = sorted(end_token_ids(tokenizer, model))
        self.samples = self.folder / "samples.jsonl"

    def begin(self, model_key: str) -> _Start:
        """The metrics if they are there, or an interrupted run's samples; what belongs to another key is removed."""
        with self.plain_errors():
            key = self._key(model_key)
            self._adopt(key, model_key)
            metrics = self.look_up(key)
            done = [] if metrics else self._open_samples(key, self._follows_from(model_key))
        return _Start(key, metrics, {(sample["problem"], sample["sample"]): _is_right(sample) for sample in done})

    def look_up(self, key: str) -> dict[str, Any] | None:
        """The metrics that were made under this key, with as much time for a check, from the samples that are there;
        else None."""
        known = self._finished(key)
        return known if known and known["settings"]["verify_timeout"] == self.section.verify_timeout else None

    def _finished(self, key: str) -> dict[str, Any] | None:
        """The metrics of the samples that are there, if these follow from this key, however they were judged."""
        known = read_sealed(self.folder / "metrics.json")
        if known and known["key"] == key and self.samples.is_file() and known["content"] == sha256_file(self.samples):
            return known
        return None

    def _adopt(self, key: str, model_key: str) -> None:
        """Give results whose key is an earlier one, which held the time of a check too, the key of today."""
        metrics, mark = (read_sealed(self.folder / name) or {} for name in ("metrics.json", MARK))
        said = metrics.get("settings", {}).get("verify_timeout", self.section.verify_timeout)
        # Unfinished ones don't say theirs: it is that of today, or nobody had set it.
        for within in {said, EvaluateSection().verify_timeout}:
            before = self._key(model_key, {"verify_timeout": within})
            if mark.get("key") == before:
                noted = {"key": key, "verify_timeout": within, "of": self._follows_from(model_key)}
                write_sealed(self.folder / MARK, noted)
            if metrics.get("key") == before:
                write_sealed(self.folder / "metrics.json", {**metrics, "key": key})

    def _open_samples(self, key: str, of: dict[str, Any]) -> list[Sample]:
        """The samples that are there under this key, with verdicts that had as much time as is asked; what belongs to
        another key is removed, and a line says so. `of`: what the key is made of."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._finished(key):
            # Whatever it said: these were judged with another time.
            write_sealed(self.folder / MARK, {"key": key, "of": of})
        mark, within = read_sealed(self.folder / MARK) or {}, self.section.verify_timeout
        if mark.get("key") != key:
            self._tell_loss(mark, of)
            for stale in (self.folder / "metrics.json", self.samples, *_parts(self.folder)):
                remove_file(stale)
            write_sealed(self.folder / MARK, {"key": key, "verify_timeout": within, "of": of})
            return []
        samples = _read_all(self.folder)
        if mark.get("verify_timeout") != within:
            say(f"{self.point}: {self.suite.name}: judged again, as verify_timeout is another: {len(samples)} answers")
            forget_timeout(self.folder)
            with Judge(within, self.section.verify_workers) as judge:
                samples = list(judged_again(judge, samples))
        # A line torn by the kill is dropped before anything is appended to it.
        write_samples(self.samples, samples)
        for part in _parts(self.folder):
            part.unlink()
        write_sealed(self.folder / MARK, {**mark, "verify_timeout": within})
        return samples

    def _tell_loss(self, mark: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """Say which answers are there that aren't to what is asked `now`, and what differs."""
        if not (lost := len(_read_all(self.folder))):
            return
        settings = (read_sealed(self.folder / "metrics.json") or {}).get("settings", {})
        before = mark.get("of") or {"settings": {k: v for k, v in settings.items() if k not in _APART}}
        old, new = before["settings"], now["settings"]
        names = [name for name in sorted({*old, *new}) if old and old.get(name) != new.get(name)]
        changed = [f"another {name} ({old.get(name)}, now {new.get(name)})" for name in names]
        changed += [text for part, text in _OTHERS.items() if part in before and before[part] != now[part]]
        why = ", ".join(changed) or "another model or other problems"
        answers = counted(lost, "answer")
        say(f"{self.point}: {self.suite.name}: {answers} in {self.folder} thrown away, to be made anew: {why}")

    def sum_up(self, start: _Start, seconds: float) -> dict[str, Any]:
        """Merge all processes' samples, and write the metrics."""
        samples = _read_all(self.folder)
        if missing := len(self.problems) * self.suite.samples_per_problem - len(samples):
            raise UserError(
                f"{missing} answers that were made aren't in {self.folder}: a disk has lost them. Run the same command "
                "again to make them anew."
            )
        write_samples(self.samples, samples)
        new = [sample for sample in samples if (sample["problem"], sample["sample"]) not in start.known]
        tokens = sum(sample["tokens"] for sample in new)
        metrics = {
            "key": start.key,
            "content": sha256_file(self.samples),
            "point": self.point,
            "suite": self.suite.name,
            **summarize(samples),
            "settings": self._settings(),
            "source": {name: value for name, value in self.origin.items() if name != "rows"},
            "of_problems": self.origin.get("rows"),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "seconds": round(seconds, 3),
            "generated_tokens": tokens,
            "tokens_per_second": round(tokens / seconds, 1) if tokens else None,
            "resumed_samples": len(start.known),
        }
        write_sealed(self.folder / "metrics.json", metrics)
        for part in _parts(self.folder):
            part.unlink()
        return metrics

    @contextmanager
    def plain_errors(self) -> Iterator[None]:
        """Turn a file that can't be read or written into a sentence."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"Evaluating {self.suite.name} stopped at {error.filename or self.folder}: {error.strerror or error}. "
                "What was answered so far is kept; run the same command again to go on."
            ) from error

    def _settings(self) -> dict[str, Any]:
        names = ("max_new_tokens", "temperature", "top_p", "samples_per_problem", "seed", "batch_size")
        settings = {name: getattr(self.suite, name) for name in names}
        if self.suite.max_length is not None:
            settings["max_length"] = self.suite.max_length
        return {**settings, "verify_timeout": self.section.verify_timeout, "example_prompt": self.prompts[0]}

    def _key(self, model_key: str, more: Mapping[str, Any] | None = None) -> str:
        """A hash of what the answers follow from, with `more` settings."""
        of = self._follows_from(model_key)
        return sha256_json([VERSION, of["model"], {**of["settings"], **(more or {})}, of["ends"], of["problems"]])

    def _follows_from(self, model_key: str) -> dict[str, Any]:
        """What the answers are a function of, part by part. The batch size isn't part of it, nor is how they are
        judged."""
        settings = {name: value for name, value in self._settings().items() if name not in _APART}
        asked = [
            [ids, problem.id, problem.gold, problem.group, problem.steps]
            for ids, problem in zip(self.ids, self.problems, strict=True)
        ]
        return {"model": model_key, "settings": settings, "ends": self.ends, "problems": sha256_json(asked)}

    def tasks(self, known: Container[tuple[int, int]]) -> list[_Task]:
        """The samples to make but for the known ones."""
        each = self.suite.samples_per_problem
        tasks = [_Task(p * each + s, p, s) for p in range(len(self.problems)) for s in range(each)]
        return [task for task in tasks if (task.problem, task.sample) not in known]


class _Making:
    """The samples of one suite being made by a crew, and the metrics in the end, where this process leads it."""

    def __init__(self, run: _SuiteRun, start: _Start, crew: Crew, progress: Progress | None) -> None:
        self.run, self.start, self.crew, self.progress = run, start, crew, progress
        units = units_of(run.tasks(start.known), [len(ids) for ids in run.ids], 1 + len(crew.others))
        self.share = Share(crew, run.suite.name, units, lambda: {_place(sample) for sample in _read_all(run.folder)})
        self.metrics: dict[str, Any] | None = None
        self._began: float | None = None
        self._told: tuple[int, int] | None = None

    def go_on(self) -> None:
        """Make what is left for this process; sum up when all is there, if that is for this process to do."""
        self._began = self._began or time.monotonic()
        with self.run.plain_errors():
            self._report()
            if tasks := self.share.claim(self.run.suite.batch_size):
                self._make(tasks)
            if self.metrics is None and self.crew.leads() and self.share.is_done():
                # One that led before may have done it, and died.
                self.metrics = self.run.look_up(self.start.key) or self.run.sum_up(
                    self.start, time.monotonic() - self._began
                )

    def _make(self, tasks: list[_Task]) -> None:
        name = f"samples-{self.crew.rank:05}.jsonl" if self.crew.others else "samples.jsonl"
        by_place = {_place(task): task for unit in self.share.units for task in unit}

        def recorded(sample: Sample) -> None:
            self.crew.count(self.run.suite.name, 1, _is_right(sample))
            self.share.record(by_place[_place(sample)], recorder.secure)
            self._report()

        with _Recorder(self.run, [], recorded, name) as recorder:
            self._generate(recorder, tasks)

    def _generate(self, recorder: _Recorder, tasks: list[_Task]) -> None:
        """Have the model answer `tasks`, and what else this process gets while there is room."""
        from sft.generate import Generation, generate_batch

        suite, ids = self.run.suite, self.run.ids
        first = [ids[task.problem] for task in tasks]
        requests = [task.number for task in tasks]

        def more(room: int) -> list[tuple[list[int], int]]:
            new = self.share.claim(room)
            tasks.extend(new)
            return [(ids[task.problem], task.number) for task in new]

        def on_done(index: int, generation: Generation) -> None:
            self.share.made()
            recorder.add(tasks[index], generation.ids, generation.finished)

        generate_batch(
            self.run.model,
            self.run.tokenizer,
            first,
            max_new_tokens=suite.max_new_tokens,
            max_length=suite.max_length,
            temperature=suite.temperature,
            top_p=suite.top_p,
            seed=suite.seed,
            batch_size=suite.batch_size,
            eos_ids=self.run.ends,
            requests=requests,
            on_done=on_done,
            more=more,
            longest=max(map(len, ids)),
        )

    def _report(self) -> None:
        """Show what all processes have done, where that is news."""
        total = len(self.run.problems) * self.run.suite.samples_per_problem
        done, right = self.crew.counts(self.run.suite.name) or (0, 0)
        known = self.start.known
        # What two processes have made, one of which was lost, counts twice until it is summed up.
        now = min(total, len(known) + done), min(total, sum(known.values()) + right)
        if self.progress is not None and now != self._told:
            self.progress(self.run.suite.name, now[0], total, now[1])
        self._told = now


class _Recorder:
    """Has completions checked while others are generated, and appends each to a file when its verdict is in.

    Args:
        samples: where what is recorded is put too.
        recorded: called with each.
        name: of the file, in the run's folder.
    """

    def __init__(
        self,
        run: _SuiteRun,
        samples: list[Sample],
        recorded: Callable[[Sample], None] | None,
        name: str = "samples.jsonl",
    ) -> None:
        self.run, self.samples, self.recorded, self.name = run, samples, recorded, name
        self._waiting: deque[tuple[Sample, Future[Verdict]]] = deque()

    def __enter__(self) -> _Recorder:
        section = self.run.section
        self._file: IO[str] = open(self.run.folder / self.name, "a", encoding="utf-8")
        self._judge = Judge(section.verify_timeout, max(1, section.verify_workers // beside()))
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

    def secure(self) -> None:
        """Bring what is recorded to the disk, where other machines see it."""
        os.fsync(self._file.fileno())

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
            if self.recorded is not None:
                self.recorded(sample)


def forget_timeout(folder: Path) -> None:
    """Note that samples are about to get other verdicts: those of a kill in between are judged again."""
    if (mark := read_sealed(folder / MARK)) is not None:
        write_sealed(folder / MARK, {name: value for name, value in mark.items() if name != "verify_timeout"})


def _parts(folder: Path) -> list[Path]:
    """The files of several processes' samples that aren't merged yet."""
    return sorted(folder.glob("samples-*.jsonl"))


def _read_all(folder: Path) -> list[Sample]:
    """The samples in a suite's folder, of all processes, each once."""
    files = [folder / "samples.jsonl", *_parts(folder)]
    return list({_place(sample): sample for file in files for sample in read_samples(file)}.values())


def _place(of: Sample | _Task) -> tuple[int, int]:
    """Which sample of which problem."""
    return (of.problem, of.sample) if isinstance(of, _Task) else (of["problem"], of["sample"])


def _is_right(sample: Sample) -> bool:
    return bool(sample["verdict"] == "right")


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
        for sample in sorted(samples, key=_place):
            handle.write(sample_line(sample))


def sample_line(sample: Sample) -> str:
    """A line of samples.jsonl, with a sum of itself: one changed byte in it is noticed."""
    return json.dumps({**sample, CHECK: _check(sample)}, ensure_ascii=False) + "\n"


def _check(sample: Sample) -> str:
    return sha256_json(sample)[:16]
