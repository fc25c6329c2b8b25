# ruff: noqa: E501  (tables of messages read better with one case a line)
"""Typical mistakes: one sentence each, at its line, with exit status 2, before anything is read, trained or written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sft.cli.main import main
from sft.recipe import RunPaths, load_recipe
from sft.recipe.schema import SuiteSection
from sft.run.identity import settled_parts
from sft.utils.files import write_sealed

GOOD = """\
name: small
output_dir: run
model:
  tokenizer: tiny
  config: {hidden_size: 32, num_attention_heads: 4, num_key_value_heads: 2, num_hidden_layers: 4}
stages:
  - name: one
    data: {sources: [{path: rows.jsonl}]}
  - name: two
    data:
      sources:
        - path: rows.jsonl
      steps: [render]
    train:
      max_steps: 2
    evaluate:
      suites:
        - name: held
          source: {path: held.jsonl}
push: {private: true}
"""

SOURCE, STEPS, TRAIN = "- path: rows.jsonl", "steps: [render]", "max_steps: 2"
CONFIG = "config: {hidden_size: 32, num_attention_heads: 4, num_key_value_heads: 2, num_hidden_layers: 4}"
MODEL = f"tokenizer: tiny\n  {CONFIG}"
SUITE = "source: {path: held.jsonl}"
PROBLEMS = "- {path: rows.jsonl, rows: problems, carry: [g]}"
EXPLODE = "{explode_rollouts: {column: g}}"
DATA, SET, ASKED = "stages[1].data", "stages[1].train", "stages[1].evaluate.suites[0]"


@pytest.fixture
def folder(in_tmp: Path) -> Path:
    """What the good recipe needs, and things that are something else than they should be."""
    Path("rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    Path("held.jsonl").write_text(json.dumps({"problem": "a", "answer": "b"}) + "\n")
    for name, problem in (
        ("asks", {"problem": "a"}),
        ("void", {"problem": "a", "answer": ""}),
        ("forged", {"problem": "a<|end|>", "answer": "b"}),
    ):
        Path(f"{name}.jsonl").write_text(json.dumps(problem) + "\n")
    Path("torn.jsonl").write_text(Path("held.jsonl").read_text() + '{"problem": "a", "ans')
    Path("bad.json").write_text("{")
    Path("rows.txt").write_text("x")
    for name in ("empty", "weights"):
        Path(name).mkdir()
    return in_tmp


@pytest.fixture
def told(folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """The lines that a verb says of a recipe that it refuses; nothing is written."""

    def run(text: str, *words: str) -> list[str]:
        Path("r.yaml").write_text(text)
        before = sorted(folder.rglob("*"))
        assert main([*words, "--config", "r.yaml"]) == 2
        assert sorted(folder.rglob("*")) == before
        return capsys.readouterr().err.splitlines()

    return run


# What is replaced, by what, and the sentence.
MISTAKES = [
    (STEPS, "steps: [rendr]", f"{DATA}.steps[0].rendr: unknown key, did you mean render?"),
    (STEPS, "steps: [{mix: {weights: {rowz: 1}}}]", f"{DATA}.steps[0].mix.weights.rowz: the step mix speaks of a source 'rowz' that it doesn't get, did you mean rows?"),
    (STEPS, "steps: [{dedup: {prefer: [other]}}]", f"{DATA}.steps[0].dedup.prefer[0]: the step dedup speaks of a source 'other' that it doesn't get; the sources here: rows"),
    (STEPS, "steps: [{select: {quotas: {by: source, rows: {other: 1}}}}]", f"{DATA}.steps[0].select.quotas.rows.other: the step select speaks of a source 'other'"),
    (STEPS, "steps: [{filter: {column: lang, one_of: [en]}}]", f"{DATA}.steps[0].filter.column: the step filter uses the column 'lang', which rows must name under `carry`"),
    (STEPS, "steps: [verify]", f"{DATA}.steps[0].verify.gold: the step verify needs the answer of each row, and would drop all of rows"),
    (STEPS, "steps: [{quality: {finish_reason: why}}]", f"{DATA}.steps[0].quality.finish_reason: the step quality uses the column 'why'"),
    (STEPS, "steps: [{select: {pass_rate: {of: rollouts}}}]", f"{DATA}.steps[0].select.pass_rate: needs what explode_rollouts notes, and no such step comes before select"),
    (STEPS, "steps: [{select: {rows: 1, prefer: [teacher]}}]", f"{DATA}.steps[0].select.prefer[0]: needs what score notes"),
    (f"{SOURCE}\n      {STEPS}", f"{PROBLEMS}\n      steps: [{{mix: {{weights: {{rows: 1}}}}}}, {EXPLODE}]", f"{DATA}.steps[0].mix: the step mix needs answers, and the rows of rows have none yet: put it behind explode_rollouts or generate"),
    (f"{SOURCE}\n      {STEPS}", f"{PROBLEMS}\n      steps: [quality, {EXPLODE}]", f"{DATA}.steps[0].quality: the step quality needs answers"),
    (f"{SOURCE}\n      {STEPS}", f"{PROBLEMS}\n      steps: [{EXPLODE}, {{join: {{path: held.jsonl}}}}]", f"{DATA}.steps[1].join: the step join goes by the ids of the source, and explode_rollouts has changed them"),
    (SOURCE, PROBLEMS, f"{DATA}.sources[0].rows: the source rows has problems without answers, and no step gives them one"),
    (SOURCE, f"{SOURCE}\n        {SOURCE}", f"{DATA}.sources[1]: rows is named as a source 2 times with the same settings"),
    (SOURCE, "- {path: rows.jsonl, name: a}\n        - {path: held.jsonl, name: a}", f"{DATA}.sources[1].name: Two sources are called a"),
    (SOURCE, "- {path: rows.jsonl, completion_template: '{reasoning} {completion}'}", f"{DATA}.sources[0].completion_template: {{reasoning}} isn't filled in, {{completion}} alone is"),
    (SOURCE, "- {path: rows.jsonl, columns: {prompt: q, completion: a}, prompt_template: '{q}{prompt}'}", f"{DATA}.sources[0].prompt_template: {{q}} isn't filled in"),
    (SOURCE, "- {path: rows.jsonl, prompt_template: ask}", f"{DATA}.sources[0].prompt_template: must contain {{prompt}}"),
    (SOURCE, "- {path: rows.jsonl, columns: {messages: m, prompt: p}}", f"{DATA}.sources[0].columns: maps both messages and prompt/completion"),
    (SOURCE, f"{SOURCE}\n          columns: {{promt: prompt}}", f"{DATA}.sources[0].columns.promt: unknown key, did you mean prompt?"),
    (SOURCE, f"{SOURCE}\n          columns: {{prompt: promt, completion: completion}}", f"{DATA}.sources[0].columns: rows.jsonl: columns.prompt names a column 'promt' that isn't there; did you mean 'prompt'? It has: completion, prompt."),
    (SOURCE, f"{SOURCE}\n          carry: [tags]", f"{DATA}.sources[0].carry: rows.jsonl: `carry` names a column 'tags' that isn't there; it has: completion, prompt."),
    (SOURCE, "- path: held.jsonl", f"{DATA}.sources[0].path: held.jsonl: "),
    (STEPS, "validation: {sources: [{path: rows.jsonl, columns: {messages: chat}}]}", f"{DATA}.validation.sources[0].columns: rows.jsonl: columns.messages names a column 'chat' that isn't there"),
    (TRAIN, "loss: {weights: worth}", f"{DATA}.sources[0].path: rows.jsonl: `train.loss.weights` names a column 'worth' that isn't there"),
    (TRAIN, "distill: {weight: 0.5}", f"{SET}.distill: no step gives rows what a teacher finds likely: add top_logprobs"),
    (SOURCE, "- path: gone.jsonl", f"{DATA}.sources[0].path: gone.jsonl: no such file or folder"),
    (SOURCE, "- path: ./gone", f"{DATA}.sources[0].path: ./gone: no such file or folder"),
    (SOURCE, "- path: weights/gone", f"{DATA}.sources[0].path: no data set at weights/gone: no such file or folder"),
    (SOURCE, "- path: empty", f"{DATA}.sources[0].path: empty: no .jsonl"),
    (SOURCE, "- path: rows.txt", f"{DATA}.sources[0].path: rows.txt: unknown kind of data file"),
    (SOURCE, "- recipe: limo-v3", f"{DATA}.sources[0].recipe: limo-v3: no such data recipe file, and no packaged data recipe of that name, did you mean limo-v2?"),
    (STEPS, "steps: [{decontaminate: {against: [{name: a, path: gone.jsonl}]}}]", f"{DATA}.steps[0].decontaminate.against[0].path: gone.jsonl: no such file or folder"),
    (STEPS, "steps: [{join: {path: held.jsonl}}, {score: {model: ./gone}}]", f"{DATA}.steps[1].score.model: no model or tokenizer at ./gone"),
    (STEPS, "steps: [{top_logprobs: {model: ./gone}}]", f"{DATA}.steps[0].top_logprobs.model: no model or tokenizer at ./gone"),
    (STEPS, "steps: [{top_logprobs: {model: ./gone, column: c}}]", f"{DATA}.steps[0].top_logprobs.column: goes with a teacher that was asked elsewhere, and `model` is asked here"),
    (STEPS, "steps: [{top_logprobs: {k: 5}}]", f"{DATA}.steps[0].top_logprobs.k: has no effect without `model`"),
    (STEPS, "steps: [{generate: {mode: mixed, teacher: {base_url: 'http://x', model: m}, student: {checkpoint: ./gone}}}]", f"{DATA}.steps[0].generate.student.checkpoint: no model or tokenizer at ./gone"),
    (SUITE, "source: {path: gone.jsonl}", "stages[1].evaluate.suites[0].source.path: gone.jsonl: no such file or folder"),
    (SUITE, f"{SUITE}\n          prompt_template: solve", "stages[1].evaluate.suites[0].prompt_template: must contain {prompt}"),
    (SUITE, f"{SUITE}\n          columns: {{answer: nope}}", f"{ASKED}: there is no column 'nope' (for answer); the columns are answer, problem."),
    (SUITE, "source: {path: asks.jsonl}", f"{ASKED}: no column is the answer; set `columns: {{answer: ...}}` of the suite"),
    (SUITE, f"{SUITE}\n          choices: {{wrong: [zz]}}", f"{ASKED}: there is no column 'zz' (for choices.wrong)"),
    (SUITE, "source: {path: void.jsonl}", f"{ASKED}: void.jsonl:1: column 'answer' (answer) is empty or no text: ''"),
    (SUITE, "source: {path: torn.jsonl}", f"{ASKED}: torn.jsonl:2: "),
    (SUITE, "source: {path: forged.jsonl}", f"{ASKED}: problem forged.jsonl:1 spells out <|end|> (in the user message)"),
    (SUITE, f"{SUITE}\n          system_prompt: 'so <|end|>'", f"{ASKED}: problem held.jsonl:1 spells out <|end|> (in the system message)"),
    ("tokenizer: tiny", "tokenizer: ./gone", "model.tokenizer: no tokenizer at ./gone: no such file or folder"),
    ("tokenizer: tiny", "tokenizer: empty", "model.tokenizer: empty holds no tokenizer"),
    (MODEL, "model_name_or_path: weights/llama", "model.model_name_or_path: no model at weights/llama: no such file or folder"),
    (MODEL, "model_name_or_path: models/llama", "model.model_name_or_path: no model at models/llama: no such file or folder"),
    (MODEL, "model_name_or_path: weights", "model.model_name_or_path: weights is no model folder: it has no config.json"),
    (CONFIG, "config: {hiden_size: 32}", "model.config: 'hiden_size' is no key of a model's configuration, did you mean hidden_size?"),
    (CONFIG, CONFIG.replace("32", "33"), "model.config: hidden_size 33 is not a multiple of num_attention_heads 4"),
    (CONFIG, CONFIG.replace("32", "010"), "model.config: hidden_size must be a whole number"),
    (CONFIG, CONFIG.replace("32", "32, vocab_size: 9"), "model.config: model.config.vocab_size is 9, but the tokenizer gives ids up to"),
    (TRAIN, "max_steps: 010", f"{SET}.max_steps: must be a whole number, got '010'"),
    (TRAIN, "max_steps: 1:30", f"{SET}.max_steps: must be a whole number, got '1:30'"),
    (TRAIN, "optim: sgd\n      optim_args: nesterov=true", f"{SET}.optim_args: nesterov=true needs a momentum above 0"),
    (TRAIN, "optim: rmsprop\n      optim_args: alpha=1.5", f"{SET}.optim_args: alpha must be a number from 0 up to, but not, 1"),
    (TRAIN, "optim: muon\n      deepspeed: zero2", f"{SET}.optim: muon makes whole matrices orthogonal, and DeepSpeed hands an optimizer pieces"),
    (TRAIN, "optim: adamw_8bit", f"{SET}.optim: adamw_8bit is bitsandbytes', whose optimizers need an NVIDIA GPU: use adamw_torch_fused here"),
    (TRAIN, "optim: paged_lion_32bit", f"{SET}.optim: paged_lion_32bit is bitsandbytes', whose optimizers need an NVIDIA GPU"),
    (TRAIN, "param_groups: [{match: A_log, learning_rate: 1.0e-4}, {match: a_log, weight_decay: 0.1}]", f"{SET}.param_groups[1].match: no parameter's name holds 'a_log'"),
    (TRAIN, "param_groups: [{match: '*', weight_decay: 0.1}]", f"{SET}.param_groups[0].match: '*' is no regular expression"),
    (TRAIN, "lr_scheduler_type: cosine_with_min_lr", f"{SET}.lr_scheduler_kwargs: cosine_with_min_lr needs min_lr or min_lr_rate"),
    (TRAIN, "lr_scheduler_type: cosine_with_min_lr\n      lr_scheduler_kwargs: {min_lr: 1}", f"{SET}.lr_scheduler_kwargs.min_lr: is above learning_rate"),
    (TRAIN, "lr_scheduler_type: inverse_sqrt\n      lr_scheduler_kwargs: {timescale: 0}", f"{SET}.lr_scheduler_kwargs.timescale: must be above 0"),
    (TRAIN, "lr_scheduler_type: warmup_stable_decay\n      lr_scheduler_kwargs: {num_decay_steps: 1.5}", f"{SET}.lr_scheduler_kwargs.num_decay_steps: must be a whole number of steps"),
    (TRAIN, "max_steps: 2\n    average: {last: 3}", "stages[1].average.last: needs 3 checkpoints, and save_total_limit keeps 2: raise it"),
    (TRAIN, "max_steps: 2\n    average: {with: start}", "stages[1].average.with: goes with weight"),
    (TRAIN, "max_steps: 2\n    average: {checkpoints: [1]}", "stages[1].average.checkpoints[0]: no checkpoint is saved at step 1"),
    (TRAIN, "max_steps: 2\n    keep_best: hold", "stages[1].keep_best: names no suite of this stage: held"),
    (TRAIN, "max_steps: 2\n    stop_when: {metric: held, patience: 2}", "stages[1].stop_when.metric: names no suite that is asked while the stage trains: set `evaluate: {every"),
    (TRAIN, "deepspeed: zero3\n      ema: {decay: 0.9}", f"{SET}.ema: can't be kept under ZeRO-3"),
    (TRAIN, "report_to: wandbb", f"{SET}.report_to: 'wandbb' is no tracker, did you mean wandb?"),
    (TRAIN, "report_to: flyte", f"{SET}.report_to: 'flyte' isn't installed; here are "),
    (TRAIN, "trackio_space_id: me/page", f"{SET}.trackio_space_id: has no effect without `report_to: trackio`"),
    (TRAIN, "report_to: trackio\n      trackio_space_id: page", f"{SET}.trackio_space_id: is no Space, got 'page': my-name/my-metrics"),
    (TRAIN, "report_to: trackio\n      trackio_space_id: me/page", f"{SET}.trackio_space_id: is on the Hub, and nobody is logged in"),
    (TRAIN, "trackio_bucket_id: rows", f"{SET}.trackio_bucket_id: has no effect without trackio_space_id"),
    (TRAIN, "deepspeed: bad.json", f"{SET}.deepspeed: bad.json can't be read as JSON"),
    (TRAIN, "deepspeed: {zero_optimization: {stage: 7}}", f"{SET}.deepspeed: zero_optimization.stage must be 0, 1, 2 or 3"),
    (TRAIN, "use_peft: true\n      lora_target_modules: [q_proj]", f"{SET}.lora_target_modules: no module is called 'q_proj'"),
    ("output_dir: run", "output_dir: rows.jsonl/run", "output_dir: rows.jsonl is no folder"),
    ("push: {private: true}", "push: {repo_id: a b}", "push.repo_id: is no Hub id, got 'a b'"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "sentence"), MISTAKES)
def test_a_mistake_of_a_later_stage_is_one_sentence(
    told: Callable[..., list[str]], old: str, new: str, sentence: str
) -> None:
    assert old in GOOD
    head, _, tail = GOOD.rpartition(old)
    (line,) = told(f"{head}{new}{tail}", "run", "--dry_run")
    place, _, said = line.removeprefix("sft: r.yaml:").partition(": ")
    assert said.startswith(sentence), line
    assert 1 <= int(place) <= (head + new).count("\n") + 1, line


@pytest.mark.parametrize(
    "verb", ["run", "train", "prepare", "preview", "eval", "export", "push", "report", "chat", "serve"]
)
def test_every_verb_tells_what_the_recipe_itself_tells(told: Callable[..., list[str]], verb: str) -> None:
    (line,) = told(GOOD.replace(STEPS, "steps: [{mix: {weights: {rowz: 1}}}]"), verb)
    assert line.startswith("sft: r.yaml:13: stages[1].data.steps[0].mix.weights.rowz: the step mix speaks of"), line


@pytest.mark.parametrize(("verb", "piece"), [("run", SUITE), ("eval", SUITE), ("prepare", SOURCE), ("train", SOURCE)])
def test_a_verb_tells_at_once_which_files_it_will_miss(told: Callable[..., list[str]], verb: str, piece: str) -> None:
    (line,) = told(piece.join(GOOD.rsplit(piece, 1)).replace(piece, piece.replace(".jsonl", ".parquet")), verb)
    assert "no such file or folder" in line and line.startswith("sft: r.yaml:"), line


@pytest.mark.parametrize(("key", "package"), [("optim: adamw_8bit", "bitsandbytes"), ("deepspeed: zero2", "deepspeed")])
def test_a_missing_package_is_told(
    told: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, key: str, package: str
) -> None:
    from importlib import util

    there = util.find_spec
    if package == "bitsandbytes":
        monkeypatch.setattr("sft.train.arguments._has_cuda", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == package else there(name, *rest))
    (line,) = told(GOOD.replace(TRAIN, key), "run", "--dry_run")
    assert line.startswith(f"sft: r.yaml:15: {SET}.{key.split(':')[0]}: ") and f"pip install {package}" in line, line


def test_all_that_is_wrong_is_told_at_once(told: Callable[..., list[str]]) -> None:
    text = GOOD.replace("tokenizer: tiny", "tokenizer: ./gone").replace("held.jsonl", "gone.jsonl")
    lines = told(text.replace(TRAIN, "report_to: wandbb"), "run", "--dry_run")
    assert [line.split(":")[2] for line in lines] == ["4", "15", "19"], lines


def test_one_wrong_number_hides_no_other_mistake(told: Callable[..., list[str]]) -> None:
    schedule = "lr_scheduler_type: cosine_with_min_lr\n      lr_scheduler_kwargs: {min_lr: -1, num_cycles: x, foo: 1}"
    assert [line.split(": ")[2].rpartition(".")[2] for line in told(GOOD.replace(TRAIN, schedule), "report")] == [
        *("min_lr", "num_cycles", "foo")
    ]


def test_a_hub_that_cannot_be_asked_stops_a_run_at_once_and_no_rehearsal(
    told: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def unreachable(self: object, name: str, **options: object) -> None:
        asked.append(name)
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    text = GOOD.replace(MODEL, "model_name_or_path: someone/nowhere")
    (line,) = told(text, "run")
    assert asked == ["someone/nowhere"]
    assert line.startswith("sft: r.yaml:4: model.model_name_or_path: no model folder someone/nowhere here"), line
    assert main(["run", "--config", "r.yaml", "--dry_run"]) == 0
    assert "model.model_name_or_path: not checked: " in capsys.readouterr().err


def test_suites_are_read_once_and_those_of_the_hub_not_at_all(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sft.evaluate import suites

    read, load = [], suites.load_suite

    def counted(suite: SuiteSection) -> tuple[list[suites.Problem], dict[str, object]]:
        read.append(suite.name)
        return load(suite)

    monkeypatch.setattr(suites, "load_suite", counted)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *a, **k: None)
    asked = "\n    evaluate: {suites: [{name: held, source: {path: held.jsonl}}, tiny, math500]}"
    text, data = GOOD.replace(SUITE, f"{SUITE}\n          temperature: 1.0"), "{sources: [{path: rows.jsonl}]}"
    Path("r.yaml").write_text(text.replace(data, data + asked))
    assert main(["run", "r.yaml", "--dry_run"]) == 0, capsys.readouterr().err
    assert read == ["held", "tiny"]


def test_a_rehearsal_tells_what_will_be_done(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = "{per_device_train_batch_size: 2, gradient_accumulation_steps: 3, packing: true, max_length: 64}"
    Path("r.yaml").write_text(GOOD.replace("max_steps: 2", f"<<: {train}\n      max_steps: 2"))
    Path("run/stages/two/checkpoint-7").mkdir(parents=True)
    assert main(["run", "r.yaml", "--dry_run"]) == 0
    out, err = capsys.readouterr()
    assert out == "run/resolved.yaml\n"
    for piece in (
        "small: 2 stages in run, from random weights",
        "1. one: to do",
        "2. two: under way, saved at step 7",
        "sources: rows",
        "then all: render",
        "2 steps, effective batch 6 packs of up to 64 tokens (2 a process x 3 accumulated x 1 process)",
        "suite: held at two",
        "no push",
    ):
        assert piece in err, (piece, err)


def test_a_rehearsal_tells_of_a_stage_that_is_done_with_other_settings(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the run itself would; --restart throws the stage away, so it is no obstacle."""
    Path("r.yaml").write_text(GOOD)
    recipe = load_recipe("r.yaml")
    paths = RunPaths(recipe)
    for stage in recipe.stages:
        write_sealed(paths.stage_manifest(stage.name), {"parts": settled_parts(paths, stage), "steps": 2})
    assert main(["run", "r.yaml", "--dry_run"]) == 0
    assert "2. two: done already (2 steps)" in capsys.readouterr().err
    changed = ["r.yaml", "--dry_run", "--stages.two.train.max_steps", "3"]
    for verb in ("run", "train"):
        assert main([verb, *changed]) == 1
        err = capsys.readouterr().err
        assert "Stage two is done, but with other settings: train.max_steps was 2, is now 3" in err, err
        assert main([verb, *changed, "--restart", "two"]) == 0
        err = capsys.readouterr().err
        assert "1. one: done already (2 steps)" in err and "2. two: to do again" in err, err
    assert main(["prepare", *changed]) == 0


@pytest.mark.parametrize("words", [["chat"], ["serve"], ["eval", "r.yaml"], ["export", "--out", "o"]])
def test_a_model_that_is_not_there_is_told_of_its_option(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    Path("r.yaml").write_text(GOOD)
    assert main([*words, "--model", "./gone"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sft: --model: no model ") and "./gone" in line, line


def test_a_rehearsal_of_a_stage_tells_of_that_stage_and_its_engine(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("r.yaml").write_text(GOOD)
    assert main(["run", "r.yaml", "--dry_run", "--stage", "two", "--stages.two.train.deepspeed", "zero2"]) == 0
    err = capsys.readouterr().err
    assert "2. two: to do" in err and "1. one" not in err and "then: export" not in err, err
    assert "training: all weights, 2 steps, DeepSpeed zero2, effective batch" in err, err


@pytest.mark.parametrize(("asked", "status"), [("2", 0), ("4", 0), ("3", 2), ("1", 2)])
@pytest.mark.parametrize("verb", ["run", "train", "sweep"])
def test_a_rehearsal_knows_the_processes_that_share_a_row(
    folder: Path, capsys: pytest.CaptureFixture[str], verb: str, asked: str, status: int
) -> None:
    Path("r.yaml").write_text(GOOD.replace(TRAIN, f"{TRAIN}\n      packing: true\n      sequence_parallel_size: 2"))
    swept = ["--stages.two.train.learning_rate", "1e-5,2e-5", "--metric", "held"] if verb == "sweep" else []
    assert main([verb, "r.yaml", "--num_processes", asked, "--dry_run", *swept]) == status
    err = capsys.readouterr().err
    refused = f"the run has {asked}: start a multiple of 2 (--num_processes, torchrun --nproc_per_node), or lower it"
    assert (refused in err) == (status == 2), err
    if status == 0 and verb != "sweep":
        assert f"accumulated x {int(asked) // 2} group" in err, err


@pytest.mark.parametrize("words", [["r.yaml"], ["--seed", "3", "r.yaml"], ["r.yaml", "--seed=3"], ["--stage", "one", "r.yaml"]])  # fmt: skip
@pytest.mark.parametrize("verb", ["run", "prepare", "report"])
def test_a_recipe_needs_no_config(
    folder: Path, capsys: pytest.CaptureFixture[str], verb: str, words: list[str]
) -> None:
    if verb == "report" and "--stage" in words:
        words = ["r.yaml"]
    Path("r.yaml").write_text(GOOD)
    assert main([verb, *words, "--dry_run"]) == 0, capsys.readouterr().err
    assert ("seed: 3" in Path("run/resolved.yaml").read_text()) == any("3" in word for word in words)


@pytest.mark.parametrize(("made_by", "status"), [("one", 0), ("two", 2), ("three", 2)])
def test_a_model_that_an_earlier_stage_will_make_is_not_missed(
    folder: Path, capsys: pytest.CaptureFixture[str], made_by: str, status: int
) -> None:
    student = f"student: {{checkpoint: run/stages/{made_by}/final}}"
    step = f"steps: [{{generate: {{mode: mixed, teacher: {{base_url: 'http://x', model: m}}, {student}}}}}]"
    Path("r.yaml").write_text(GOOD.replace(STEPS, step))
    assert main(["run", "--config", "r.yaml", "--dry_run"]) == status, capsys.readouterr().err
