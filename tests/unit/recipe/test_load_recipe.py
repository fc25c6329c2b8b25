# ruff: noqa: E501, RUF005  (tables of messages read better with one case a line)
"""Recipes: what is filled in, what is overridden, and what every mistake is told as."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from child_time import run_timed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sft.recipe import Recipe, RunPaths, environment, load_recipe, resolved_yaml
from sft.recipe.train_keys import LORA_KEYS, PREPARED_KEYS
from sft.utils.errors import UsageError

GOOD = """\
name: good
output_dir: runs/good
seed: 7
variables: {data: rows.jsonl}
model:
  tokenizer: tiny
  config: {hidden_size: 64}
defaults:
  train: {lr_scheduler_type: warmup_stable_decay,
    learning_rate: 1e-4,
    lr_scheduler_kwargs: {num_decay_steps: 1, num_cycles: 2}}
  evaluate:
    suites:
      - name: held-out
        source: {path: "${data}", split: test}
stages:
  - name: first
    data:
      sources:
        - path: ${data}
    train:
      max_steps: 5
  - name: second
    data:
      sources:
        - generate: {rows: 5}
    train:
      learning_rate: 5
      lr_scheduler_kwargs: {num_cycles: 3}
      packing: true
"""


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """Load a recipe from text; its file is called r.yaml."""

    def loader(text: str = GOOD, overrides: Sequence[str] = ()) -> Recipe:
        path = tmp_path / "r.yaml"
        path.write_text(text)
        return load_recipe(path, overrides)

    return loader


@pytest.fixture
def problems(load: Any, tmp_path: Path) -> Any:
    """The lines of the error that a recipe gives, without the folder."""

    def lines(text: str = GOOD, overrides: Sequence[str] = ()) -> list[str]:
        with pytest.raises(UsageError) as caught:
            load(text, overrides)
        return str(caught.value).replace(f"{tmp_path}/", "").splitlines()

    return lines


def swapped(old: str, new: str) -> str:
    """GOOD with one piece of text replaced."""
    assert GOOD.count(old) == 1, old
    return GOOD.replace(old, new)


# ---- what is filled in ----


def test_defaults_are_merged_and_the_stage_wins(load: Any) -> None:
    first, second = load().stages
    assert (first.train.learning_rate, second.train.learning_rate) == (1e-4, 5.0)
    assert first.train.lr_scheduler_kwargs == {"num_decay_steps": 1, "num_cycles": 2}
    assert second.train.lr_scheduler_kwargs == {"num_decay_steps": 1, "num_cycles": 3}
    assert [stage.evaluate.suites[0].source.path for stage in (first, second)] == ["rows.jsonl", "rows.jsonl"]


def test_stages_do_not_share_what_defaults_gave_them(load: Any) -> None:
    first, second = load().stages
    first.evaluate.suites[0].source.path = "other"
    assert second.evaluate.suites[0].source.path == "rows.jsonl"


def test_arguments_are_all_keys_without_lora(load: Any) -> None:
    recipe = load(swapped("max_steps: 5", "use_peft: true\n      lora_r: 4\n      max_steps: 5"))
    arguments = recipe.stages[0].train.arguments(cuda=False, bf16=False)
    schedule = {"num_decay_steps": 1, "num_cycles": 2}
    set_by_recipe = {"learning_rate": 1e-4, "lr_scheduler_kwargs": schedule, "max_steps": 5, "seed": 7}
    assert {key: arguments[key] for key in set_by_recipe} == set_by_recipe
    assert set(arguments) == set(type(recipe.stages[0].train).model_fields) - LORA_KEYS - PREPARED_KEYS
    assert recipe.stages[0].train.lora_r == 4
    assert recipe.stages[1].train.max_length == 1024


def test_resolved_recipe_loads_to_the_same_recipe(load: Any) -> None:
    recipe = load()
    assert load(resolved_yaml(recipe)) == recipe
    assert recipe.defaults.train == {} and recipe.variables == {}


@pytest.mark.parametrize("text", ["1e-4", "true", "null", "12", "a: b", "# no", "two\nlines", "- x", "é “”", "", "~"])
def test_resolved_recipe_keeps_text_as_text(load: Any, text: str) -> None:
    recipe = load().model_copy(update={"description": text})
    assert load(resolved_yaml(recipe)).description == text


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=30).filter(str.isprintable), number=st.floats(allow_nan=False, allow_infinity=False))
def test_resolved_recipe_keeps_any_text_and_number(load: Any, text: str, number: float) -> None:
    recipe = load().model_copy(deep=True, update={"description": text.replace("${", "$ {")})
    recipe.model.config = {"x": [number, text.replace("${", "")], "y": {"z": None}}
    assert load(resolved_yaml(recipe)) == recipe


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    start=st.integers(0, len(GOOD)),
    length=st.integers(0, 40),
    junk=st.text(alphabet="{}[]:-#&*!|>'\"%@`,? \n\tax1$", max_size=8),
)
def test_mangled_recipes_load_or_are_refused_in_lines_that_name_the_file(
    load: Any, start: int, length: int, junk: str
) -> None:
    try:
        load(GOOD[:start] + junk + GOOD[start + length :])
    except UsageError as error:
        assert all(" " in line and "r.yaml" in line for line in str(error).splitlines()), str(error)


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("2E5", 2e5), (".5", 0.5), ("1_000", 1000), ("-3", -3), ("yes", "yes")]
)
def test_yaml_numbers(load: Any, text: str, value: object) -> None:
    recipe = load(swapped("{hidden_size: 64}", f"{{hidden_size: {text}}}"))
    assert recipe.model.config == {"hidden_size": value}


# ---- overrides ----


def test_overrides_by_name_index_all_and_later_wins(load: Any) -> None:
    recipe = load(
        GOOD,
        [
            "--stages.first.train.learning_rate",
            "2e-5",
            "--stages.1.train.max_steps=9",
            "--stages.all.train.bf16",
            "false",
        ]
        + ["--seed", "1", "--seed=2", "--stages.all.evaluate.suites.held-out.max_problems", "3"],
    )
    first, second = recipe.stages
    assert first.train.learning_rate == 2e-5 and second.train.max_steps == 9 and recipe.seed == 2
    assert first.train.bf16 is False and second.train.bf16 is False
    assert [stage.evaluate.suites[0].max_problems for stage in recipe.stages] == [3, 3]


def test_override_of_defaults_leaves_a_stage_its_own(load: Any) -> None:
    first, second = load(GOOD, ["--defaults.train.learning_rate", "3"]).stages
    assert (first.train.learning_rate, second.train.learning_rate) == (3, 5)


def test_override_makes_missing_sections_and_takes_yaml(load: Any) -> None:
    recipe = load(
        GOOD,
        ["--push.repo_id", "me/it", "--stages.second.train.lora_target_modules", "[a, b]"]
        + ["--stages.second.train.use_peft", "true", "--report.title", "a: b"],
    )
    assert recipe.push.repo_id == "me/it" and recipe.stages[1].train.lora_target_modules == ["a", "b"]


def test_one_variable_serves_training_and_evaluation(load: Any) -> None:
    recipe = load(GOOD, ["--variables.data", "/there"])
    assert recipe.stages[0].data.sources[0].path == "/there"
    assert recipe.stages[1].evaluate.suites[0].source.path == "/there"


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["--train.learning_rate", "1"], "--train.learning_rate: unknown key here: it is set of a stage, stages.NAME.train, or of all, defaults.train"),
        (["--stages.first.train.learning_rat", "1"], "--stages.first.train.learning_rat: unknown key, did you mean learning_rate?"),
        (["--sed", "1"], "--sed: unknown key, did you mean seed?"),
        (["--train.learning_rate", "1"], "--train.learning_rate: unknown key here: it is set of a stage, stages.NAME.train, or of all, defaults.train"),
        (["--repo_id", "a/b"], "--repo_id: unknown key, did you mean push.repo_id?"),
        (["--seed", "x"], "--seed: must be a whole number, got 'x'"),
        (["--seed"], "--seed: needs a value, e.g. --seed true"),
        (["--seed", "--name", "x"], "--seed: needs a value, e.g. --seed true"),
        (["seed", "1"], "'seed': expected --key value; a key of the recipe starts with two dashes"),
        (["--a..b", "1"], "--a..b: an override is written --section.key value"),
        (["--stages.third.name", "x"], "--stages.third.name: stages has no 'third'; there are: first, second"),
        (["--stages.7.name", "x"], "--stages.7.name: stages has no '7'; there are: first, second"),
        (["--seed.deep", "1"], "--seed.deep: seed is 7, which has no keys"),
        (["--variables.dta", "x"], "--variables.dta: no ${dta} in this recipe, did you mean data?"),
        (["--model", "[1]"], "--model: must be a mapping, got a list"),
    ],
)  # fmt: skip
def test_wrong_overrides(problems: Any, overrides: list[str], line: str) -> None:
    assert problems(GOOD, overrides) == [line]


# ---- mistakes ----


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("max_steps: 5", "max_step: 5", "r.yaml:22: stages[0].train.max_step: unknown key, did you mean max_steps?"),
        ("max_steps: 5", "max_steps: 5.5", "r.yaml:22: stages[0].train.max_steps: must be a whole number, got 5.5"),
        ("max_steps: 5", "max_steps: '5'", "r.yaml:22: stages[0].train.max_steps: must be a whole number, got '5'"),
        ("packing: true", "packing: yes", "r.yaml:30: stages[1].train.packing: must be true or false, got 'yes'"),
        ("rows: 5", "rows: 0", "r.yaml:26: stages[1].data.sources[0].generate.rows: must be greater than 0, got 0"),
        ("seed: 7", "sead: 7", "r.yaml:3: sead: unknown key, did you mean seed?"),
        ("seed: 7", "seed: true", "r.yaml:3: seed: must be a whole number, got true"),
        ("tokenizer: tiny", "tokenizer: 5", "r.yaml:6: model.tokenizer: must be text, got 5; put it in quotes"),
        ("name: good", "name: a/b", "r.yaml:1: name: may have letters, digits, '.', '_' and '-' only, got 'a/b'"),
        ("name: good\n", "", "r.yaml:1: name: is missing"),
        ("    learning_rate: 1e-4", "    lerning_rate: 1", "r.yaml:10: defaults.train.lerning_rate: unknown key, did you mean learning_rate?"),
        ("name: second", "name: first", "r.yaml:23: stages[1].name: 'first' is the name of stages[0] already"),
        ("name: second", "name: start", "r.yaml:23: stages[1].name: can't be 'start': `sft` uses that word itself"),
        ("name: second", "name: '3'", "r.yaml:23: stages[1].name: can't be '3': `sft` uses that word itself"),
        ("- path: ${data}", "- split: x", "r.yaml:20: stages[0].data.sources[0]: needs exactly one of path (a Hub id or local files), recipe and generate (generated problems)"),
        ("- path: ${data}", "- path: ${dta}", "r.yaml:20: stages[0].data.sources[0].path: no variable ${dta}, did you mean data?"),
        ("  config: {hidden_size: 64}\n", "", "r.yaml:5: model: needs exactly one of model_name_or_path (a checkpoint) and config (a model built from scratch)"),
        ("  tokenizer: tiny\n", "", "r.yaml:5: model.tokenizer: a model built from scratch needs a tokenizer: a folder, a Hub id, or `tiny`"),
        ("max_steps: 5", "output_dir: x", "r.yaml:22: stages[0].train.output_dir: is not for recipes: set the recipe's own `output_dir`; each stage gets a folder in it"),
        ("max_steps: 5", "packing_strategy: wrapped", "r.yaml:22: stages[0].train.packing_strategy: must be bfd: `wrapped` cuts documents anywhere and lets them see one another"),
        ("max_steps: 5", "lora_r: 4", "r.yaml:22: stages[0].train.lora_r: has no effect without `use_peft: true`"),
        ("max_steps: 5", "deepspeed: zero9", "r.yaml:22: stages[0].train.deepspeed: no file 'zero9'; zero1, zero2 and zero3 come with the tool"),
        ("max_steps: 5", "report_to: 3", "r.yaml:22: stages[0].train.report_to: must be text or a list, got 3"),
        ("max_steps: 5", "lr_scheduler_type: cosin", None),
        ("num_cycles: 3", "num_cylces: 3", "r.yaml:29: stages[1].train.lr_scheduler_kwargs.num_cylces: warmup_stable_decay takes num_decay_steps, num_stable_steps, warmup_type, decay_type, min_lr_ratio, num_cycles"),
        ("num_cycles: 3", "decay_type: square", "r.yaml:29: stages[1].train.lr_scheduler_kwargs.decay_type: must be one of linear, cosine, 1-sqrt"),
        ("num_cycles: 3", "min_lr_ratio: -1", "r.yaml:29: stages[1].train.lr_scheduler_kwargs.min_lr_ratio: must be a number from 0 up"),
        ("max_steps: 5", "lr_scheduler_kwargs: {num_decay_steps: 0}", "r.yaml:22: stages[0].train.lr_scheduler_kwargs: warmup_stable_decay needs num_decay_steps, the length of its last part"),
        ("      - name: held-out", "      - nam: held-out", "r.yaml:14: defaults.evaluate.suites[0].nam: unknown key, did you mean name?"),
        ("{num_cycles: 3}", "{num_cycles: 3, num_cycles: 4}", "r.yaml:29: stages[1].train.lr_scheduler_kwargs.num_cycles: is set twice, first in line 29"),
        ("seed: 7", "seed: 7\nseed: 8", "r.yaml:4: seed: is set twice, first in line 3"),
        ("seed: 7", "seed: [7", None),
        ("seed: 7", "\tseed: 7", None),
        ("seed: 7", "seed: *x", None),
        ("seed: 7", "seed: !!python/object:os.system {}", None),
    ],
)  # fmt: skip
def test_mistakes(problems: Any, old: str, new: str, line: str | None) -> None:
    lines = problems(swapped(old, new))
    assert all(text.startswith("r.yaml:") for text in lines), lines
    if line is not None:
        assert line in lines
    if "nam:" not in new:
        assert len(lines) == 1, lines


def test_every_mistake_is_told_in_the_files_order(problems: Any) -> None:
    text = GOOD.replace("seed: 7", "seed: x").replace("max_steps: 5", "max_step: 5").replace("rows: 5", "rows: a")
    assert [line.split(": ")[0:2] for line in problems(text)] == [
        ["r.yaml:3", "seed"],
        ["r.yaml:22", "stages[0].train.max_step"],
        ["r.yaml:26", "stages[1].data.sources[0].generate.rows"],
    ]


def test_wrong_type_and_unknown_key_of_one_section_are_told_together(problems: Any) -> None:
    lines = problems(swapped("max_steps: 5", "max_steps: a\n      packin: true\n      do_train: true"))
    assert [line.split(": ")[1] for line in lines] == [
        f"stages[0].train.{k}" for k in ("max_steps", "packin", "do_train")
    ]


def test_reentrant_checkpointing_is_refused_with_its_reason(problems: Any) -> None:
    (line,) = problems(swapped("max_steps: 5", "gradient_checkpointing_kwargs: {use_reentrant: true}"))
    assert line.startswith("r.yaml:22: stages[0].train.gradient_checkpointing_kwargs.use_reentrant: must be false")


@pytest.mark.parametrize("text", ["", "# nothing\n", "- a\n", "just text\n", "a: 1\n---\nb: 2\n", "\0"])
def test_files_that_are_no_recipe(problems: Any, text: str) -> None:
    (line,) = problems(text)
    assert line.startswith("r.yaml")


def test_binary_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not a text file"):
        load_recipe(tmp_path / "b.yaml")
    with pytest.raises(UsageError, match=r"no such recipe file.*did you mean gsm8k"):
        load_recipe("gsm8")
    with pytest.raises(UsageError, match="is a folder"):
        load_recipe(tmp_path)


def test_anchors_and_merge_keys_work(load: Any) -> None:
    text = swapped("      max_steps: 5", "      <<: &base {max_steps: 5, save_steps: 2}\n      max_steps: 6")
    assert load(text).stages[0].train.max_steps == 6
    assert load(text).stages[0].train.save_steps == 2


def test_a_dollar_can_be_written(load: Any) -> None:
    recipe = load(swapped("seed: 7", "seed: 7\ndescription: costs $${data} or $5 or ${data}"))
    assert recipe.description == "costs ${data} or $5 or rows.jsonl"


def test_a_variable_keeps_its_type(load: Any) -> None:
    text = swapped("{data: rows.jsonl}", "{data: rows.jsonl, n: 3}").replace("rows: 5", "rows: '${n}'")
    assert load(text).stages[1].data.sources[0].generate.rows == 3


# ---- data recipes ----


def test_data_recipe_fills_in_what_the_stage_does_not_say(load: Any, tmp_path: Path) -> None:
    included = (
        "# title\nvariables: {there: hub/id}\nover_length: truncate\nsources:\n  - path: ${there}\n    config: c\n"
    )
    (tmp_path / "mix.yaml").write_text(included)
    data = f"    data:\n      recipe: {tmp_path}/mix.yaml\n      over_length: error\n    train:\n      max_steps: 5"
    text = swapped("    data:\n      sources:\n        - path: ${data}\n    train:\n      max_steps: 5", data)
    stage = load(text).stages[0]
    assert (stage.data.sources[0].path, stage.data.sources[0].config) == ("hub/id", "c")
    assert stage.data.over_length == "error"
    assert load(text, ["--variables.there", "x"]).stages[0].data.sources[0].path == "x"
    assert load(text, ["--stages.first.data.sources.0.path", "y"]).stages[0].data.sources[0].path == "y"
    (tmp_path / "mix.yaml").write_text(included.replace("config", "confg"))
    with pytest.raises(UsageError, match=r"mix.yaml:6: sources\[0\].confg: unknown key, did you mean config\?"):
        load(text)


@pytest.mark.parametrize(
    ("defaults", "stage", "said"),
    [
        ("sources: [{path: x.jsonl}]", "recipe: distill-stage1", ["r.yaml:8: stages[0].data.recipe", "r.yaml:5: defaults.data.sources"]),
        ("recipe: distill-stage1", "sources: [{path: x.jsonl}]", ["r.yaml:5: defaults.data.recipe", "r.yaml:8: stages[0].data.sources"]),
        ("{sources: [{path: x.jsonl}], recipe: distill-stage1}", "seed: 1", ["defaults.data.recipe", "defaults.data.sources"]),
        ("seed: 1", "{sources: [{path: x.jsonl}], recipe: distill-stage1}", ["stages[0].data.recipe", "stages[0].data.sources"]),
    ],
)  # fmt: skip
def test_sources_beside_a_data_recipe_are_one_sentence(
    problems: Any, load: Any, defaults: str, stage: str, said: list[str]
) -> None:
    def written(section: str) -> str:
        return section if section.startswith("{") else f"{{{section}}}"

    text = (
        f"name: x\noutput_dir: runs/x\nmodel: {{tokenizer: tiny, config: {{}}}}\ndefaults:\n  data: {written(defaults)}\n"
        f"stages:\n  - name: s\n    data: {written(stage)}\n"
    )
    (line,) = problems(text)
    assert all(place in line for place in said) and "take one out" in line
    if "seed" in defaults:  # an override may take its sources' place
        alone = text.replace("sources: [{path: x.jsonl}], recipe: distill-stage1", "recipe: gsm8k")
        source = load(alone, ["--stages.s.data.sources", "[{path: x.jsonl}]"]).stages[0].data.sources[0]
        assert source.path == "x.jsonl"


def test_unknown_data_recipe_names_the_place(problems: Any) -> None:
    (line,) = problems(swapped("      sources:\n        - path: ${data}\n", "      recipe: gsm9k\n"))
    assert line.startswith("r.yaml:19: stages[0].data.recipe: gsm9k: no such data recipe file")
    assert line.endswith("did you mean gsm8k?")


# ---- the rest ----


def test_layout(load: Any) -> None:
    paths = RunPaths(load())
    assert str(paths.final_dir("first")) == "runs/good/stages/first/final"
    assert str(paths.eval_dir("start", "held-out")) == "runs/good/eval/start/held-out"
    assert str(paths.prepared) == "runs/good/prepared"
    assert str(RunPaths(load(GOOD, ["--prepared_dir", "/p"])).prepared) == "/p"


def test_home_folders_are_meant(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    recipe = load(GOOD, ["--output_dir", "~/runs/x", "--model.tokenizer", "~/tok"])
    assert (recipe.output_dir, recipe.model.tokenizer) == ("/home/me/runs/x", "/home/me/tok")


def test_environment_names_versions() -> None:
    found = environment()
    assert {"torch", "transformers", "trl", "sambay-sft"} <= set(found["packages"])
    assert found["python"] == ".".join(map(str, sys.version_info[:3])) and found["cpu_count"] >= 1


def test_import_is_light() -> None:
    code = (
        "import sys, sft.recipe as r\n"
        "try: r.load_recipe('tiny', ['--stages.all.train.router_aux_loss_coef', '1', '--stages.all.train.nowhere', '2'])\n"
        "except r.load.UsageError as error: assert 'unknown key' in str(error) and 'is not for recipes' in str(error)\n"
        "print(sorted({'torch', 'transformers', 'trl', 'numpy', 'rich'} & set(sys.modules)))"
    )
    done, seconds = run_timed([sys.executable, "-c", code])
    assert done.stdout.strip() == "[]", done.stderr
    assert seconds < 10  # twenty times what it may take on a quiet machine


def test_a_step_without_settings_takes_overrides(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "name: r\noutput_dir: out\nmodel: {tokenizer: tiny, config: {}}\n"
        "stages:\n  - name: a\n    data: {sources: [{path: a.jsonl, steps: [quality]}], steps: [quality, {length: }]}\n"
    )
    loaded = load_recipe(recipe, ["--stages.a.data.steps.0.quality.think", "optional"])
    data = loaded.stages[0].data
    assert [step.name for step in data.steps] == ["quality", "length"] and data.steps[0].quality.think == "optional"
    assert data.sources[0].steps[0].quality.think == "required"


def test_a_data_recipe_that_includes_itself_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop.yaml").write_text("sources: [{recipe: loop.yaml}]\n")
    Path("r.yaml").write_text(
        "name: r\noutput_dir: out\nmodel: {tokenizer: tiny, config: {}}\nstages:\n  - name: a\n    data: {recipe: loop.yaml}\n"
    )
    with pytest.raises(UsageError, match=r"includes itself: loop.yaml -> loop.yaml"):
        load_recipe("r.yaml")


def test_another_data_recipe_for_a_filled_source_is_refused_and_for_a_stage_taken(in_tmp: Path) -> None:
    for name in ("one", "two"):
        Path(f"{name}.yaml").write_text(f"sources: [{{path: {name}.jsonl}}]\n")
    Path("outer.yaml").write_text("sources: [{recipe: one.yaml}]\n")
    text = "name: r\noutput_dir: out\nmodel: {tokenizer: tiny, config: {}}\nstages:\n  - name: a\n    data: {recipe: outer.yaml}\n"
    Path("r.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"--stages\.a\.data\.sources\.0\.recipe: has no effect"):
        load_recipe("r.yaml", ["--stages.a.data.sources.0.recipe", "two.yaml"])
    recipe = load_recipe("r.yaml", ["--stages.a.data.recipe", "two.yaml"])
    assert recipe.stages[0].data.sources[0].path == "two.jsonl"
