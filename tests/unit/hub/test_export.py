"""The export folder: what is in it, that it loads where nothing of ours is, and that it computes the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import sft.hub.export as export_module
from sft.hub.export import export
from sft.hub.folder import MANIFEST, list_files
from sft.hub.merge import logits_of
from sft.hub.reload import check_reload, clean_environment, clean_results, fixed_inputs, relative_error
from sft.utils.errors import UserError
from sft.utils.files import read_json


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the folder's weight files; a name in two files is an error."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118  (not a dict)
                assert name not in found
                found[name] = handle.get_tensor(name)
    return found


def test_the_folder_holds_what_a_stranger_needs(sambay_export: Path) -> None:
    names = {file.path for file in list_files(sambay_export)}
    code = {f"{name}_phi4flash.py" for name in ("configuration", "modeling", "layout", "ops")}
    others = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert code | others | {"README.md", "LICENSE", MANIFEST, "model.safetensors.index.json"} <= names
    assert len(list(sambay_export.glob("model-*.safetensors"))) >= 2
    config = read_json(sambay_export / "config.json")
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_phi4flash.Phi4FlashForCausalLM"
    assert config["dtype"] == "float32" and "_name_or_path" not in config
    assert read_json(sambay_export / "generation_config.json")["eos_token_id"] == [1, 0]
    assert not list(sambay_export.parent.glob(".*")), "nothing is left beside it"


def test_every_tensor_is_stored_once_as_it_is(sambay: tuple[Any, Any], sambay_export: Path) -> None:
    weights, state = stored(sambay_export), sambay[0].state_dict()
    assert set(state) - set(weights) == {"lm_head.weight"}
    assert all(torch.equal(tensor, state[name]) for name, tensor in weights.items())


SCRIPT = """
import json, shutil, sys
sys.path.insert(0, {checks!r})
from clean_load import HIDDEN, hide
hide()
assert shutil.which("cc") is None and shutil.which("g++") is None
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
folder, again = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.")
messages = [{{"role": "user", "content": "2+2"}}, {{"role": "assistant", "content": "<think>so</think>4"}}]
text = tokenizer.apply_chat_template(messages, tokenize=False)
batch = tokenizer(["ab", "a longer row"], padding=True, padding_side="left", return_tensors="pt")
out = model.generate(**batch, max_new_tokens=4, do_sample=False)
labels = torch.randint(0, 320, (1, 12))
model.train()
loss = model(input_ids=labels, labels=labels).loss
loss.backward()
assert all(p.grad is not None for p in model.parameters())
model.eval().save_pretrained(again)
backbone = AutoModel.from_pretrained(folder, trust_remote_code=True)
loaded = sorted(name for name in sys.modules if name.split(".")[0] in HIDDEN)
print(json.dumps({{"text": text, "shape": list(out.shape), "loss": loss.item(), "loaded": loaded,
                  "backbone": type(backbone).__name__}}))
"""


def test_training_saving_and_the_tokenizer_work_without_this_package(
    sambay: tuple[Any, Any], sambay_export: Path, tmp_path: Path
) -> None:
    """Beyond logits: padded batches, a backward pass, the chat template, and saving again with the code."""
    import sft.hub.reload

    script = SCRIPT.format(checks=str(Path(sft.hub.reload.__file__).parent))
    again = tmp_path / "again"
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, str(sambay_export), str(again)],
        env=clean_environment(tmp_path / "home"),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["loaded"] == [] and told["backbone"] == "Phi4FlashModel"
    assert told["shape"][0] == 2 and told["loss"] > 0
    assert told["text"] == "<|user|>2+2<|end|><|assistant|><think>so</think>4<|end|><|endoftext|>"
    for path in sambay_export.glob("*.py"):
        assert (again / path.name).read_text() == path.read_text()
    _compare_in_clean_process(sambay[0], sambay_export, again)


def _compare_in_clean_process(model: Any, *folders: Path) -> None:
    """Logits and greedy text of all folders are the same bits, and those of the model in memory but for rounding."""
    inputs = fixed_inputs(320, lengths=(1, 3, 30), seed=5)
    results = clean_results(folders, inputs)
    wanted, first = logits_of(model, inputs), results[str(folders[0])]
    for result in results.values():
        assert all(torch.equal(a, b) for a, b in zip(result["logits"], first["logits"], strict=True))
        errors = [relative_error(a, b) for a, b in zip(result["logits"], wanted, strict=True)]
        assert max(errors) < 5e-6
        for ids, said in zip(inputs, result["generated"], strict=True):
            out = model.generate(torch.tensor([ids]), max_new_tokens=6, min_new_tokens=6, do_sample=False)
            assert out[0, len(ids) :].tolist() == said


@pytest.mark.cold
def test_bf16_export_keeps_the_published_fp32_tensors(sambay: tuple[Any, Any], tmp_path: Path) -> None:
    model, inputs = sambay[0], [[1, 2, 3]]
    out = export(sambay, tmp_path / "out", dtype="bfloat16", check=False)
    wide = {name for name, tensor in stored(out).items() if tensor.dtype == torch.float32}
    assert wide == {name for name in model.state_dict() if "A_log" in name or "lambda_" in name}
    assert read_json(out / "config.json")["dtype"] == "bfloat16"
    results = clean_results([out], inputs)[str(out)]
    assert {name for name, dtype in results["dtypes"].items() if dtype == "torch.float32"} == wide
    assert 1e-5 < relative_error(results["logits"][0], logits_of(model, inputs)[0]) < 6e-2


def test_the_published_template_renders_the_same_after_export(
    shared_dir: Path, tiny_sambay: Callable[..., Any], tmp_path: Path
) -> None:
    """The training template, marks and all, travels; what it renders is what the published one does."""
    from sft.data.tokenize.template import training_template
    from sft.tokenizers.load import load_tokenizer

    tokenizer = load_tokenizer(str(shared_dir / "models" / "Phi-4-mini-flash-reasoning"))
    published = tokenizer.chat_template
    tokenizer.chat_template = training_template(tokenizer)
    assert "generation" in tokenizer.chat_template != published
    out = export((tiny_sambay(), tokenizer), tmp_path / "out", check=False)
    again = load_tokenizer(str(out))
    turns = [("system", "Be brief."), ("user", "1 < 2?\n"), ("assistant", "<think>\nyes</think> Yes"), ("user", "So?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    for length in range(1, 5):
        for prompt in (False, True):
            options = {"tokenize": False, "add_generation_prompt": prompt}
            text = again.apply_chat_template(messages[:length], **options)
            assert text == tokenizer.apply_chat_template(messages[:length], chat_template=published, **options)
            assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert read_json(out / "generation_config.json")["eos_token_id"] == [200020, 199999]


def test_an_ordinary_model_is_a_plain_folder(sambay: tuple[Any, Any], tmp_path: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
    )
    out = export((Qwen3ForCausalLM(config).eval(), sambay[1]), tmp_path / "qwen")
    assert read_json(out / MANIFEST)["reload"]["error"] < 1e-5
    assert not list(out.glob("*.py")) and "auto_map" not in read_json(out / "config.json")
    assert "lm_head.weight" not in stored(out)
    assert "trust_remote_code" not in (out / "README.md").read_text()


def test_an_export_of_an_export_is_the_same(sambay_export: Path, tmp_path: Path) -> None:
    out = export(sambay_export, tmp_path / "again", check=False)
    mine, theirs = stored(out), stored(sambay_export)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_only_own_exports_are_replaced(sambay: tuple[Any, Any], tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="isn't an export of ours"):
        export(sambay, target, check=False)
    assert (target / "thesis.tex").read_text() == "years of work"
    (target / "thesis.tex").unlink()
    export(sambay, target, check=False)
    (target / "extra").write_text("of an older export")
    export(sambay, target, check=False)
    assert not (target / "extra").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_leaves_the_old_export(
    sambay: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = export(sambay, tmp_path / "out", check=False)
    before = (target / MANIFEST).read_bytes()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "write_code", full)
    with pytest.raises(UserError, match=r"the disk of .* is full; the export needs about"):
        export(sambay, target, check=False)
    assert (target / MANIFEST).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_kill_left_is_put_right(sambay: tuple[Any, Any], tmp_path: Path) -> None:
    target = export(sambay, tmp_path / "out", check=False)
    os.replace(target, tmp_path / ".out.old")  # killed between the two renames
    (tmp_path / ".out.tmp-999999999").mkdir()  # killed while writing
    with pytest.raises(UserError, match="no model folder at"):
        export(tmp_path / "nothing", target)
    assert list_files(target), "the old export is back"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_killed_export_leaves_the_old_one_and_nothing_after_the_next(sambay_export: Path, tmp_path: Path) -> None:
    target = export(sambay_export, tmp_path / "out", check=False)
    before = (target / MANIFEST).read_bytes()
    code = (
        "import os, signal, sft.hub.export as e\n"
        "e.check_against = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"e.export({str(sambay_export)!r}, {str(target)!r})"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == -9
    assert (target / MANIFEST).read_bytes() == before and len(list(tmp_path.iterdir())) == 2
    export(sambay_export, target, check=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_model_is_let_go_of_before_it_is_loaded_again(
    sambay_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else parent and child would hold a copy each."""
    held: list[Any] = []
    opened, checked = export_module.open_source, export_module.check_against

    def opening(*args: Any) -> Any:
        source = opened(*args)
        held.append(weakref.ref(source.model))
        return source

    def checking(*args: Any, **options: Any) -> Any:
        assert held[0]() is None
        return checked(*args, **options)

    monkeypatch.setattr(export_module, "open_source", opening)
    monkeypatch.setattr(export_module, "check_against", checking)
    assert read_json(export(sambay_export, tmp_path / "out") / MANIFEST)["reload"]["error"] < 1e-5


def test_a_folder_that_computes_something_else_is_refused(
    sambay: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = export_module.ops_file

    def broken(kernels: Path) -> str:
        return original(kernels).replace("return swiglu_torch(", "return 1.01 * swiglu_torch(")

    monkeypatch.setattr(export_module, "ops_file", broken)
    with pytest.raises(UserError, match="doesn't compute what the model in memory does: logits differ by"):
        export(sambay, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.cold
def test_a_folder_that_does_not_load_is_refused(sambay_export: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(sambay_export, folder)
    with open(folder / "modeling_phi4flash.py", "a") as handle:
        handle.write("\nimport sft.models\n")
    with pytest.raises(UserError, match=r"can't be loaded in a clean process: .*sft"):
        check_reload(folder, sambay_export)


def test_a_model_with_broken_weights_is_refused(tiny_sambay: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_sambay()
    with torch.no_grad():
        model.model.layers[0].mlp.fc1.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="logits aren't finite"):
        export((model, None), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_code_that_needs_another_package_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x\.py:1: einops would be missing"):
        export_module._refuse_foreign_imports("x.py", "import einops\n")
    export_module._refuse_foreign_imports("x.py", "try:\n    import einops\nexcept ImportError:\n    pass\n")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind": "sambay-sft export"}', '{"kind": "x", "files": {"a": 1}}'])
def test_a_folder_with_a_damaged_manifest_is_no_export(sambay_export: Path, tmp_path: Path, text: str) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(sambay_export, folder)
    (folder / MANIFEST).write_text(text)
    with pytest.raises(UserError, match="is not a folder that `sft export` wrote"):
        list_files(folder)


def test_a_flipped_byte_is_noticed(sambay_export: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(sambay_export, folder)
    assert list_files(folder)
    path = next(folder.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"{path.name} is not what was exported"):
        list_files(folder)


def test_bad_arguments(sambay: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="float32 or bfloat16, not in int8"):
        export(sambay, tmp_path / "out", dtype="int8")
    with pytest.raises(UserError, match="no model folder at"):
        export(tmp_path / "missing", tmp_path / "out")
    with pytest.raises(UserError, match="/ can't be an export folder"):
        export(sambay, "/")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"config\.json"):
        export(tmp_path / "empty", tmp_path / "out")
