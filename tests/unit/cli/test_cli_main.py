"""The command itself: help, exit statuses, and one sentence for every way to fail."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from child_time import run_timed
from children import read_line

from sft.cli.main import MODULES, VERBS, main
from sft.utils.errors import UsageError, UserError

RECIPE = """\
name: small
output_dir: run
model: {tokenizer: tiny, config: {hidden_size: 32, num_attention_heads: 4, num_key_value_heads: 2}}
stages:
  - name: one
    data: {sources: [{generate: {rows: 5}}]}
"""


@pytest.fixture
def recipe(in_tmp: Path) -> Path:
    """A recipe in an otherwise empty current folder."""
    (in_tmp / "r.yaml").write_text(RECIPE)
    return in_tmp / "r.yaml"


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run `sft recipes` with a verb that raises what it is given; the exit status and standard error."""
    import sft.cli.recipes

    def run(error: BaseException, *words: str) -> tuple[int, str]:
        def execute(arguments: Any, overrides: Sequence[str]) -> int:
            raise error

        monkeypatch.setattr(sft.cli.recipes, "execute", execute)
        return main(["recipes", *words]), capsys.readouterr().err

    return run


def sft(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run([sys.executable, "-m", "sft", *words], capture_output=True, text=True, timeout=120, **options)


@pytest.mark.parametrize("verb", [*VERBS, ""])
def test_help_is_light(verb: str) -> None:
    words = [verb, "--help"] if verb else ["--help"]
    code = (
        "import sys; from sft.cli.main import main; status = main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'numpy', 'deepspeed'} & set(sys.modules);"
        "print('heavy:', sorted(heavy)); sys.exit(status)"
    )
    done, seconds = run_timed([sys.executable, "-c", code, *words])
    assert done.returncode == 0 and done.stdout.endswith("heavy: []\n"), done.stdout[-200:]
    assert "usage: sft" in done.stdout and done.stderr == ""
    assert seconds < 10  # ten times what it may take on a quiet machine


def test_every_verb_has_a_module() -> None:
    folder = Path(main.__code__.co_filename).parent
    for verb in VERBS:
        assert (folder / f"{MODULES.get(verb, verb)}.py").is_file(), verb


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rn"], "sft: no verb 'rn', did you mean run?; `sft --help` lists them"),
        (["zzz"], "sft: no verb 'zzz'; `sft --help` lists them"),
        (["run"], "sft: no recipe is named: a file, or a name from `sft recipes`; see `sft run --help`"),
        (["run", "--config", "nosuch.yaml"], "sft: nosuch.yaml: no such recipe file"),
        (
            ["run", "--config", "r.yaml", "--stage", "two"],
            "sft: the recipe small has no stage 'two'; its stages are: one",
        ),
        (["run", "--config", "r.yaml", "--restart", "two"], "sft: the recipe small has no stage 'two'"),
        (["run", "--config", "r.yaml", "--seeed", "1"], "sft: --seeed: unknown key, did you mean seed?"),
        (["run", "--config", "r.yaml", "extra"], "sft: 'extra': expected --key value"),
        (["doctor", "--seed", "1"], "sft: unknown argument '--seed'; see `sft doctor --help`"),
        (["recipes", "copy"], "sft: say which recipe"),
        (["recipes", "show", "gsm9k"], "sft: gsm9k: no such recipe file, and no packaged recipe of that name, did you"),
        (["push", "--config", "r.yaml"], "sft: say where to: --repo_id my-name/my-model, or set push.repo_id"),
        (["chat"], "sft: say which model answers: --config RECIPE or --model PATH"),
        (["chat", "--model", "x", "--seeed", "1"], "sft: unknown argument '--seeed'"),
        (["preview", "--config", "r.yaml", "--rows", "0"], "sft: argument --rows: must be at least 1, not 0"),
    ],
)
def test_wrong_usage_is_one_sentence_and_status_2(
    recipe: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith(message) and err.count("\n") == 1, err


def test_every_problem_of_a_recipe_is_a_line(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.write_text(RECIPE.replace("name: small", "nam: small").replace("rows: 5", "rows: x"))
    assert main(["run", "--config", "r.yaml"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("sft: r.yaml:") for line in lines), lines


@pytest.mark.parametrize("verb", ["run", "prepare", "preview", "train", "eval", "export", "push", "report"])
def test_dry_run_writes_the_resolved_recipe(recipe: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    from sft.recipe import load_recipe

    assert main([verb, "--config", "r.yaml", "--dry_run", "--seed", "3"]) == 0
    assert capsys.readouterr().out == "run/resolved.yaml\n"
    assert load_recipe("run/resolved.yaml") == load_recipe("r.yaml", ["--seed", "3"])
    assert sorted(path.name for path in Path("run").iterdir()) == ["resolved.yaml"]


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (UserError("it broke"), 1, "sft: it broke\n"),
        (UsageError("wrong\ntwice"), 2, "sft: wrong\nsft: twice\n"),
        (KeyboardInterrupt(), 130, "sft: interrupted; the same command continues it\n"),
        (OSError(errno.ENOSPC, "No space", "big.bin"), 1, "sft: the disk is full while writing big.bin; make room and"),
        (RuntimeError("Error: No space left on device (os error 28)"), 1, "sft: the disk is full; make room and"),
        (ValueError("what\nelse"), 1, "sft: ValueError: what (run again with --debug for the traceback)\n"),
        (MemoryError(), 1, "sft: out of memory; lower per_device_train_batch_size"),
    ],
)
def test_failures_are_one_sentence(
    failing: Callable[..., tuple[int, str]], error: BaseException, status: int, text: str
) -> None:
    found, err = failing(error)
    assert found == status and err.startswith(text) and "Traceback" not in err


def test_a_disk_full_further_down_is_found(failing: Callable[..., tuple[int, str]]) -> None:
    outer = RuntimeError("writing failed")
    outer.__cause__ = OSError(errno.ENOSPC, "No space", "x")
    assert failing(outer)[1].startswith("sft: the disk is full while writing x")


def test_debug_shows_the_traceback(failing: Callable[..., tuple[int, str]]) -> None:
    status, err = failing(UserError("it broke"), "--debug")
    assert status == 1 and "Traceback" in err and err.startswith("sft: it broke\n")


def test_sigterm_is_143(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import sft.cli.recipes

    before = signal.getsignal(signal.SIGTERM)

    def execute(arguments: Any, overrides: Sequence[str]) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        return 0

    monkeypatch.setattr(sft.cli.recipes, "execute", execute)
    assert main(["recipes"]) == 143
    assert capsys.readouterr().err == "sft: interrupted; the same command continues it\n"
    assert signal.getsignal(signal.SIGTERM) == before


WAITING = """
import sys, time
import sft.cli.recipes as recipes
from sft.cli.main import main

def execute(arguments, overrides):
    print("ready", flush=True)
    time.sleep(60)
    return 0

recipes.execute = execute
sys.exit(main(["recipes"]))
"""


def start_waiting(*wrapper: str) -> subprocess.Popen[str]:
    """`sft` in a process of its own, in the midst of a verb that takes a minute."""
    command = [*wrapper, sys.executable, "-c", WAITING]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert read_line(process.stdout) == "ready\n"
    return process


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGHUP, 143)],
    ids=lambda x: str(x),
)
def test_a_signal_in_a_real_process(number: signal.Signals, status: int) -> None:
    process = start_waiting()
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == status and err == "sft: interrupted; the same command continues it\n"


def test_a_terminal_that_goes_away_ends_it_in_order() -> None:
    """Nothing can be written to it any more, which is no error."""
    ours, terminal = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(terminal)
    ready, _, _ = select.select([ours], [], [], 60)
    assert ready and os.read(ours, 100).startswith(b"ready")
    os.close(ours)
    assert process.wait(60) == 143


@pytest.mark.parametrize("wrapper", [[], ["nohup"]], ids=["background job", "nohup"])
def test_what_was_ignored_from_the_start_stays_ignored(wrapper: list[str]) -> None:
    """A background job of a shell ignores Ctrl-C, and SIGTERM ends it all the same."""
    process = start_waiting("sh", "-c", 'trap "" INT; exec "$@"', "sh", *wrapper)
    process.send_signal(signal.SIGINT)
    if wrapper:
        process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143 and err == "sft: interrupted; the same command continues it\n"


def test_children_have_their_signals_whatever_the_tests_were_started_with() -> None:
    """In a background job SIGINT is ignored, and what a process ignores its children ignore."""
    support = Path(__file__).parents[2] / "support"
    code = (
        f"import signal, subprocess, sys; sys.path.insert(0, {str(support)!r})\n"
        "from children import give_children_their_signals\n"
        "give_children_their_signals()\n"
        "show = 'import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler, flush=True)'\n"
        "subprocess.run([sys.executable, '-c', show], timeout=60)\n"
        "signal.raise_signal(signal.SIGINT)\n"
        "print('still here')"
    )
    command = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == "True\nstill here\n", done.stderr


def test_a_closed_pipe_is_no_error_message() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "sft", "recipes"], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(writer)
    assert done.stderr == "" and done.returncode == 1


def test_version_and_module_entry() -> None:
    done = sft("--version")
    assert (done.returncode, done.stdout) == (0, "sambay-sft 0.1.0\n")


def test_eval_and_export_of_an_untrained_run(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--config", "r.yaml"]) == 1
    assert capsys.readouterr().err.startswith("sft: no stage is trained in run; `sft run` trains")
    assert main(["export", "--config", "r.yaml"]) == 1
    assert capsys.readouterr().err.startswith("sft: no stage of small is trained in run; run `sft run`")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("eval --limit many", "--limit: must be a whole number, not many"),
        ("eval --samples 1.5", "--samples: must be a whole number, not 1.5"),
        ("chat --seed x", "--seed: must be a whole number, not x"),
        ("chat --temperature hot", "--temperature: must be a number, not hot"),
        ("chat --top_k 2.5", "--top_k: must be a whole number, not 2.5"),
        ("serve --port http", "--port: must be a whole number, not http"),
        ("serve --timeout 1h", "--timeout: must be a number, not 1h"),
        ("preview --row first", "--row: must be a whole number, not first"),
        ("launch --gpus_per_node all", "--gpus_per_node/--gpus-per-node: must be a whole number, not all"),
    ],
)
def test_options_that_are_no_numbers_are_told_in_our_words(
    words: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 2
    assert capsys.readouterr().err.startswith(f"sft: argument {told}")
