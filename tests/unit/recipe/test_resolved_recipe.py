"""The resolved recipe loads to the recipe that was resolved, whatever it says; and the recipe as given is kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from recipe_values import TEXTS, anything, sections, texts, values

from sft.recipe import Recipe, load_recipe, resolved_yaml
from sft.recipe.packaged import list_data_recipes, list_recipes
from sft.recipe.problems import Section
from sft.recipe.steps import StepEntry
from sft.utils.errors import UsageError

TEACHER = {"base_url": "http://localhost:1/v1", "model": "m"}
STEPS = [
    {"render": {"think": "keep", "prompt_template": "Say {prompt} as $${step}$."}},
    {"explode_rollouts": {"column": "rollouts", "flags": {"ok": "is_ok"}, "require": ["ok"], "require_all": ["ok"]}},
    {"filter": {"column": "domain", "min": 1, "max": 2}},
    {"length": {"max_tokens": 10}},
    {"verify": {"kind": "math"}},
    {"quality": {"finish_reason": "why", "finished": ["stop", "eos"]}},
    {"dedup": {"by": "text", "prefer": ["a"]}},
    {"decontaminate": {"against": [{"name": "b", "path": "b.jsonl"}]}},
    {
        "select": {
            "pass_rate": {"of": "column", "column": "rate"},
            "quotas": {"rows": {"code": 1}},
            "diversity": {"clusters": 2},
        }
    },
    {"select": {"lengths": {"edges": [10], "shares": [1, 2]}, "prefer": ["shortest", "random"]}},
    {"mix": {"weights": {"a": 1, "b": 2.5}, "max_repeats": {"a": 2}}},
    {"join": {"path": "there.parquet"}},
    {"score": {"model": "student", "rank_surprisal": {}, "local_naturalness": {"every": 2}}},
    {"top_logprobs": {"column": "teacher"}},
    {"top_logprobs": {"model": "teacher", "k": 8}},
    {"generate": {"teacher": TEACHER, "temperature": None, "top_p": None}},
    {"generate": {"mode": "mixed", "teacher": {**TEACHER, "marks": {"a": "b"}}, "student": {"checkpoint": "c"}}},
    {"generate": {"mode": "mixed", "teacher": TEACHER, "student": TEACHER}},
]
OTHER = {
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-6,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "dataloader_num_workers": 2,
    "dataloader_persistent_workers": True,
    "dataloader_prefetch_factor": 3,
    "warmup_steps": 0.1,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr": 1e-6},
    "eval_strategy": "steps",
    "eval_steps": 6,
    "per_device_eval_batch_size": 3,
    "logging_steps": 7,
    "save_steps": 8,
    "deepspeed": "zero2",
    "max_steps": 5,
    "packing": True,
    "use_peft": True,
    "use_dora": True,
    "lora_dropout": 0.1,
    "optim": "muon",
    "adamw_learning_rate": 1e-4,
    "param_groups": [{"match": "A_log", "learning_rate": 1e-5, "weight_decay": 0.1}],
    "distill": {"divergence": "skewed", "alpha": 0.2},
    "loss": {"type": "threshold", "threshold": 0.5},
}
"""Keys that go with others, so that few values drawn at random are taken."""
HELD_OUT = {"sources": [{"path": "held.jsonl", "name": "held"}]}
WHOLE: dict[str, Any] = {
    "name": "whole",
    "output_dir": "runs/whole",
    "model": {"tokenizer": "tiny", "config": {"hidden_size": 64}},
    "stages": [
        {
            "name": "one",
            "data": {
                "sources": [
                    {"path": "a.jsonl", "name": "a"},
                    {"generate": {"rows": 5, "min_steps": 4}, "name": "b"},
                    {"name": "c", "sources": [{"path": "c.jsonl", "rows": "problems"}], "steps": ["length"]},
                ],
                "steps": STEPS,
                "validation": {"size": 0.1},
            },
            "train": {
                "trackio_space_id": "org/page",
                "trackio_bucket_id": "org/rows",
                "learning_rate": 1e-4,
                "use_peft": True,
                "optim": "sgd",
                "optim_args": "momentum=0.9",
                "lora_dropout": 0.0,
                "lora_target_parameters": ["A_log"],
                "loss": {"type": "power", "alpha": 2.0},
            },
            "evaluate": {
                "suites": [{"name": "held-out", "source": {"path": "b.jsonl"}, "choices": {"wrong": ["a", "b"]}}],
                "every": {"steps": 5, "suites": ["held-out"], "max_problems": 3},
            },
        },
        {"name": "two", "data": {"sources": [{"path": "a.jsonl"}], "validation": HELD_OUT}, "train": OTHER},
        {
            "name": "three",
            "data": {"sources": [{"path": "a.jsonl"}]},
            "train": {
                "ema": {"decay": 0.9, "start": 0.5},
                "weights_dtype": "bfloat16",
                "optim_state_dtype": "bfloat16",
            },
            "average": {"ema": True, "with": "start", "weight": 0.5},
            "evaluate": {"suites": [{"name": "held-out", "source": {"path": "b.jsonl"}}], "every": {"tokens": 1_000}},
            "stop_when": {"token_accuracy": 0.9, "metric": "held-out", "patience": 2},
        },
    ],
}
"""A recipe with every section of the schema in it."""
# A template is text with marks in it, of `$` and quotes too; hardly any text drawn at random is one.
TEMPLATE = """{% for m in messages %}{{ '$' + m['content'] }}#{% endfor %}"""
FOUR_BIT = [{**WHOLE["stages"][0], "train": {"use_peft": True}}, WHOLE["stages"][1]]
WHOLES = [
    WHOLE,
    {**WHOLE, "model": {"model_name_or_path": "org/model", "chat_template": TEMPLATE}},
    {**WHOLE, "model": {"model_name_or_path": "org/model", "load_in_4bit": True}, "stages": FOUR_BIT},
]

FILLED_IN = {("Recipe", "variables"), ("DataSection", "recipe"), ("DataSource", "recipe"), ("SuiteSection", "suite")}
"""Keys whose meaning stands elsewhere once a recipe is loaded."""


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Section]]:
    """Every section in a recipe, with its path."""
    if isinstance(value, Section):
        yield path, value
        value = {key: child for key, child in value if child is not None}
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in pairs:
        yield from places(child, (*path, key))


def changed(whole: dict[str, Any], path: tuple[Any, ...], key: str, value: Any) -> dict[str, Any]:
    """A copy of `whole` with one key of the section at `path` set."""
    whole = copy.deepcopy(whole)
    section: Any = whole
    for part in path:
        if isinstance(section, list) and isinstance(section[part], str):
            section[part] = {section[part]: {}}
        section = section[part] if isinstance(section, list) else section.setdefault(part, {})
    section[key] = value
    return whole


def only(kind: str) -> list[dict[str, Any]]:
    """The whole recipe, without the steps that have nothing to do with a section."""
    small = []
    for whole in WHOLES if kind == "ModelSection" else WHOLES[:2]:
        whole = copy.deepcopy(whole)
        data = whole["stages"][0]["data"]
        data["steps"] = [step for step in STEPS if kind in {type(found).__name__ for _, found in _in_step(step)}]
        if kind not in ("DataSource", "GenerateSource"):
            del data["sources"][1:]
        small.append(whole)
    return small


def _in_step(step: dict[str, Any]) -> list[tuple[tuple[Any, ...], Section]]:
    return [found for found in places(StepEntry.model_validate(step)) if found[0]]


@pytest.fixture
def again(tmp_path: Path) -> Callable[[Recipe], Recipe]:
    """Load what a recipe is resolved to."""

    def load(recipe: Recipe) -> Recipe:
        path = tmp_path / "resolved.yaml"
        path.write_text(resolved_yaml(recipe), encoding="utf-8")
        return load_recipe(path)

    return load


def test_the_whole_recipe_has_every_section() -> None:
    found = {type(section).__name__ for _, section in places(Recipe.model_validate(WHOLE))}
    assert found == set(sections(Recipe))


@pytest.mark.parametrize("kind", [name for name in sections(Recipe) if name not in ("StepEntry", "Defaults")])
def test_every_key_survives(kind: str, again: Callable[[Recipe], Recipe]) -> None:
    """Each key of each section, with nulls and with texts that YAML would like to read as something else."""
    wholes = [(whole, Recipe.model_validate(whole)) for whole in only(kind)]
    here = sorted((path for path, section in places(wholes[0][1]) if type(section).__name__ == kind), key=str)
    fields = {
        key: strategy
        for key, field in sections(Recipe)[kind].model_fields.items()
        if (kind, key) not in FILLED_IN and (strategy := values(field)) is not None
    }
    # Keys that go with others have their value in WHOLE.
    every = [section for _, recipe in wholes for _, section in places(recipe) if type(section).__name__ == kind]
    moved = {key for section in every for key in fields if section.changed(key)}

    # Examples this large take minutes to shrink, and every draw is labelled anyway.
    @settings(
        max_examples=30,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def check(data: st.DataObject) -> None:
        given, recipe = data.draw(st.sampled_from(wholes))
        path = data.draw(st.sampled_from(here))
        for key, strategy in fields.items():
            tried = changed(given, path, key, data.draw(strategy, label=f"{path}.{key}"))
            try:
                made = Recipe.model_validate(tried)
            except ValidationError:
                continue
            if made != recipe:
                moved.add(key)
            given, recipe = tried, made
        loaded = again(recipe)
        assert loaded == recipe
        assert loaded.model_dump() == recipe.model_dump()
        assert Recipe.model_validate(recipe.model_dump()) == recipe

    check()
    assert moved == set(fields), "no value was found that these keys take"


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=texts, other=anything)
def test_any_text_and_any_value_survive(again: Callable[[Recipe], Recipe], text: str, other: Any) -> None:
    recipe = Recipe.model_validate(changed(changed(WHOLE, (), "description", text), ("model",), "config", {"a": other}))
    assert again(recipe) == recipe


@pytest.mark.parametrize("text", TEXTS)
def test_awkward_texts_survive_another_reader(text: str) -> None:
    """Exported recipes are read by others too, with YAML 1.1's ideas of `yes` and 1:30."""
    whole = Recipe.model_validate(changed(WHOLE, (), "description", text.replace("${", "$ {")))
    assert yaml.safe_load(resolved_yaml(whole)).get("description") == whole.description


@pytest.mark.parametrize("name", [recipe.name for recipe in list_recipes()])
def test_packaged_recipes_survive(name: str, again: Callable[[Recipe], Recipe]) -> None:
    recipe = load_recipe(name)
    assert again(recipe) == recipe


@pytest.mark.parametrize("name", [recipe.name for recipe in list_data_recipes()])
def test_packaged_data_recipes_survive(name: str, again: Callable[[Recipe], Recipe], tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "name: r\noutput_dir: o\nmodel: {tokenizer: tiny, config: {}}\n"
        f"stages: [{{name: s, data: {{recipe: {name}}}}}, {{name: t, data: {{sources: [{{recipe: {name}}}]}}}}]\n"
    )
    recipe = load_recipe(path)
    assert again(recipe) == recipe
    assert recipe.stages[1].data.sources[0].name == name


def test_a_resolved_recipe_needs_no_data_recipe(again: Callable[[Recipe], Recipe], tmp_path: Path) -> None:
    """What ran doesn't change when the file that it was filled from does."""
    mix, path = tmp_path / "my mix.yaml", tmp_path / "r.yaml"
    mix.write_text("prompt_template: 'Say {prompt}'\nsources: [{path: a.jsonl, columns: {prompt: q}}]\n")
    path.write_text(
        "name: r\noutput_dir: o\nmodel: {tokenizer: tiny, config: {}}\n"
        "stages: [{name: s, data: {prompt_template: null, "
        f"sources: [{{recipe: {mix}}}, {{recipe: {mix}, name: n}}]}}}}]\n"
    )
    recipe = load_recipe(path)
    text = resolved_yaml(recipe)
    for left in ("prompt_template: 'Do {prompt}'\nover_length: error\nsources: [{path: b.jsonl}]\n", None):
        mix.unlink() if left is None else mix.write_text(left)
        assert again(recipe) == recipe and resolved_yaml(again(recipe)) == text
    assert [source.name for source in recipe.stages[0].data.sources] == ["my-mix", "n"]


def test_a_default_that_is_written_is_no_other_recipe(tmp_path: Path) -> None:
    for step, key, default in (("quality", "finished", ["stop"]), ("select", "prefer", ["random"])):
        plain: dict[str, Any] = {"select": {"pass_rate": {"min": 0.5}}} if step == "select" else {step: {}}
        said = copy.deepcopy(plain)
        said[step][key] = default
        assert StepEntry.model_validate(said) == StepEntry.model_validate(plain)


def test_the_recipe_as_given_is_kept(tmp_path: Path, again: Callable[[Recipe], Recipe]) -> None:
    path = tmp_path / "r.yaml"
    text = yaml.safe_dump(WHOLE).replace("$${", "$$${") + "# a remark\n"
    path.write_text(text)
    overrides = ["--seed", "3"]
    recipe = load_recipe(path, overrides)
    for kept in (recipe, recipe.model_copy(deep=True), recipe.model_copy(update={"seed": 4})):
        assert (kept.given.text, kept.given.overrides) == (text, tuple(overrides))
    assert recipe == Recipe.model_validate({**WHOLE, "seed": 3}) == again(recipe)
    assert "given" not in str(recipe.model_dump())


def test_another_seed_reaches_the_stages_of_a_resolved_recipe(tmp_path: Path) -> None:
    own = copy.deepcopy(WHOLE)
    own["stages"] = [{**own["stages"][0], "name": name} for name in ("one", "two")]
    own["stages"][1]["train"] = {"seed": 5}
    path = tmp_path / "resolved.yaml"
    path.write_text(resolved_yaml(Recipe.model_validate(own)))
    assert [stage.train.seed for stage in load_recipe(path, ["--seed", "9"]).stages] == [9, 5]


def test_an_alias_bomb_is_refused_at_once(tmp_path: Path) -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    merges = ["m0: &m0 {k: 1}"] + [f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 10)}]}}" for i in range(1, 12)]
    for lines in (levels, merges):
        (tmp_path / "r.yaml").write_text("\n".join(lines))
        with pytest.raises(UsageError, match=r"r\.yaml: has more than 50,000 values once its aliases are filled in"):
            load_recipe(tmp_path / "r.yaml")
