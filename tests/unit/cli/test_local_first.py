"""What is known here is said first: before torch is imported, a model is loaded or exported, or the Hub is asked."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_models import FAMILIES, write_chats, write_model

from sft.cli.main import main
from sft.utils import hub_ask
from sft.utils.errors import UserError

HUB = """\
name: small
output_dir: run
model: {model_name_or_path: someone/model}
stages:
  - name: one
    data: {sources: [{path: someone/rows}]}
    evaluate: {suites: [{name: sums, source: {path: someone/sums}}]}
  - name: two
    data: {sources: [{generate: {rows: 5}}]}
"""


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A Hub that gives no answer; the names that it was asked for."""
    asked: list[str] = []

    def unreachable(self: object, name: str, **options: object) -> None:
        asked.append(name)
        raise ConnectionError("no route")

    for kind in ("model_info", "dataset_info"):
        monkeypatch.setattr(f"huggingface_hub.HfApi.{kind}", unreachable)
    monkeypatch.setattr(hub_ask, "_silent_at", [])
    return asked


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["push", "r.yaml", "--repo_id", "me/it"], "no stage of small is trained in run; run `sft run` first"),
        (["export", "r.yaml"], "no stage of small is trained in run; run `sft run` first"),
        (["export", "r.yaml", "--stage", "two"], "stage two isn't trained in run"),
        (["chat", "r.yaml", "--prompt", "hi"], "no stage of small is trained in run; run `sft run` first"),
        (["chat", "r.yaml", "--stage", "two", "--prompt", "hi"], "stage two isn't trained in run"),
        (["chat", "--model", "./gone", "--prompt", "hi"], "--model: no model at ./gone: no such file or folder"),
        (["chat", "--model", "./gone", "--prompt", " "], "--prompt is empty"),
        (["eval", "r.yaml"], "no stage is trained in run; `sft run` trains"),
        (["eval", "r.yaml", "--stage", "one"], "Stage one isn't done: run `sft train --stage one` first"),
        (["eval", "r.yaml", "--start", "--stage", "two"], "--start asks the suites of the first stage"),
        (["report", "r.yaml"], "there is nothing to report in run yet; run `sft run` first"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_refusal_takes_neither_torch_nor_the_hub(in_tmp: Path, words: list[str], said: str) -> None:
    Path("r.yaml").write_text(HUB)
    code = (
        "import sys, huggingface_hub; from sft.cli.main import main\n"
        "def asked(*names, **options): print('asked', names[1:])\n"
        "huggingface_hub.HfApi.model_info = huggingface_hub.HfApi.dataset_info = asked\n"
        "status = main(sys.argv[1:]); print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)), status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=100)
    assert done.stderr.startswith(f"sft: {said}") and done.stderr.count("\n") == 1, done.stderr
    assert done.stdout in ("[] 1\n", "[] 2\n"), done.stdout
    assert not Path("run/report").exists()


def test_a_model_that_nobody_has_is_asked_for_once(
    in_tmp: Path, silent: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", "--model", "someone/nothing", "--prompt", "hi"]) == 1
    assert silent == ["someone/nothing"] and "the Hub can't be reached (no route)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("repo_id", "token", "offline", "said"),
    [
        ("me/it", None, False, "no Hugging Face token: run `hf auth login`"),
        ("me/it", "hf_a b", False, "the Hugging Face token holds spaces"),
        ("a/b/c", "hf_some", False, "'a/b/c' is no repository name"),
        ("me/it", "hf_some", True, "nothing can be pushed: offline mode is on; unset HF_HUB_OFFLINE"),
    ],
)
def test_a_push_that_cannot_begin_exports_nothing(
    in_tmp: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    silent: list[str],
    repo_id: str,
    token: str | None,
    offline: bool,
    said: str,
) -> None:
    Path("r.yaml").write_text(HUB)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("sft.run.publish.trained_stages", lambda paths: ["one"])
    monkeypatch.setattr("sft.run.publish.export_stage", lambda *paths, **options: pytest.fail("exported"))
    assert main(["push", "r.yaml", "--repo_id", repo_id]) == 1
    assert capsys.readouterr().err.startswith(f"sft: {said}")
    if "/" in repo_id and repo_id.count("/") == 1:
        # A whole run would end with that push: it isn't begun.
        assert main(["run", "r.yaml", "--push.repo_id", repo_id]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"sft: --push.repo_id: {said}") and "later with --push.repo_id null" in err
    assert silent == []


# ---- what --dry_run checks ----


def rehearse(*words: str) -> int:
    return main(["run", "lora-chat", "--variables.data", "data.jsonl", "--dry_run", *words])


@pytest.mark.parametrize("verb", ["run", "train", "prepare", "preview"])
def test_a_base_model_without_a_template_is_told_at_once(
    in_tmp: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    write_chats(Path("data.jsonl"), 4)
    write_model(Path("model"), FAMILIES[0])
    capsys.readouterr()
    words = ["lora-chat", "--variables.data", "data.jsonl", "--variables.model", "./model"]
    for flag in ([], ["--dry_run"]):
        assert main([verb, *words, *flag]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "model.model_name_or_path: The tokenizer has no chat template; set `model.chat_template`" in line
    assert main([verb, *words, "--model.chat_template", "llama3", "--dry_run"]) == 0
    broken = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
    capsys.readouterr()
    assert main([verb, *words, "--model.chat_template", broken, "--dry_run"]) == 2
    assert "chat template" in capsys.readouterr().err


def test_names_that_cannot_be_asked_for_are_told_once_each_and_all_at_once(
    in_tmp: Path, silent: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("r.yaml").write_text(HUB.replace("generate: {rows: 5}", "path: someone/rows, split: test"))
    assert main(["run", "r.yaml", "--dry_run"]) == 0
    assert sorted(silent) == ["someone/model", "someone/rows", "someone/sums"]
    unchecked = [line for line in capsys.readouterr().err.splitlines() if ": not checked: " in line]
    assert [line.split(": ")[1] for line in unchecked] == [
        "model.model_name_or_path",
        "stages[0].data.sources[0].path",
        "stages[0].evaluate.suites[0].source.path",
    ]
    assert all("the Hub can't be reached (no route)" in line for line in unchecked)
    assert main(["run", "r.yaml"]) == 2
    assert capsys.readouterr().err.count("the Hub can't be reached") == 4


def test_a_hub_that_never_answers_is_not_waited_for(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The look-up of a host's name can take minutes, whatever limit a client sets."""
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *names, **options: time.sleep(90))
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *names, **options: time.sleep(90))
    monkeypatch.setattr("sft.run.checks.REHEARSAL_SECONDS", 0.2)
    Path("r.yaml").write_text(HUB)
    began = time.monotonic()
    assert main(["run", "r.yaml", "--dry_run"]) == 0
    assert time.monotonic() - began < 60
    assert capsys.readouterr().err.count("no answer within 0.2 seconds") == 3


SCRIPT = """\
import sys
from sft.cli.main import main
sys.exit(main(["run", "r.yaml", "--dry_run"]))
"""


def test_the_hub_is_asked_for_data_sets_and_suites(
    in_tmp: Path, hub_says: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    Path("r.yaml").write_text(HUB)
    done = hub_says(SCRIPT, there=["models/someone/model", "datasets/someone/rows"])
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("sft: r.yaml:7: stages[0].evaluate.suites[0].source.path: no data set called someone/sums")
    done = hub_says(SCRIPT, there=["models/someone/model", "datasets/someone/rows", "datasets/someone/sums"])
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "not checked" in line]
    assert "whether the tokenizer someone/model has a chat template" in line


@pytest.fixture
def hub_says(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python code beside a Hub of the test's own that holds repositories without files."""
    import os

    from hub_server import running_hub

    def run(code: str, *, there: list[str]) -> subprocess.CompletedProcess[str]:
        with running_hub(tmp_path / "hub") as hub:
            for key in there:
                hub.store.create(key, "public")
            environment = {**os.environ, **hub.environment(tmp_path / "home")}
            return subprocess.run(
                [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100
            )

    return run


def test_a_cached_template_is_checked_without_the_hub(
    in_tmp: Path, silent: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    write_chats(Path("data.jsonl"), 4)
    write_cached(in_tmp / "hf", "someone/base", FAMILIES[0])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(in_tmp / "hf"))
    for name in ("transformers.utils.hub", "huggingface_hub.file_download"):
        monkeypatch.setattr(f"{name}.constants.HF_HUB_CACHE", str(in_tmp / "hf"))
    capsys.readouterr()
    words = ["--variables.model", "someone/base"]
    assert rehearse(*words) == 2
    assert "model.model_name_or_path: The tokenizer has no chat template" in capsys.readouterr().err
    assert rehearse(*words, "--model.chat_template", "llama3") == 0
    assert silent == [], capsys.readouterr().err


def write_cached(cache: Path, name: str, family: Any) -> None:
    """A model as `huggingface_hub` keeps one that has been loaded, with the files it was found not to have."""
    folder, commit = cache / f"models--{name.replace('/', '--')}", "a" * 40
    write_model(folder / "snapshots" / commit, family)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(commit)
    absent = folder / ".no_exist" / commit
    absent.mkdir(parents=True)
    (absent / "chat_template.jinja").touch()


def test_a_cached_model_is_loaded_at_once_without_the_hub(
    silent: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(hub_ask, "is_cached", lambda *names: True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with hub_ask.hub_or_cache("someone/base"):
        assert constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE
    with hub_ask.hub_or_cache("someone/other"):  # it isn't asked again at once
        assert constants.HF_HUB_OFFLINE
    assert silent == ["someone/base"]
    assert capsys.readouterr().err == "someone/base: the Hub can't be reached, so what is cached is taken\n"
    with hub_ask.hub_or_cache(str(tmp_path)):
        assert not constants.HF_HUB_OFFLINE


def test_a_refusal_of_the_hub_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    def refuse(what: str, name: str, *rest: Any, **options: Any) -> None:
        raise UserError("no")

    monkeypatch.setattr(hub_ask, "ask_hub", refuse)
    monkeypatch.setattr(hub_ask, "is_cached", lambda *names: True)
    monkeypatch.setattr(hub_ask, "_silent_at", [])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with hub_ask.hub_or_cache("someone/base"):
        assert not constants.HF_HUB_OFFLINE
