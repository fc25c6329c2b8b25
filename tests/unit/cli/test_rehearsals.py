"""`--dry_run` says what its own verb would do; of a run that isn't done it is told which stage's model is taken."""

from __future__ import annotations

import builtins
import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from sft.cli.main import main
from sft.hub.folder import is_export
from sft.recipe import RunPaths, load_recipe
from sft.run.publish import export_stage

RECIPE = """\
name: small
output_dir: run
model:
  tokenizer: tiny
  dtype: float32
  config: {hidden_size: 32, intermediate_size: 48, num_hidden_layers: 4, num_attention_heads: 4, num_key_value_heads: 2}
defaults:
  train: {max_steps: 1, max_length: 256}
stages:
  - name: one
    data: {sources: [{generate: {rows: 6}}]}
    evaluate:
      before_first_stage: false
      suites: [{name: sums, source: {generate: {rows: 3, split: test}}, max_new_tokens: 4, samples_per_problem: 2}]
  - name: two
    data: {sources: [{generate: {rows: 5}}]}
  - name: three
    data: {sources: [{generate: {rows: 5}}]}
"""
LATER = "not trained yet: two, three"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which stage one of three is trained."""
    folder = tmp_path_factory.mktemp("rehearsals")
    (folder / "r.yaml").write_text(RECIPE)
    (folder / "other").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "r.yaml", "--stage", "one"]) == 0
        assert main(["export", "r.yaml"]) == 0
    return folder


@pytest.fixture
def there(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(trained)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    return trained


TRAINING = ("training: all weights", "then: export to run/export")
PLANS = {
    "run": (["training: all weights", "suite: sums at one", "then: export to run/export, no push, report"], ()),
    "train": (["training: all weights", "1. one: done already (1 steps)"], ("suite:", "then:")),
    "prepare": (["small: rows of 3 stages, kept in run/prepared", "sources: generate:all (6 rows)"], TRAINING),
    "preview": (["small: rows of 3 stages", "then: 2 rows of each stage on the terminal"], TRAINING),
    "preview --html p.html --row 3": (["then: row 3 of each stage as a page, p.html"], TRAINING),
    "eval": (
        [
            "eval: the model after stage one",
            "suite: sums: 3 problems of generate:all x 2 answers, greedy, up to 4 tokens",
            "eval: nothing after stage two, which isn't trained yet",
        ],
        TRAINING,
    ),
    "eval --start": (["eval: the start, before training"], TRAINING),
    "eval --model ./other --stage one": (["eval: the model ./other", "suite: sums: 3 problems"], TRAINING),
    "export": ([f"export: the model after stage one ({LATER})", "folder: run/export (", "weights: float32"], TRAINING),
    "export --out o --dtype bfloat16 --stage one": (["stage one", "folder: o\n", "weights: bfloat16"], TRAINING),
    "push --repo_id me/it": (
        [
            "push: to me/it, branch main, private",
            "now it would be refused: no Hugging Face token",
            f"model: the model after stage one ({LATER})",
            "weights: float32",
            "model.safetensors, modeling_phi4flash.py",
            "licence: The weights were trained from scratch",
            "README.md (the card) and LICENSE: the export's, but one that was edited on the Hub stays there",
        ],
        TRAINING,
    ),
    "push --repo_id me/it --public --revision v2 --replace_card --folder run/export": (
        ["push: to me/it, branch v2, public", "files: 17 in run/export", "LICENSE: the export's\n"],
        (*TRAINING, "model: "),
    ),
    "push --folder run": (["push: to nowhere yet (--repo_id", "files: none: run is not a folder that"], TRAINING),
    "report": (
        ["report: run/report/index.html, from what is in run: one trained, two not trained, three not trained"],
        TRAINING,
    ),
}


@pytest.mark.parametrize("words", PLANS)
def test_a_rehearsal_is_of_the_verb_that_was_typed(there: Path, capsys: pytest.CaptureFixture[str], words: str) -> None:
    verb, *options = words.split()
    before = {path: path.stat().st_mtime_ns for path in Path("run/export").rglob("*")}
    assert main([verb, "r.yaml", *options, "--dry_run"]) == 0
    out, err = capsys.readouterr()
    told, untold = PLANS[words]
    assert all(piece in err for piece in told) and not any(piece in err for piece in untold), err
    assert out == "run/resolved.dry_run.yaml\n"
    assert before == {path: path.stat().st_mtime_ns for path in Path("run/export").rglob("*")}


NODES = {"NODE_RANK": "1", "NNODES": "2", "WORLD_SIZE": "16", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}


@pytest.mark.parametrize("words", ["run r.yaml", "train r.yaml", "eval r.yaml", "prepare r.yaml", "export r.yaml"])
def test_on_a_node_nobody_waits_for_the_others(
    there: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str
) -> None:
    """A pod's variables tell of processes that a rehearsal doesn't start."""
    for name, value in NODES.items():
        monkeypatch.setenv(name, value)
    assert main([*words.split(), "--dry_run"]) == 0
    out, err = capsys.readouterr()
    assert out == "run/resolved.dry_run.yaml\n" and ("x 2 processes" in err) == (words[:2] in ("ru", "tr")), err


def test_a_push_would_export_what_has_changed(
    there: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(there / "run", tmp_path / "run")
    shutil.copy(there / "r.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run/export/config.json").write_text("{}")
    assert main(["push", "r.yaml", "--dry_run"]) == 0
    assert "files: exported to run/export first: weights" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["export", "push", "eval", "report"])
def test_a_rehearsal_of_an_untrained_run_says_so(in_tmp: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    Path("r.yaml").write_text(RECIPE)
    assert main([verb, "r.yaml", "--dry_run"]) == 0
    err = capsys.readouterr().err
    said = {"eval": "nothing after stage one, which isn't trained yet", "report": "one not trained"}
    assert said.get(verb, "nothing yet: no stage of small is trained in run") in err, err


@pytest.fixture
def read_only(there: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run's folder as on a file system that can only be read, which stops root, too."""
    run, real_open, real_folder = there / "run", builtins.open, tempfile.TemporaryDirectory

    def stopped(path: Any) -> None:
        if not isinstance(path, int) and Path(path).absolute().is_relative_to(run):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    def opened(path: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if set(mode) & set("wax+"):
            stopped(path)
        return real_open(path, mode, *rest, **options)

    def folder(*rest: Any, dir: Any = None, **options: Any) -> Any:
        if dir is not None:
            stopped(dir)
        return real_folder(*rest, dir=dir, **options)

    monkeypatch.setattr(builtins, "open", opened)
    monkeypatch.setattr(tempfile, "TemporaryDirectory", folder)
    return run


def test_a_report_into_a_read_only_run_is_refused_before_it_is_drawn(
    read_only: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sft.report.page.collect", lambda *run: pytest.fail("begun"))
    why = "run/report can't be written to (Read-only file system)"
    assert main(["report", "r.yaml"]) == 1
    what = "let it be written to, or copy the run and name the copy with --output_dir"
    assert capsys.readouterr().err == f"sft: {why}: {what}.\n"
    assert main(["report", "r.yaml", "--dry_run"]) == 1
    *_, plan, end = capsys.readouterr().err.splitlines()
    assert plan == f"   now it would be refused: {why}"
    assert end.startswith("sft: run can't be written to (Read-only file system): --dry_run writes the resolved recipe")


def test_a_read_only_run_is_exported_elsewhere(
    read_only: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert main(["export", "r.yaml"]) == 1
    what = "`sft export --out DIR` writes to another folder"
    assert capsys.readouterr().err.splitlines()[-1] == f"sft: run can't be written to (Read-only file system): {what}."
    assert main(["export", "r.yaml", "--out", str(read_only / "more")]) == 1
    assert "can't be written to (Read-only file system): choose another folder." in capsys.readouterr().err
    assert main(["export", "r.yaml", "--out", str(tmp_path / "out")]) == 0
    assert is_export(tmp_path / "out") and [path.name for path in tmp_path.iterdir()] == ["out"]
    note = f"run: no lock can be kept there (Read-only file system); let no other command write to {tmp_path}/out."
    assert note in capsys.readouterr().err
    monkeypatch.setattr("sft.hub.export.export", lambda *model, **options: pytest.fail("exported again"))
    paths = RunPaths(load_recipe("r.yaml", []))
    assert export_stage(paths, reuse=True) == paths.export  # what `sft push` asks for


@pytest.mark.parametrize(
    "words", [["chat", "r.yaml", "--prompt", "2?", "--max_new_tokens", "2"], ["export", "r.yaml", "--out", "other"]]
)
def test_an_unfinished_run_tells_which_model_is_taken(
    there: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    note = f"the model after stage one is taken; {LATER}\n"
    assert main(words) == 0
    assert capsys.readouterr().err.startswith(note)
    assert main([*words, "--stage", "one"]) == 0
    assert note not in capsys.readouterr().err


def test_an_evaluation_tells_what_it_leaves_out(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "r.yaml"]) == 0
    assert capsys.readouterr().err.startswith("not trained yet, so not evaluated: two, three\n")


def test_a_model_is_not_loaded_for_a_stage_without_suites(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "r.yaml", "--model", "run/export"]) == 1
    assert capsys.readouterr().err.startswith("sft: stage three has no suites to evaluate a model on")
