"""Pushing a folder: atomic, continued by the same call, private unless published, and silent about the token."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_server import TOKEN, HubServer, running_hub

from sft.hub.push import PushResult, push
from sft.run.publish import push_obstacle
from sft.utils.errors import UserError
from sft.utils.files import sha256_file

REPO = "tester/model"


def send(hub: HubServer, folder: Path, repo: str = REPO, **kwargs: Any) -> PushResult:
    options = {"endpoint": hub.endpoint, "token": TOKEN, "verify": False, **kwargs}
    return push(folder, repo, **options)


def refusal(*arguments: Any, **kwargs: Any) -> str:
    """The one sentence with which a push is refused; it never holds the token."""
    with pytest.raises(UserError) as caught:
        send(*arguments, **kwargs)
    assert TOKEN not in str(caught.value) and TOKEN not in repr(caught.value.__cause__)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same_files(hub: HubServer, folder: Path, repo: str = REPO) -> bool:
    local = {path.relative_to(folder).as_posix(): sha256_file(path) for path in folder.rglob("*") if path.is_file()}
    remote = {path: entry["sha256"] for path, entry in hub.files(repo).items() if path != ".gitattributes"}
    return local == remote


def test_all_files_arrive_in_one_commit_of_a_private_repository(hub: HubServer, fake_export: Path) -> None:
    lines: list[str] = []
    result = send(hub, fake_export, progress=lines.append)
    assert same_files(hub, fake_export)
    repo = hub.store.repos[f"models/{REPO}"]
    assert repo["visibility"] == "private" and not result.public
    assert len(repo["commits"]) == 2, "the initial commit and ours"
    assert result.commit == repo["branches"]["main"]
    assert sorted(result.uploaded) == sorted(p.name for p in fake_export.iterdir()) and not result.unchanged
    assert any("model-00002-of-00003.safetensors (40.0 kB)" in line for line in lines)


def test_a_second_push_sends_nothing(hub: HubServer, fake_export: Path) -> None:
    first = send(hub, fake_export)
    puts = hub.count("PUT", "/lfs/")
    second = send(hub, fake_export)
    assert second.commit == first.commit and not second.uploaded and len(second.unchanged) == 7
    assert hub.count("PUT", "/lfs/") == puts == 3


def test_a_failed_upload_leaves_the_repository_unchanged_and_goes_on(hub: HubServer, fake_export: Path) -> None:
    fault = hub.add_fault("PUT", "/lfs/", 403, nth=2)
    text = refusal(hub, fake_export)
    assert "while uploading model-00002-of-00003.safetensors" in text and "(403)" in text
    assert "The repository is unchanged" in text and "stored so far: model-00001-of-00003.safetensors" in text
    assert "still missing: model-00002-of-00003.safetensors, model-00003-of-00003.safetensors, README.md" in text
    assert "The same command goes on from here" in text
    assert list(hub.files(REPO)) == [".gitattributes"]
    hub.faults.remove(fault)
    before = hub.count("PUT", "/lfs/")
    send(hub, fake_export)
    assert same_files(hub, fake_export)
    assert hub.count("PUT", "/lfs/") - before == 2, "the first file was stored already"


def test_a_failed_commit_goes_on_without_sending_weights_again(hub: HubServer, fake_export: Path) -> None:
    fault = hub.add_fault("POST", "/commit/", 500)
    text = refusal(hub, fake_export)
    assert "while committing" in text and "failed (500)" in text
    hub.faults.remove(fault)
    send(hub, fake_export)
    assert same_files(hub, fake_export) and hub.count("PUT", "/lfs/") == 3


def test_a_commit_whose_answer_is_lost_is_found_by_the_next_push(hub: HubServer, fake_export: Path) -> None:
    fault = hub.add_fault("POST", "/commit/", "lose")
    assert "can't be reached or broke off" in refusal(hub, fake_export)
    hub.faults.remove(fault)
    result = send(hub, fake_export)
    assert not result.uploaded and same_files(hub, fake_export)
    assert result.commit == hub.store.repos[f"models/{REPO}"]["branches"]["main"]


def test_a_passing_failure_of_the_server_is_retried(hub: HubServer, fake_export: Path) -> None:
    hub.add_fault("PUT", "/lfs/", 503, nth=1, times=1)
    send(hub, fake_export)
    assert same_files(hub, fake_export) and hub.count("PUT", "/lfs/") == 4


def test_a_killed_push_goes_on(hub: HubServer, fake_export: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of the second file; then the same command."""
    fault = hub.add_fault("PUT", "/lfs/", "hang", nth=2)
    code = f"from sft.hub.push import push; print(push({str(fake_export)!r}, {REPO!r}, verify=False).commit)"
    environment = {**os.environ, **hub.environment(tmp_path / "home")}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL)
    assert fault.hit.wait(60)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    fault.released.set()
    assert list(hub.files(REPO)) == [".gitattributes"]
    hub.faults.remove(fault)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert same_files(hub, fake_export) and done.stdout.strip() == hub.store.repos[f"models/{REPO}"]["branches"]["main"]
    assert TOKEN not in done.stdout + done.stderr
    written = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in path.read_bytes() for path in [*written, *fake_export.rglob("*.json")])


def test_a_restarted_server_still_has_what_was_stored(fake_export: Path, tmp_path: Path) -> None:
    root = tmp_path / "hub"
    with running_hub(root) as hub:
        hub.add_fault("POST", "/commit/", 500)
        refusal(hub, fake_export)
    with running_hub(root) as hub:
        send(hub, fake_export)
        assert same_files(hub, fake_export) and hub.count("PUT", "/lfs/") == 0


def test_an_update_replaces_all_files_at_once_and_takes_stale_weights_away(
    hub: HubServer, fake_export: Path, seal: Callable[..., None]
) -> None:
    send(hub, fake_export)
    for path in fake_export.glob("*.safetensors"):
        path.unlink()
    (fake_export / "model.safetensors").write_bytes(os.urandom(1000))
    seal(fake_export)
    result = send(hub, fake_export)
    assert result.deleted == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert same_files(hub, fake_export)
    assert len(hub.store.repos[f"models/{REPO}"]["commits"]) == 3


def test_files_that_users_added_to_the_repository_stay(hub: HubServer, fake_export: Path) -> None:
    send(hub, fake_export)
    repo = hub.store.repos[f"models/{REPO}"]
    files = {**hub.files(REPO), "figure.png": hub.store.regular(b"a figure")}
    hub.store.commit(repo, "main", files, "by hand")
    (fake_export / "README.md").write_text("---\nlicense: mit\n---\nedited")
    result = send(hub, fake_export)
    assert result.uploaded == ["README.md"] and "figure.png" in hub.files(REPO)


def test_another_model_is_not_overwritten(hub: HubServer, fake_export: Path) -> None:
    repo = hub.store.create(f"models/{REPO}", "private")
    hub.store.commit(repo, "main", {"config.json": hub.store.regular(b"{}")}, "someone's")
    text = refusal(hub, fake_export)
    assert "already holds a model that sft didn't push (config.json)" in text
    assert hub.count("PUT", "/lfs/") == 0


def test_a_change_by_someone_else_in_between_is_not_overwritten(
    hub: HubServer, fake_export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sft.hub.push import _Upload

    run = _Upload.run

    def meddle(upload: _Upload, message: str) -> str:
        repo = hub.store.repos[f"models/{REPO}"]
        hub.store.commit(repo, "main", {**hub.files(REPO), "x.txt": hub.store.regular(b"x")}, "meanwhile")
        return run(upload, message)

    with monkeypatch.context() as patch:
        patch.setattr(_Upload, "run", meddle)
        assert "was changed by someone else meanwhile (412)" in refusal(hub, fake_export)
    send(hub, fake_export)
    assert "x.txt" in hub.files(REPO)


def test_a_public_repository_needs_public(hub: HubServer, fake_export: Path) -> None:
    hub.store.create(f"models/{REPO}", "public")
    assert "is public" in refusal(hub, fake_export)
    assert hub.count("POST", "/preupload/") == 0
    assert send(hub, fake_export, public=True).public


def test_a_public_repository_is_told_of_before_a_push(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By rehearsals, and before a run that would push."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert push_obstacle(REPO, publish=False) is None  # isn't there
    hub.store.create(f"models/{REPO}", "private")
    assert push_obstacle(REPO, publish=False) is None
    hub.store.create("models/tester/seen", "public")
    told = push_obstacle("tester/seen", publish=False)
    assert told is not None and told.startswith("tester/seen is public, so everybody would see this push")
    assert push_obstacle("tester/seen", publish=True) is None


def test_publishing_comes_last(hub: HubServer, fake_export: Path) -> None:
    fault = hub.add_fault("POST", "/commit/", 500)
    refusal(hub, fake_export, public=True)
    assert hub.store.repos[f"models/{REPO}"]["visibility"] == "private"
    hub.faults.remove(fault)
    assert send(hub, fake_export, public=True).public
    assert hub.store.repos[f"models/{REPO}"]["visibility"] == "public"


def test_a_branch_is_made_and_main_left_alone(hub: HubServer, fake_export: Path) -> None:
    send(hub, fake_export, revision="trial")
    assert list(hub.files(REPO)) == [".gitattributes"]
    assert "config.json" in hub.files(REPO, branch="trial")


def test_a_name_without_namespace_is_the_users_own(hub: HubServer, fake_export: Path) -> None:
    assert send(hub, fake_export, "model").repo_id == REPO


def test_a_gitignore_in_the_repository_is_noticed(
    hub: HubServer, fake_export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub leaves out files that .gitignore names, and says so only in the preupload answer."""
    commit = hub.store.commit

    def dropping(repo: Any, branch: str, files: dict[str, Any], summary: str) -> str:
        return commit(repo, branch, {k: v for k, v in files.items() if k != "tokenizer.json"}, summary)

    monkeypatch.setattr(hub.store, "commit", dropping)
    assert "tokenizer.json is missing there or differs" in refusal(hub, fake_export)


@pytest.mark.parametrize("name", ["", "a/b/c", "-x", "a--b", "with space/x", "name.git", "näme/x", "/x"])
def test_bad_repository_names(hub: HubServer, fake_export: Path, name: str) -> None:
    assert "is no repository name like my-name/my-model" in refusal(hub, fake_export, name)
    assert not hub.requests


def test_a_missing_token_says_how_to_log_in(hub: HubServer, fake_export: Path) -> None:
    text = refusal(hub, fake_export, token=None)
    assert "hf auth login" in text and "HF_TOKEN" in text
    assert not hub.requests


def test_a_refused_token(hub: HubServer, fake_export: Path) -> None:
    wrong = "hf_thisisnotthetokenoftheserver"
    with pytest.raises(UserError) as caught:
        send(hub, fake_export, token=wrong)
    assert "refused the token (401)" in str(caught.value) and wrong not in str(caught.value)


@pytest.mark.parametrize("token", ["hf_broken\ntoken", "hf broken token", "hf_tökentökentökentöken"])
def test_a_mangled_token_is_not_quoted(hub: HubServer, fake_export: Path, token: str) -> None:
    with pytest.raises(UserError, match="holds spaces or characters that no token has") as caught:
        send(hub, fake_export, token=token)
    assert "broken" not in str(caught.value) and not hub.requests


def test_a_token_that_may_only_read(hub: HubServer, fake_export: Path) -> None:
    hub.role = "read"
    text = refusal(hub, fake_export)
    assert "(403)" in text and "use a token with write access" in text


def test_a_foreign_namespace(hub: HubServer, fake_export: Path) -> None:
    text = refusal(hub, fake_export, "someone-else/model")
    assert "this token may not do that (403)" in text and "someone-else" in text


def test_an_error_that_repeats_the_token_is_scrubbed(hub: HubServer, fake_export: Path) -> None:
    hub.add_fault("POST", "/commit/", 400, message=f"bad header Bearer {TOKEN}")
    text = refusal(hub, fake_export)
    assert "<token>" in text and "refused the request (400)" in text


def test_a_server_that_is_down(fake_export: Path, tmp_path: Path) -> None:
    with running_hub(tmp_path / "hub") as hub:
        pass
    text = refusal(hub, fake_export)
    assert f"{hub.endpoint} can't be reached" in text and "before anything was sent" in text


def test_offline_mode(hub: HubServer, fake_export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "offline mode is on; unset HF_HUB_OFFLINE" in refusal(hub, fake_export)


def test_only_whole_exports_are_pushed(hub: HubServer, fake_export: Path, tmp_path: Path) -> None:
    assert "is no folder" in refusal(hub, tmp_path / "nothing")
    (tmp_path / "other").mkdir()
    assert "is not a folder that `sft export` wrote" in refusal(hub, tmp_path / "other")
    with open(fake_export / "model-00001-of-00003.safetensors", "r+b") as handle:
        handle.truncate(10)
    assert "model-00001-of-00003.safetensors is not what was exported" in refusal(hub, fake_export)
    (fake_export / "model-00001-of-00003.safetensors").unlink()
    assert "model-00001-of-00003.safetensors is missing" in refusal(hub, fake_export)
    assert not hub.requests


def test_an_adapter_on_a_local_base_is_not_pushed(hub: HubServer, fake_export: Path, seal: Callable[..., None]) -> None:
    seal(fake_export, adapter_base="/home/me/base")
    assert "which nobody else can load" in refusal(hub, fake_export)


def test_hidden_files_stay_at_home(hub: HubServer, fake_export: Path) -> None:
    (fake_export / ".env").write_text(f"HF_TOKEN={TOKEN}")
    (fake_export / ".cache").mkdir()
    (fake_export / ".cache" / "x").write_text("x")
    send(hub, fake_export)
    assert not {path for path in hub.files(REPO) if path.startswith(".") and path != ".gitattributes"}


def test_no_request_body_or_store_holds_the_token(hub: HubServer, fake_export: Path) -> None:
    send(hub, fake_export)
    stored = [path for path in hub.store.root.rglob("*") if path.is_file()]
    assert stored and not any(TOKEN.encode() in path.read_bytes() for path in stored)
    assert json.loads(hub.store.index.read_text())
