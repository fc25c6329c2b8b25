"""Results with standing: what an export claims on the Hub, a file a suite, and why it doesn't claim the rest.

The files are `.eval_results/SUITE.yaml` in the Hub's form (huggingface.co/docs/hub/eval-results), made by
huggingface_hub's own classes; the value is `pass_at_1` of metrics.json, a share. A result is claimed where all of a
data set of the Hub was asked, and as its packaged suite asks where there is one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import yaml

import sft
from sft.hub.folder import RESULTS
from sft.recipe.schema import SuiteSection
from sft.utils.files import write_text

MOST_CUT_OFF = 0.1
"""The share of answers from which on too many were cut off: what they would have come to isn't known."""
_AS_ASKED = ("temperature", "top_p", "max_length")


@dataclass(frozen=True)
class Results:
    """`claimed`: the records of evaluations (`provenance.run_record`) by suite; `why_not`: of the others, by suite."""

    claimed: dict[str, dict[str, Any]] = field(default_factory=dict)
    why_not: dict[str, str] = field(default_factory=dict)


def results_of(record: dict[str, Any] | None) -> Results:
    """What is claimed of the evaluations of the model that a run's record tells of: those after its last stage."""
    stages = [stage["name"] for stage in (record or {}).get("stages") or [] if stage["done"]]
    results = Results()
    for found in (record or {}).get("evaluations") or []:
        if not stages or found["point"] != stages[-1]:
            continue
        if why := reason_against(found):
            results.why_not[found["suite"]] = why
        else:
            results.claimed[found["suite"]] = found
    return results


def reason_against(found: dict[str, Any]) -> str:
    """Why a result isn't claimed; empty where it is."""
    source, settings = found.get("source") or {}, found.get("settings") or {}
    if "hub" not in source:
        return "its problems aren't a data set of the Hub"
    if found.get("of_problems") is None or found["problems"] < found["of_problems"]:
        return f"{found['problems']} of {found.get('of_problems') or 'unknown'} problems were asked"
    if found.get("cut_off", 1.0) > MOST_CUT_OFF:
        return f"{found['cut_off']:.1%} of the answers were cut off, more than {MOST_CUT_OFF:.0%}"
    protocol = protocols().get((source["hub"], source.get("config")))
    return "" if protocol is None else _difference(settings, protocol)


def _difference(settings: dict[str, Any], protocol: SuiteSection) -> str:
    """What of the packaged suite's protocol wasn't kept."""
    samples = settings.get("samples_per_problem", 1)
    if samples < protocol.samples_per_problem:
        return f"{samples} of {protocol.samples_per_problem} answers to each problem were given"
    for name in _AS_ASKED:
        wanted = getattr(protocol, name)
        if settings.get(name) != wanted:
            return f"{name} was {settings.get(name)}, and {protocol.name} asks for {wanted}"
    front = (protocol.prompt_template or "").partition("{prompt}")[0]
    if front and front not in settings.get("example_prompt", ""):
        return f"the problems weren't asked with {protocol.name}'s prompt template"
    return ""


@cache
def protocols() -> dict[tuple[str, str | None], SuiteSection]:
    """The packaged suites whose problems are a data set of the Hub, by its id and configuration."""
    from sft.recipe.packaged import list_suites
    from sft.recipe.suites import load_suites

    found = {}
    for entry in list_suites():
        suite = load_suites([entry.name]).suites[0]
        if suite.source.path is not None:
            found[suite.source.path, suite.source.config] = suite
    return found


def write_results(folder: Path, results: Results, run: Path | None) -> None:
    """`.eval_results/SUITE.yaml` for each that is claimed by the run in folder `run`, in an export's folder."""
    from huggingface_hub import eval_result_entries_to_yaml

    for suite, found in results.claimed.items():
        entry = eval_result_entries_to_yaml([entry_of(found, run)])
        (folder / RESULTS).mkdir(exist_ok=True)
        write_text(folder / RESULTS / f"{suite}.yaml", yaml.safe_dump(entry, sort_keys=False, allow_unicode=True))


def entry_of(found: dict[str, Any], run: Path | None) -> Any:
    """The huggingface_hub.EvalResultEntry of a result that is claimed; its date is that of metrics.json in `run`."""
    from huggingface_hub import EvalResultEntry

    source, date = found["source"], None
    metrics = None if run is None else run / "eval" / found["point"] / found["suite"] / "metrics.json"
    if metrics is not None and metrics.is_file():
        date = datetime.fromtimestamp(metrics.stat().st_mtime, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return EvalResultEntry(
        dataset_id=source["hub"],
        task_id=source.get("config") or "default",
        value=found["pass_at_1"],
        dataset_revision=source.get("revision"),
        date=date,
        notes=notes_of(found),
    )


def notes_of(found: dict[str, Any]) -> str:
    """How a result was come by, in a line."""
    settings, (low, high) = found["settings"], found["interval"]
    drawn = f"temperature {settings['temperature']:g}, top-p {settings['top_p']:g}"
    limit = settings.get("max_length")
    length = f"{limit:,} tokens with the prompt" if limit else f"{settings['max_new_tokens']:,} tokens"
    return (
        f"pass@1, 95% interval {low:.4f} to {high:.4f}; {settings['samples_per_problem']} samples a problem, "
        f"{drawn if settings['temperature'] else 'greedy'}, up to {length}, {found['cut_off']:.1%} cut off; "
        f"seed {settings['seed']}; sambay-sft {sft.__version__}"
    )


def model_index(name: str, results: Results) -> list[dict[str, Any]] | None:
    """The same for readers of the older form, in a card's metadata; None where nothing is claimed."""
    from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index

    told = [
        EvalResult(
            task_type="text-generation",
            dataset_type=found["source"]["hub"],
            dataset_name=suite,
            dataset_config=found["source"].get("config"),
            dataset_split=found["source"].get("split"),
            dataset_revision=found["source"].get("revision"),
            metric_type="pass@1",
            metric_value=found["pass_at_1"],
        )
        for suite, found in results.claimed.items()
    ]
    found_index: list[dict[str, Any]] = eval_results_to_model_index(name, told) if told else []
    return found_index or None
