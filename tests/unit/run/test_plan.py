"""`sft plan` by its command line: no torch, measured rates as they were measured, and advice that holds."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from sft.cli.main import main
from sft.recipe import Recipe, load_recipe
from sft.recipe.data_checks import recipe_problems
from sft.recipe.outcome_keys import scheduled
from sft.run.plan import stages
from sft.run.plan.answers import engine_memory, page_bytes, slot_bytes, step_seconds
from sft.run.plan.cards import CARDS, Cluster, cluster_of
from sft.run.plan.config import TINY_VOCABULARY
from sft.run.plan.engines import Engine
from sft.run.plan.memory import Layout, rank_memory
from sft.run.plan.passes import Recompute
from sft.run.plan.rows import Rows
from sft.run.plan.shape import Shape
from sft.run.plan.shares import shares_of
from sft.run.plan.speed import step_time
from sft.run.plan.stages import StagePlan, plan_recipe
from sft.tokenizers.tiny import build_tokenizer
from sft.train import arguments
from sft.train.trainer import SambayTrainer
from sft.utils.errors import UsageError

RECIPES = ("phi4-mini-flash", "phi4-mini-flash-64k", "phi4-mini-flash/lora", "phi4-mini-flash-dasd", "tiny", "gsm8k")


def told(capsys, *words: str) -> dict:
    assert main(["plan", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_nothing_heavy_is_imported():
    """Two seconds are enough where neither torch nor transformers is loaded."""
    code = (
        "import sys; from sft.cli.main import main; "
        "assert main(['plan', 'phi4-mini-flash', '--gpus', '8xA100-80']) == 0; "
        "heavy = {'torch', 'transformers', 'deepspeed', 'datasets', 'accelerate', 'trl', 'peft', 'pyarrow'}; "
        "print(sorted(heavy & sys.modules.keys()), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stderr.strip() == "[]"
    assert "planned, not measured" in done.stdout


@pytest.mark.parametrize("name", RECIPES)
def test_every_packaged_recipe_has_a_plan(name, capsys):
    for gpus in ("A100-80", "32xH100-80", "cpu"):
        plan = told(capsys, name, "--gpus", gpus)
        assert [stage["memory_total"] > 0 for stage in plan["stages"]].count(False) == 0


def test_a_step_takes_what_it_took_on_an_h100(repo_root):
    """Of packed documents of 4K and of 32K; that these two set the shares is why they come out, within rounding."""
    rows = json.loads((repo_root / "kernels/benchmarks/results/published-step.json").read_text())["rows"]
    for row in rows:
        if row["model"] != "SambaY":
            continue
        layout = Layout(Engine(), 1, row["tokens"], row["documents"], 1, Recompute(), True, kept=0.8, supervised=0.8)
        planned = step_time(Shape(), layout, Cluster(1, CARDS["H100-80"])).seconds
        assert planned == pytest.approx(row["step s"], rel=0.03)


def test_decoding_takes_what_it_took_on_an_h200(repo_root):
    rows = json.loads((repo_root / "kernels/benchmarks/results/published-decode.json").read_text())["rows"]
    curves = [row for row in rows if row["side"] == "engine" and row["length"] is not None]
    assert len(curves) > 10
    for row in curves:
        planned = step_seconds(Shape(), Cluster(1, CARDS["H200-141"]), row["requests"], row["length"])
        assert planned == pytest.approx(row["token"], rel=0.15), row["what"]


def test_states_and_pages_are_the_engine_s():
    """By hand, of the published model: 9 scans, 8 windows of 512 and one layer of pages."""
    assert slot_bytes(Shape()) == 9 * 5120 * (3 * 2 + 16 * 4) + 8 * 2 * 1280 * 512 * 2
    assert page_bytes(Shape()) == 2 * 1280 * 64 * 2
    assert engine_memory(Shape(), 64, 32768) > engine_memory(Shape(), 1, 32768) > 7_700_000_000


def test_what_it_says_to_change_fits_and_is_taken(capsys):
    small = told(capsys, "phi4-mini-flash", "--gpus", "8xA100-40", "--stage", "long")["stages"][0]
    assert small["fits"] is False
    change = small["smallest"]
    words = shlex.split(" ".join(change["overrides"]))
    changed = told(capsys, "phi4-mini-flash", "--gpus", "8xA100-40", "--stage", "long", *words)["stages"][0]
    assert changed["fits"] is True
    assert changed["memory_total"] == sum(
        change["memory"][part]
        for part in ("weights", "gradients", "optimizer", "activations", "temporaries", "buffers")
    )
    assert changed["tokens_of_a_step"] == small["tokens_of_a_step"]  # the batch stays what it was


def test_where_no_layout_fits_it_says_what_else_would(capsys):
    one = told(capsys, "phi4-mini-flash", "--gpus", "RTX4090-24", "--stage", "distill")["stages"][0]
    assert one["fits"] is False
    assert one["smallest"] is None
    assert any("use_peft" in remedy for remedy in one["remedies"])
    assert any("zero3" in remedy for remedy in one["remedies"])


def test_what_else_would_help_fits_when_it_is_typed(capsys):
    words = ("phi4-mini-flash", "--stage", "long", "--gpus", "4xA100-40", "--stages.long.train.max_length", "131072")
    stage = told(capsys, *words)["stages"][0]
    assert stage["fits"] is False and stage["smallest"] is None and len(stage["remedies"]) >= 2
    assert any("sequence_parallel_size" in remedy for remedy in stage["remedies"])
    for remedy in stage["remedies"]:
        more = shlex.split(remedy)
        kept = [*words]
        for key in more[::2]:
            if key in kept:
                del kept[kept.index(key) : kept.index(key) + 2]
        changed = told(capsys, *kept, *more)["stages"][0]
        assert changed["fits"] is True, remedy


CASES = {
    "half": ("--weights_dtype bfloat16 --deepspeed null", "2xA100-40"),
    "half, long": ("--weights_dtype bfloat16 --deepspeed null --max_length 131072", "2xA100-40"),
    "half, small": ("--weights_dtype bfloat16 --deepspeed null", "RTX4090-24"),
    "muon": ("--optim muon --deepspeed null", "2xA100-40"),
    "ema": ("--ema '{decay: 0.9}' --deepspeed null", "2xA100-40"),
    "ema, small": ("--ema '{decay: 0.9}'", "RTX4090-24"),
    "adapters": ("--use_peft true --deepspeed null --max_length 262144", "2xA100-40"),
    "parted adapters": (
        "--use_peft true --deepspeed zero3 --gradient_checkpointing false --max_length 262144",
        "2xA100-40",
    ),
    "selective": ("--gradient_checkpointing_kwargs '{selective: true}' --deepspeed null --max_length 8192", "H200-141"),
    "float32": ("--bf16 false", "RTX4090-24"),
    "noise": ("--neftune_noise_alpha 5 --max_length 131072", "4xA100-40"),
    "three": ("--sequence_parallel_size 3 --max_length 131072", "3xRTX4090-24"),
}


def taken(recipe: str, words: list[str], world: int, monkeypatch) -> None:
    """Put the stage `long` with these keys through the check of the recipe and of the engine on `world` cards."""
    monkeypatch.setenv("WORLD_SIZE", str(world))
    loaded = load_recipe(recipe, words)
    assert list(recipe_problems(loaded)) == []
    assert list(arguments.argument_problems(loaded.stage("long"))) == []


@pytest.mark.parametrize("name", CASES)
def test_what_it_proposes_is_taken_by_the_recipe_s_check_and_the_trainer_s(name, monkeypatch):
    monkeypatch.setattr(arguments, "_has_cuda", lambda: True)
    monkeypatch.setattr(arguments, "_optimizer_problem", lambda name, cuda: None)  # packages that aren't here
    keys = shlex.split(CASES[name][0].replace("--", "--stages.long.train."))
    cluster = cluster_of(CASES[name][1])
    taken("phi4-mini-flash-64k", keys, cluster.count, monkeypatch)
    (plan,) = plan_recipe(load_recipe("phi4-mini-flash-64k", keys), cluster)
    proposed = [*plan.remedies, *(choice.words for choice in (plan.smallest, plan.fastest) if choice)]
    for proposal in proposed:
        words = shlex.split(proposal)
        world = cluster.count
        if words[0] == "--gpus":
            world = cluster_of(words[1]).count
            del words[:2]
        given = dict(zip(keys[::2], keys[1::2], strict=True)) | dict(zip(words[::2], words[1::2], strict=True))
        taken("phi4-mini-flash-64k", [word for pair in given.items() for word in pair], world, monkeypatch)


def test_weights_in_bfloat16_are_not_proposed_again():
    keys = shlex.split(CASES["half, small"][0].replace("--", "--stages.long.train."))
    (plan,) = plan_recipe(load_recipe("phi4-mini-flash-64k", keys), cluster_of("A100-40"))
    proposed = [*plan.remedies, *(choice.words for choice in (plan.smallest, plan.fastest) if choice)]
    assert proposed and not any("weights_dtype bfloat16" in words for words in proposed)


@pytest.mark.parametrize(
    ("gpus", "size", "why"),
    [
        ("8xA100-80", 3, "8xA100-80 is no multiple of that: plan for 9xA100-80 (--gpus), or lower it."),
        ("A100-80", 4, "1xA100-80 is no multiple of that: plan for 4xA100-80 (--gpus), or lower it."),
        ("cpu", 4, "--gpus cpu plans one process: name 4 cards (--gpus), or leave it out."),
    ],
)
def test_ranks_that_groups_do_not_part_are_refused(gpus, size, why, capsys):
    words = ["phi4-mini-flash", "--gpus", gpus, "--stage", "long", f"--stages.all.train.sequence_parallel_size={size}"]
    assert main(["plan", *words]) == 2
    said = capsys.readouterr().err
    assert said == f"sft: stages[long].train.sequence_parallel_size: {size} processes share a row, and {why}\n"


def test_ranks_that_share_a_row_take_what_the_cuts_give_them():
    """Of 8 the first has most of 65,536 tokens, the last the fewest (docs/sequence-parallelism.md)."""
    first, last = shares_of(Shape(), 8, 65536, 1)
    assert (first.tokens, last.tokens) == (pytest.approx(11409, abs=2), pytest.approx(6259, abs=2))
    assert (first.before, first.goes_on) == (0, True) and (last.before, last.goes_on) == (65536 - last.tokens, False)


def test_hours_and_disk_follow_from_the_rows(capsys):
    words = ("phi4-mini-flash", "--stage", "long", "--epoch_tokens", str(32768 * 6400))
    stage = told(capsys, *words)["stages"][0]
    assert stage["steps"] == 100
    assert stage["hours"] == pytest.approx(100 * stage["step"]["computing"] / 3600, rel=0.5)
    assert stage["disk"]["count"] == 1  # of 100 steps one checkpoint alone is written
    unknown = told(capsys, "phi4-mini-flash", "--stage", "long")["stages"][0]
    assert (unknown["steps"], unknown["hours"]) == (None, None)


def test_long_documents_take_longer(capsys):
    words = ("phi4-mini-flash-64k", "--gpus", "8xA100-80", "--document_tokens")
    short, long = (told(capsys, *words, tokens)["stages"][0] for tokens in ("4096", "65536"))
    assert long["step"]["computing"] > 1.3 * short["step"]["computing"]
    assert long["memory_total"] == pytest.approx(short["memory_total"], rel=0.02)


def test_memory_falls_with_cards_and_rises_with_length():
    layout = Layout(Engine(8, 3), 1, 16384, 4, 1, Recompute(), True)
    more = replace(layout, engine=Engine(32, 3))
    longer = replace(layout, length=32768, documents=8)
    own = rank_memory(Shape(), layout).total
    assert rank_memory(Shape(), more).total < own < rank_memory(Shape(), longer).total


def test_prepared_rows_are_found(tmp_path, capsys):
    words = ["tiny", f"--output_dir={tmp_path / 'run'}", f"--prepared_dir={tmp_path / 'prepared'}"]
    assert main(["prepare", *words, "--stage", "midtrain"]) == 0
    capsys.readouterr()
    stage = told(capsys, *words, "--stage", "midtrain", "--gpus", "H100-80")["stages"][0]
    assert stage["rows"]["known"].startswith("prepared (")
    assert stage["steps"] == stage["rows"]["rows"]  # a row a step, one epoch
    assert stage["hours"] > 0


PREPARED = Rows("prepared", rows=24, tokens=5429)
COUNTED = [
    ("num_train_epochs=1", "per_device_train_batch_size=5", "dataloader_drop_last=true", 4, 4524),  # 20 of 24 rows
    ("num_train_epochs=1", "per_device_train_batch_size=5", "dataloader_drop_last=false", 5, 5429),
    ("num_train_epochs=2", "per_device_train_batch_size=2", "dataloader_drop_last=false", 24, 10858),
    ("num_train_epochs=2", "gradient_accumulation_steps=5", "dataloader_drop_last=true", 10, 10858),
    ("num_train_epochs=1.5", "per_device_train_batch_size=8", "dataloader_drop_last=false", 5, 9048),  # 24 and 16
    ("max_steps=7", "per_device_train_batch_size=5", "dataloader_drop_last=true", 7, 7917),  # 20 and 15 rows
]


def of_prepared_rows(monkeypatch, *keys: str) -> tuple[Recipe, StagePlan]:
    """A recipe of one stage with these keys of `train`, and the plan of 24 rows with 5,429 tokens."""
    monkeypatch.setattr(stages, "rows_of", lambda *asked: PREPARED)
    own = ("max_steps=-1", "per_device_train_batch_size=1", "gradient_accumulation_steps=1", "save_strategy=epoch")
    recipe = load_recipe("tiny", [f"--stages.midtrain.train.{key}" for key in (*own, *keys)])
    (plan,) = plan_recipe(recipe, cluster_of("cpu"), "midtrain")
    return recipe, plan


@pytest.mark.parametrize(("length", "batch", "drop", "steps", "tokens"), COUNTED)
def test_steps_are_counted_as_the_trainer_does_and_tokens_by_rows(length, batch, drop, steps, tokens, monkeypatch):
    recipe, plan = of_prepared_rows(monkeypatch, length, batch, drop)
    assert (plan.steps, plan.tokens) == (steps, tokens)
    ranks = SimpleNamespace(count=1)
    stood_in = SimpleNamespace(args=recipe.stage("midtrain").train, train_dataset=range(24), data_ranks=ranks)
    stood_in.steps_of_an_epoch = SambayTrainer.steps_of_an_epoch.fget(stood_in)
    assert SambayTrainer.steps_of_the_stage.fget(stood_in) == steps


@pytest.mark.parametrize(
    ("keys", "saves"),
    [
        (("num_train_epochs=3",), 3),
        (("num_train_epochs=9", "max_steps=30"), 2),  # of 24 steps an epoch
        (("save_strategy=steps", "max_steps=7", "save_steps=0.3"), 3),  # after 3, 6 and 7
        (("save_strategy=steps", "max_steps=7", "save_steps=2"), 4),
    ],
)
def test_checkpoints_are_as_many_as_are_scheduled(keys, saves, monkeypatch):
    recipe, plan = of_prepared_rows(monkeypatch, "save_total_limit=null", *keys)
    assert plan.disk.count == saves
    assert len(scheduled(recipe.stage("midtrain"), plan.steps, plan.steps, 24)) == saves


def test_the_tiny_tokenizer_s_model_has_so_many_rows():
    assert (len(build_tokenizer()) + 63) // 64 * 64 == TINY_VOCABULARY


@pytest.mark.parametrize("text", ["8xA100-81", "0xH100-80", "many", "x"])
def test_unknown_cards_are_refused(text):
    with pytest.raises(UsageError, match="is no number of a known card"):
        cluster_of(text)


def test_other_models_are_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert main(["plan", "phi4-mini-flash", f"--model.model_name_or_path={tmp_path}"]) == 1
    assert "sft plan knows SambaY models" in capsys.readouterr().err


def test_stages_are_planned_one_by_one():
    recipe = load_recipe("phi4-mini-flash", [])
    plans = plan_recipe(recipe, cluster_of("8xH200-141"))
    assert [plan.name for plan in plans] == ["distill", "hard", "long"]
    assert [suite.point for suite in plans[0].suites] == ["start", "start", "distill", "distill"]
