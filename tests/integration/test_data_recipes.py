"""Every packaged data recipe on a few rows of its sets' exact schema, from the recipe file to packed rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import data_set_rows as sets
import pytest
import torch
from data_toys import byte_tokenizer
from score_toys import save_student
from teacher_server import Seen, TeacherServer
from tiny_sambay import tiny_model

from sft.data.prepare import PreparedStage, prepare_stage
from sft.recipe import load_recipe
from sft.recipe.packaged import list_data_recipes

BENCHMARKS = ("math500", "aime24", "aime25", "gsm8k_test")
# recipe -> the variables that stand for its sets, rows kept, and what became of the others
SINGLE: dict[str, tuple[dict[str, Callable[[], list[dict[str, Any]]]], int, dict[str, int]]] = {
    "openr1-math-220k": (
        {"openr1_math": sets.openr1}, 4,
        {"explode_rollouts: flag_false": 1, "explode_rollouts: flag_missing": 1, "quality: think_not_closed": 1},
    ),
    "openmathreasoning": ({"openmathreasoning": sets.openmathreasoning}, 2, {"quality: think_not_closed": 1}),
    "openthoughts3-1.2m": ({"openthoughts3": sets.openthoughts3}, 2, {"quality: think_not_closed": 1}),
    "openthoughts-114k": ({"openthoughts_114k": sets.openthoughts_114k}, 1, {"quality: think_not_closed": 1}),
    "mixture-of-thoughts": ({"mixture_of_thoughts": sets.mixture_of_thoughts}, 2, {"quality: think_not_closed": 1}),
    "acereason-1.1-sft": ({"acereason": sets.acereason}, 1, {"quality: think_not_closed": 1}),
    "light-r1-76k": ({"light_r1_76k": sets.light_r1}, 2, {"quality: think_not_closed": 1}),
    "light-r1-3k": ({"light_r1_3k": sets.light_r1}, 2, {"quality: think_not_closed": 1}),
    "limo-v2": ({"limo": sets.limo}, 1, {}),
    "s1k-1.1": ({"s1k": sets.s1k}, 1, {"filter: filter_value": 1}),
    "nemotron-math-v2": ({"nemotron_math": sets.nemotron_math}, 1, {"verify: wrong": 1}),
    "dolci-think-sft-7b": ({"dolci": sets.dolci}, 1, {"quality: think_not_closed": 1}),
    "gsm8k": ({"gsm8k": sets.gsm8k}, 1, {}),
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., PreparedStage]:
    """run(data, {variable: rows or value}): prepare a stage with this data section."""

    def run(data: str, values: dict[str, Any], *words: str) -> PreparedStage:
        overrides = list(words)
        for name, value in values.items():
            if isinstance(value, list):
                path = tmp_path / f"{name}.jsonl"
                path.write_text("".join(json.dumps(row) + "\n" for row in value))
                value = path
            overrides += [f"--variables.{name}", str(value)]
        recipe = tmp_path / "r.yaml"
        recipe.write_text(
            f"name: r\noutput_dir: {tmp_path}/out\nmodel: {{tokenizer: tiny, config: {{}}}}\n"
            f"stages:\n  - name: a\n    data: {data}\n"
            "    train: {max_length: 32768, packing: true, dataset_num_proc: 1}\n"
        )
        loaded = load_recipe(str(recipe), overrides)
        return prepare_stage(loaded, loaded.stages[0], byte_tokenizer())

    return run


def texts(done: PreparedStage) -> str:
    return byte_tokenizer().decode([token for row in done.dataset["input_ids"] for token in row])


@pytest.mark.parametrize("name", SINGLE)
def test_a_data_set(name: str, run: Callable[..., PreparedStage]) -> None:
    variables, kept, dropped = SINGLE[name]
    done = run(f"{{recipe: {name}}}", {variable: rows() for variable, rows in variables.items()})
    funnel = done.manifest["funnel"]
    assert (funnel["kept"], funnel["dropped"]) == (kept, dropped)
    text = texts(done)
    if name not in ("gsm8k", "limo-v2"):
        assert "<|assistant|><think>" in text and "</think>" in text
    assert "begin_of_thought" not in text and "<|system|>" not in text


def values_of(*groups: str) -> dict[str, Any]:
    """The variables of the sets that a mixture takes, and of its benchmarks."""
    values: dict[str, Any] = {name: sets.benchmark() for name in BENCHMARKS}
    for group in groups:
        values |= {variable: rows() for variable, rows in SINGLE[group][0].items()}
    return values


def test_distill_stage1(run: Callable[..., PreparedStage]) -> None:
    groups = ("openr1-math-220k", "openmathreasoning", "light-r1-76k", "acereason-1.1-sft")
    done = run("{recipe: distill-stage1}", values_of(*groups))
    dropped = done.manifest["funnel"]["dropped"]
    assert dropped["decontaminate: contaminated"] == 1 and sets.PROBLEMS["primes"] not in texts(done)
    # The frogs and roots of the other three sets are those of the preferred one.
    assert dropped["dedup: duplicate"] == 5 and texts(done).count(sets.PROBLEMS["frogs"]) == 1
    assert {leaf["license"] for leaf in done.manifest["inputs"]} == {"apache-2.0", "cc-by-4.0"}


def test_sft_stage2_hard(run: Callable[..., PreparedStage]) -> None:
    done = run("{recipe: sft-stage2-hard}", values_of("limo-v2", "s1k-1.1", "light-r1-3k", "openr1-math-220k"))
    funnel = done.manifest["funnel"]
    assert funnel["dropped"]["dedup: duplicate"] and funnel["dropped"]["decontaminate: contaminated"] == 1
    assert "Okay, so there are two kinds of frogs" in texts(done)  # LIMO's is preferred


def test_long_context_stage3(run: Callable[..., PreparedStage]) -> None:
    numbers = " ".join(map(str, range(2500)))
    flags = {"is_reasoning_complete": [True], "correctness_math_verify": [True], "correctness_llama": None}
    long = {**sets.openr1()[0], **flags, "generations": [sets.trace("frogs", f" {numbers}")]}
    values = {**values_of("openthoughts3-1.2m"), "openr1_math": [long]}
    done = run("{recipe: long-context-stage3}", values)
    assert done.manifest["funnel"]["kept"] == 1 and done.manifest["funnel"]["dropped"]["length: too_short"] == 2


def test_problems_for_a_teacher(run: Callable[..., PreparedStage]) -> None:
    server = TeacherServer()
    try:
        teacher = f"{{base_url: '{server.base_url}', model: toy}}"
        data = f"{{sources: [{{recipe: numinamath-1.5}}], steps: [{{generate: {{teacher: {teacher}, n: 2}}}}]}}"
        done = run(data, {"numinamath": sets.numinamath()})
    finally:
        server.close()
    funnel = done.manifest["funnel"]
    assert funnel["kept"] == 2 and funnel["made"] == 1 and funnel["dropped"] == {"filter: filter_value": 3}
    (usage,) = [entry["usage"] for entry in done.manifest["steps"] if "usage" in entry]
    assert usage["models"]["teacher"]["answers"] == 2


@pytest.mark.parametrize(("name", "stage"), [("dasd-low", 1), ("dasd-high", 2)])
def test_dasd_chooses_by_the_students_probabilities(
    name: str, stage: int, run: Callable[..., PreparedStage], tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer()
    student = save_student(tmp_path / "student", tokenizer)
    values = {
        **{benchmark: sets.benchmark() for benchmark in BENCHMARKS},
        f"superior_reasoning_stage{stage}": sets.superior_reasoning(),
        "superior_reasoning_logprob": sets.superior_reasoning_logprobs(tokenizer),
        "student": student,
        f"{name.replace('-', '_')}_rows": 1,
    }
    done = run(f"{{recipe: {name}}}", values)
    # Of two rows with the teacher's log probabilities, the one that the teacher finds likely is taken.
    assert [row for rows in done.dataset["document_ids"] for row in rows] == ["id-frogs"]
    dropped = done.manifest["funnel"]["dropped"]
    assert dropped == {"decontaminate: contaminated": 1, "select: over_rows": 1}


def babbling_student(folder: Path, tokenizer: Any) -> Path:
    """A random student that can't end its answer, nor say another control token: all share a direction that the last
    norm points away from, so that their probability is 0 in float32."""
    model = tiny_model(0, vocab_size=(len(tokenizer) + 63) // 64 * 64)
    with torch.no_grad():
        direction = torch.nn.functional.normalize(torch.ones(model.config.hidden_size), dim=0)
        model.model.embed_tokens.weight[256:] = direction  # ids below are the bytes
        model.model.final_layernorm.weight.fill_(1.0)
        model.model.final_layernorm.bias.copy_(-1000 * direction)
    return save_student(folder, tokenizer, model)


def test_dasd_mixed(run: Callable[..., PreparedStage], tmp_path: Path) -> None:
    def teacher_says(seen: Seen) -> dict[str, Any]:
        return {"content": " and that is all.\n</think>\n\nIt is \\boxed{23}."}

    teacher, tokenizer = TeacherServer(teacher_says), byte_tokenizer()
    values = {
        **{benchmark: sets.benchmark() for benchmark in BENCHMARKS},
        "superior_reasoning_stage1": sets.superior_reasoning(),
        "superior_reasoning_logprob": sets.superior_reasoning_logprobs(tokenizer),
        "dasd_student": babbling_student(tmp_path / "student", tokenizer),
        "teacher_url": teacher.base_url,
    }
    try:
        # It opens no <think>, and speaks in tongues.
        steps = "--stages.a.data.steps"
        words = [f"{steps}.2.generate.cap", "0.06", f"{steps}.3.quality", "{think: optional, max_foreign: 1.0}"]
        done = run("{recipe: dasd-mixed}", values, *words)
    finally:
        teacher.close()
    (step,) = [entry for entry in done.manifest["steps"] if entry["step"] == "generate"]
    assert step["taken"]["rows"] == 2 and step["usage"]["models"]["student"]["answers"] == 2
    assert step["kept"]["rows"] == len(teacher.seen) == done.manifest["funnel"]["kept"] == 2
    assert texts(done).count("and that is all.\n</think>") == 2


def test_every_packaged_data_recipe_is_tested() -> None:
    mixtures = {"distill-stage1", "sft-stage2-hard", "long-context-stage3", "dasd-low", "dasd-high", "dasd-mixed"}
    parts = {"numinamath-1.5", "superior-reasoning-stage1", "superior-reasoning-stage2"}  # in the tests of mixtures
    assert {entry.name for entry in list_data_recipes()} == {*SINGLE, *mixtures, *parts}
