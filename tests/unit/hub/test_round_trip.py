"""What is pushed is what was trained: from the folder to the Hub and back, in clean processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_server import TOKEN, HubServer

from sft.hub.push import push
from sft.hub.verify_upload import verify_upload
from sft.utils.errors import UserError

REPO = "tester/tiny-sambay"


def test_push_by_environment_downloads_again_and_compares(hub: HubServer, sambay_export: Path, tmp_path: Path) -> None:
    """The way a user does it: HF_ENDPOINT and HF_TOKEN in the environment, a process of its own."""
    code = (
        "import json, dataclasses, sys; from sft.hub.push import push\n"
        f"result = push({str(sambay_export)!r}, 'tiny-sambay', public=True, "
        "progress=lambda line: print(line, file=sys.stderr))\n"
        "print(json.dumps(dataclasses.asdict(result)))"
    )
    environment = {**os.environ, **hub.environment(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["repo_id"] == REPO and result["verified"] and result["public"]
    assert hub.count("GET", "/resolve/.*safetensors") >= 2, "weights were downloaded again"
    assert TOKEN not in done.stdout + done.stderr
    leftovers = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in path.read_bytes() for path in leftovers)
    assert not list(sambay_export.parent.glob(".*")), "the download is gone"
    _load_from_hub(hub, tmp_path)


def _load_from_hub(hub: HubServer, tmp_path: Path) -> None:
    """Anybody can load the published model by its name, with transformers alone and without a token."""
    code = f"""
import sys
from clean_load import hide
hide()
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({REPO!r}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({REPO!r}, trust_remote_code=True)
batch = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "hi"}}], add_generation_prompt=True, return_tensors="pt", return_dict=True)
texts = [model.generate(**batch, max_new_tokens=20, min_new_tokens=20, do_sample=False, use_cache=cached)
         for cached in (True, False)]
print(texts[0].shape[1] - batch["input_ids"].shape[1], (texts[0] == texts[1]).all().item())
"""
    import sft.hub.reload

    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "stranger")}
    environment["PYTHONPATH"] = str(Path(sft.hub.reload.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    # The cache comes under another name from transformers 5.24 on; the text is that of the whole forward all the same.
    assert done.stdout.split() == ["20", "True"]


def test_a_file_that_changed_on_the_way_is_noticed(hub: HubServer, sambay_export: Path, tmp_path: Path) -> None:
    push(sambay_export, REPO, endpoint=hub.endpoint, token=TOKEN, verify=False)
    repo = hub.store.repos[f"models/{REPO}"]
    original = hub.files(REPO)
    options: dict[str, Any] = {"endpoint": hub.endpoint, "token": TOKEN}
    hub.store.commit(repo, "main", {**original, "config.json": hub.store.regular(b"{}")}, "a change")
    with pytest.raises(UserError, match=r"config\.json is not what was pushed; push again"):
        verify_upload(sambay_export, REPO, **options)
    hub.store.commit(repo, "main", {k: v for k, v in original.items() if k != "tokenizer.json"}, "a loss")
    with pytest.raises(UserError, match=r"has no tokenizer\.json; push again"):
        verify_upload(sambay_export, REPO, **options)
    with pytest.raises(UserError, match=r"can't be downloaded again to check it: .* doesn't exist, or this token"):
        verify_upload(sambay_export, "tester/nothing", **options)
    assert not list(sambay_export.parent.glob(".*"))


def test_a_disk_too_small_for_the_check_is_told(
    hub: HubServer, sambay_export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(
        UserError, match=r"needs 0\.0 GB beside the export, 0\.0 GB are free .* the push itself is complete"
    ):
        push(sambay_export, REPO, endpoint=hub.endpoint, token=TOKEN)
    assert "config.json" in hub.files(REPO)


def test_nothing_is_published_when_the_check_fails(hub: HubServer, fake_export: Path) -> None:
    """fake_export holds no model, so it can't be loaded: the repository stays private."""
    with pytest.raises(UserError, match=r"config\.json is no language model's"):
        push(fake_export, REPO, public=True, endpoint=hub.endpoint, token=TOKEN)
    assert hub.store.repos[f"models/{REPO}"]["visibility"] == "private"
