"""What an export claims on the Hub: read back by huggingface_hub's own parser; refused, with the reason, where the
protocol wasn't kept."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hub_server import TOKEN, HubServer
from huggingface_hub import EvalResultEntry, ModelCard, parse_eval_result_entries
from huggingface_hub.repocard_data import model_index_to_eval_results

from sft.data.read.hub import origin
from sft.hub.card import licence_problems, model_card
from sft.hub.folder import list_files
from sft.hub.push import push
from sft.hub.results import reason_against, results_of, write_results
from sft.recipe.schema import Source

COMMIT = "5503434ddd753f426f4b38109466949a1217c2bb"
PROMPT = "<|user|>Please reason step by step, and put your final answer within \\boxed{}. What?<|end|><|assistant|>"
FACTS = {
    "model_type": "phi4flash", "architecture": "Phi4FlashForCausalLM", "dtype": "bfloat16", "parameters": 3_852_562_944,
    "layers": 32, "hidden_size": 2560, "vocab_size": 200_064, "has_tokenizer": True, "has_template": True,
    "adapter_base": None, "transformers": "5.23.0", "merge": None, "reload": {"error": 2e-3},
}  # fmt: skip
METRICS: dict[str, Any] = {
    "point": "hard",
    "suite": "math500",
    "pass_at_1": 0.9245,
    "interval": [0.9, 0.94],
    "problems": 500,
    "samples": 4000,
    "cut_off": 0.012,
    "settings": {
        "max_new_tokens": 32768, "max_length": 32768, "temperature": 0.6, "top_p": 0.95, "samples_per_problem": 8,
        "seed": 0, "example_prompt": PROMPT,
    },
    "source": {"hub": "HuggingFaceH4/MATH-500", "config": None, "split": "test", "revision": COMMIT},
    "of_problems": 500,
}  # fmt: skip
DATA = {"funnel": None}
RECORD: dict[str, Any] = {
    "name": "mine",
    "start": {"kind": "hub", "model_name_or_path": "microsoft/Phi-4-mini-flash-reasoning"},
    "stages": [
        {
            "name": name,
            "done": True,
            "sources": [],
            "data": DATA,
            "train": {},
            "epochs": 1,
            "steps": 2,
            "final_loss": 1.0,
        }
        for name in ("broad", "hard")
    ],
    "evaluations": [METRICS],
}


def changed(**keys: Any) -> dict[str, Any]:
    """METRICS with other values; `settings__x` is one of the settings."""
    found = copy.deepcopy(METRICS)
    for key, value in keys.items():
        inside, _, name = key.rpartition("__")
        (found[inside] if inside else found)[name] = value
    return found


def test_a_claim_is_read_back_by_the_hub_s_parser(tmp_path: Path) -> None:
    metrics = tmp_path / "run/eval/hard/math500/metrics.json"
    metrics.parent.mkdir(parents=True)
    metrics.write_text("")
    os.utime(metrics, (1_795_000_000, 1_795_000_000))
    write_results(tmp_path, results_of(RECORD), tmp_path / "run")
    (path,) = (tmp_path / ".eval_results").iterdir()
    assert path.name == "math500.yaml"
    (entry,) = parse_eval_result_entries(yaml.safe_load(path.read_text()))
    assert isinstance(entry, EvalResultEntry)
    assert entry.dataset_id == "HuggingFaceH4/MATH-500" and entry.task_id == "default"
    assert entry.dataset_revision == COMMIT and entry.date == "2026-11-18T11:06:40Z"
    assert entry.value == METRICS["pass_at_1"]
    assert entry.notes is not None
    for told in ("8 samples a problem", "temperature 0.6", "32,768 tokens with the prompt", "1.2% cut off"):
        assert told in entry.notes


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"problems": 100}, "100 of 500 problems were asked"),
        ({"of_problems": None}, "of unknown problems were asked"),
        ({"settings__samples_per_problem": 1}, "1 of 8 answers to each problem were given"),
        ({"cut_off": 0.2}, "20.0% of the answers were cut off, more than 10%"),
        ({"settings__temperature": 0.0}, "temperature was 0.0, and math500 asks for 0.6"),
        ({"settings__max_length": 4096}, "max_length was 4096, and math500 asks for 32768"),
        ({"settings__example_prompt": "What?"}, "weren't asked with math500's prompt template"),
        ({"source": {}}, "aren't a data set of the Hub"),
    ],
)
def test_what_didn_t_keep_the_protocol_is_refused(keys: dict[str, Any], why: str) -> None:
    assert why in reason_against(changed(**keys))
    record = {**RECORD, "evaluations": [changed(**keys)]}
    results = results_of(record)
    assert not results.claimed and why in results.why_not["math500"]
    assert f"math500, since {results.why_not['math500']}" in model_card(record, FACTS)


def test_a_benchmark_without_a_packaged_suite_and_more_samples_than_asked() -> None:
    assert not reason_against(changed(source={**METRICS["source"], "hub": "some/benchmark"}, settings__temperature=0.0))
    assert not reason_against(changed(settings__samples_per_problem=16))


def test_results_of_other_points_are_not_claimed() -> None:
    for point in ("start", "broad"):
        assert not results_of({**RECORD, "evaluations": [changed(point=point)]}).claimed
    assert not results_of(None).claimed


def test_older_readers_and_who_wants_to_repeat_it() -> None:
    text = model_card(RECORD, FACTS)
    metadata = ModelCard(text).data.to_dict()
    name, (result,) = model_index_to_eval_results(yaml.safe_load(text.split("---")[1])["model-index"])
    assert (name, result.metric_value, result.dataset_revision) == ("mine", METRICS["pass_at_1"], COMMIT)
    assert metadata["license"] == "mit"
    assert "hf jobs run" in text and "sft eval --suite math500 --model" in text


def test_a_licence_that_forbids_uses_is_told() -> None:
    record = copy.deepcopy(RECORD)
    for licence, told in (("cc-by-nc-4.0", 1), ("CC BY-NC 4.0", 1), ("mit", 0), (None, 0), ("nccl-free", 0)):
        record["stages"][0]["sources"] = [{"name": "a/b", "hub": True, "license": licence}]
        found = licence_problems(record, FACTS)
        assert len(found) == told, licence
        assert all(f"a/b is licensed {licence}, which doesn't allow every use that mit does" in line for line in found)
        assert all(line in model_card(record, FACTS) for line in found)


def test_results_travel_and_are_checked(hub: HubServer, fake_export: Path, seal: Any) -> None:
    write_results(fake_export, results_of(RECORD), None)
    seal(fake_export)
    assert ".eval_results/math500.yaml" in {file.path for file in list_files(fake_export)}
    result = push(fake_export, "tester/model", endpoint=hub.endpoint, token=TOKEN, verify=False)
    assert ".eval_results/math500.yaml" in result.uploaded
    sent = hub.files("tester/model")[".eval_results/math500.yaml"]
    assert sent["size"] == (fake_export / ".eval_results/math500.yaml").stat().st_size


class Split:
    """What is read of a split that `datasets` has loaded."""

    split = "test"

    def __init__(self, checksums: dict[str, Any] | None) -> None:
        self.info = SimpleNamespace(download_checksums=checksums)

    def __len__(self) -> int:
        return 3


def test_the_commit_of_a_data_set() -> None:
    files: dict[str, Any] = {f"hf://datasets/a/b@{COMMIT}/{name}.parquet": {} for name in "xy"}
    other = {**files, f"hf://datasets/a/b@{'0' * 40}/z.parquet": {}}
    for checksums, revision in ((files, COMMIT), ({}, None), (None, None), (other, None)):
        split: Any = Split(checksums)
        told = origin(Source(path="a/b", split="test"), split)
        assert told == {"hub": "a/b", "config": None, "split": "test", "revision": revision, "rows": 3}
