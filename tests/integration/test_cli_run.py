"""The command from a recipe to an export and a report, and the real recipes on small local data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import data_set_rows
import pytest
from hub_server import TOKEN, running_hub
from typing_user import types

from sft.cli.main import main

RECIPE = """\
name: mini
output_dir: run
seed: 3
model:
  tokenizer: tiny
  dtype: float32
  config: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 4, num_attention_heads: 4,
           num_key_value_heads: 2, sliding_window: 16}
defaults:
  train: {max_length: 512, max_steps: 3, per_device_train_batch_size: 2, learning_rate: 1e-3, save_steps: 2}
  evaluate:
    suites:
      - {name: words, source: {generate: {family: words, rows: 4, split: test}}, max_new_tokens: 8}
stages:
  - name: packed
    data: {sources: [{generate: {family: words, rows: 40}}]}
    train: {packing: true}
  - name: adapters
    data: {sources: [{generate: {family: words, rows: 20, seed: 1}}]}
    train: {packing: false, use_peft: true, lora_r: 2}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `sft run` has done RECIPE."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "r.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["run", "--config", "r.yaml"]) == 0
    return folder


@pytest.fixture
def there(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That folder, as the current one."""
    monkeypatch.chdir(finished)
    return finished


def test_run_leaves_everything_it_promises(finished: Path) -> None:
    run = finished / "run"
    for name in ("resolved.yaml", "manifest.json", "report/index.html", "export/config.json", "export/README.md"):
        assert (run / name).is_file(), name
    for stage in ("packed", "adapters"):
        assert (run / "stages" / stage / "manifest.json").is_file()
        steps = [json.loads(line) for line in (run / "stages" / stage / "metrics.jsonl").read_text().splitlines()]
        assert steps[-1]["step"] == 3 and steps[-1]["supervised_tokens"] > 0
    for point in ("start", "packed", "adapters"):
        samples = (run / "eval" / point / "words" / "samples.jsonl").read_text().splitlines()
        assert sum('"verdict"' in line for line in samples) == 4, point
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["environment"]["packages"]["trl"]
    assert manifest["stages"]["packed"]["steps"] == 3 and manifest["stages"]["packed"]["data"]["rows"] == 40
    assert manifest["evaluations"]["start"]["words"]["problems"] == 4


def test_the_same_command_again_does_nothing_twice(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (there / "run/export/README.md").write_text("a card of my own")
    made = [*there.glob("run/stages/*/final/*"), *there.glob("run/export/*")]
    before = {path: path.stat().st_mtime_ns for path in made}
    assert main(["run", "--config", "r.yaml"]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("skipped") == 5, captured.err
    assert "report: run/report/index.html" in captured.out and "export: run/export" in captured.out
    assert before == {path: path.stat().st_mtime_ns for path in made}


def test_a_changed_recipe_is_refused_and_restart_does_it_again(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = ["train", "--config", "r.yaml", "--stages.adapters.train.learning_rate", "5e-4"]
    resolved = Path("run/resolved.yaml").read_text()
    assert main(changed) == 1
    assert "--restart adapters" in capsys.readouterr().err
    assert main([*changed, "--dry_run"]) == 1
    assert "--restart adapters" in capsys.readouterr().err
    assert main([*changed, "--restart", "adapters", "--dry_run"]) == 0
    assert capsys.readouterr().out == "run/resolved.dry_run.yaml\n"
    # What the trained weights came from stays told by the recipe beside them.
    assert Path("run/resolved.yaml").read_text() == resolved
    assert main([*changed, "--restart", "adapters"]) == 0
    assert "threw away adapters" in capsys.readouterr().err
    # The export is of the old weights: it is made again, the card with it.
    assert main(["run", *changed[1:]]) == 0
    assert (there / "run/export/README.md").read_text() != "a card of my own"
    assert "learning_rate: 0.0005" in Path("run/resolved.yaml").read_text()


def test_eval_of_a_stage_the_start_and_another_model(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--config", "r.yaml", "--stage", "packed"]) == 0
    assert "packed" in capsys.readouterr().out
    assert main(["eval", "--config", "r.yaml", "--start"]) == 0
    assert "start" in capsys.readouterr().out
    assert main(["eval", "--config", "r.yaml", "--model", "run/stages/packed/final"]) == 0
    assert "model-final" in capsys.readouterr().out
    assert Path("run/eval/model-final/words/metrics.json").is_file()
    assert main(["eval", "--config", "r.yaml", "--model", "run/nothing"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_chat_answers_once_and_converses(
    there: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    once = ["chat", "--config", "r.yaml", "--stage", "packed", "--prompt", "What is 2 + 2?", "--max_new_tokens", "6"]
    assert main(once) == 0
    answer = capsys.readouterr().out
    assert main(once) == 0
    assert capsys.readouterr().out == answer
    types(monkeypatch, "What is 2 + 2?", "/clear", "What is 2 + 2?")
    assert main(["chat", "--model", "run/stages/packed/final", "--max_new_tokens", "6"]) == 0
    assert capsys.readouterr().out == answer * 2


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["r.yaml"], "mini"),  # the last stage: an adapter
        (["--config", "r.yaml", "--stage", "packed"], "mini"),
        (["--model", "run/export", "--served_model_name", "best"], "best"),
    ],
)
def test_serve_of_a_stage_and_an_export(
    there: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], name: str
) -> None:
    """Asked by its own chat, and told to stop, as soon as it is there."""
    import threading

    from sft.serve.listen import Listener

    run, statuses = Listener.run, []

    def ask_and_stop(self: Listener) -> None:
        url = f"http://{self.host}:{self.port}/v1"
        statuses.append(main(["chat", "--server", url, "--prompt", "What is 2 + 2?", "--max_new_tokens", "6"]))
        self.stop()

    def asked(self: Listener, *, ready: Callable[[], None]) -> bool:
        asking = threading.Thread(target=ask_and_stop, args=(self,))
        finished = run(self, signals=False, ready=lambda: (ready(), asking.start())[0])
        asking.join(60)
        return finished

    monkeypatch.setattr(Listener, "run", asked)
    assert main(["serve", *words, "--port", "0", "--batch_size", "2", "--max_length", "256"]) == 0
    assert statuses == [0] and f"serving {name} at http://127.0.0.1:" in capsys.readouterr().err


def test_push_without_a_token_says_how_to_log_in(
    there: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    words = ["push", "--config", "r.yaml", "--repo_id", "me/mini", "--folder", "run/export"]
    assert main(words) == 1
    assert "hf auth login" in capsys.readouterr().err


def test_push_goes_up_once_and_is_private_until_published(there: Path, tmp_path: Path) -> None:
    with running_hub(tmp_path / "hub") as hub:
        environment = {**os.environ, **hub.environment(tmp_path / "home")}

        def push(*words: str) -> str:
            command = [
                sys.executable,
                "-m",
                "sft",
                "push",
                "--config",
                "r.yaml",
                "--push.repo_id",
                "tester/mini",
                *words,
            ]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
            assert TOKEN not in done.stdout + done.stderr
            return done.stdout

        assert "(private;" in push() and "model.safetensors" in hub.files("tester/mini")
        second = push("--public")
        assert "(public; 0 files sent" in second and second.endswith("reloaded and equal)\n")


SETS = {
    "openr1_math": data_set_rows.openr1,
    "openmathreasoning": data_set_rows.openmathreasoning,
    "light_r1_76k": data_set_rows.light_r1,
    "light_r1_3k": data_set_rows.light_r1,
    "acereason": data_set_rows.acereason,
    "limo": data_set_rows.limo,
    "s1k": data_set_rows.s1k,
    **dict.fromkeys(("math500", "aime24", "aime25", "gsm8k_test"), data_set_rows.benchmark),
}


@pytest.mark.parametrize("recipe", ["phi4-mini-flash", pytest.param("phi4-mini-flash/lora", marks=pytest.mark.slow)])
def test_the_real_recipes_prepare_local_data(
    recipe: str, shared_dir: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["prepare", "--config", recipe, "--model.tokenizer", str(shared_dir / "models/Phi-4-mini-flash-reasoning")]
    for name in sorted(SETS):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SETS[name]()), encoding="utf-8")
        words += [f"--variables.{name}", f"{name}.jsonl"]
    for stage in ("distill", "hard"):
        assert main([*words, "--prepared_dir", "prepared", "--stage", stage]) == 0
    out = capsys.readouterr().out
    assert out.count("rows read") == 2 and "what became of the rows" in out and "contaminated 1" in out
    manifests = [json.loads(path.read_text()) for path in Path("prepared").glob("*/manifest.json")]
    assert len(manifests) == 2 and all(manifest["documents"] >= 2 for manifest in manifests)
    assert all(0.5 < manifest["supervised_tokens"] / manifest["tokens"] < 1 for manifest in manifests)


def test_gsm8k_takes_a_folder_in_one_override(
    shared_dir: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model.tokenizer", str(shared_dir / "models/Phi-4-mini-flash-reasoning")]
    words += ["--variables.gsm8k", str(shared_dir / "data/gsm8k"), "--stages.sft.data.sources.0.max_rows", "50"]
    assert main(["prepare", "--config", "gsm8k", *words]) == 0
    (manifest,) = (json.loads(path.read_text()) for path in Path("runs/gsm8k/prepared").glob("*/manifest.json"))
    assert manifest["documents"] == 50 and "train.jsonl" in json.dumps(manifest["inputs"])
