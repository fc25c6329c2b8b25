"""What can't be saved is found before anything is trained, merged or lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from train_toys import saved_weights, tiny_qwen, tiny_sambay, tiny_tokenizer, train_toy

from sft.models.load import load_checkpoint
from sft.models.savable import check_savable
from sft.utils.errors import UserError
from sft.utils.files import read_json, write_json

SAMPLING = [
    {"temperature": 0.6},
    {"top_p": 0.95, "top_k": 20},
    {"temperature": 0.7, "do_sample": False},
    {"min_p": 0.1},
]


def start(folder: Path, generation: dict[str, Any], make: Callable[[], Any] = tiny_qwen) -> Path:
    """A model folder with these settings in its generation_config.json, as people publish them."""
    make().save_pretrained(folder)
    path = folder / "generation_config.json"
    write_json(path, {**read_json(path), **generation})
    return folder


@pytest.mark.parametrize("settings", SAMPLING)
@pytest.mark.parametrize("make", [tiny_qwen, tiny_sambay])
def test_settings_for_sampling_are_kept(settings: dict[str, Any], make: Callable[[], Any], tmp_path: Path) -> None:
    model, lines = load_checkpoint(str(start(tmp_path / "start", settings, make)), dtype="float32"), []
    check_savable(model, tiny_tokenizer(), lines.append)
    model.generation_config.max_length = 30  # from now on transformers is strict
    model.save_pretrained(tmp_path / "again")
    saved = read_json(tmp_path / "again" / "generation_config.json")
    assert saved["do_sample"] is True
    assert {key: saved[key] for key in settings if key != "do_sample"} == {
        key: value for key, value in settings.items() if key != "do_sample"
    }
    assert len(lines) == 1 and "do_sample" in lines[0] and "\n" not in lines[0]


def test_a_sound_model_is_left_alone() -> None:
    model, lines = tiny_qwen(), []
    before = model.generation_config.to_dict(), model.config.to_dict()
    check_savable(model, tiny_tokenizer(), lines.append)
    check_savable(model, None, lines.append)
    assert (model.generation_config.to_dict(), model.config.to_dict()) == before and not lines


class Unsavable:
    """A tokenizer whose files are gone, say."""

    name_or_path = "their/tokenizer"

    def save_pretrained(self, folder: str) -> None:
        raise OSError("vocabulary file not found\nand more")


def test_what_can_t_be_put_right_is_named() -> None:
    model = tiny_qwen()
    with pytest.raises(UserError, match=r"the tokenizer of their/tokenizer can't be saved.*vocabulary file not found;"):
        check_savable(model, Unsavable(), print)
    model.generation_config.early_stopping = True
    with pytest.raises(UserError, match=r"the generation_config\.json of the model can't be saved.*early_stopping"):
        check_savable(model, None, print)
    assert model.generation_config.do_sample is not True
    model = tiny_qwen()
    model.config.rope_note = {1, 2}
    with pytest.raises(UserError, match=r"the config\.json of the model can't be saved.*set"):
        check_savable(model, None, print)


@pytest.mark.parametrize("train", [{}, {"use_peft": True, "lora_target_modules": ["q_proj"]}])
def test_training_ends_with_such_a_model(train: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """It was lost at its first checkpoint."""
    model = load_checkpoint(str(start(tmp_path / "start", {"temperature": 0.6, "eos_token_id": 7})), dtype="float32")
    keys = {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 2, **train}
    _, layout = train_toy(tmp_path / "run", keys, model=model)
    final = layout.final_dir("one")
    assert saved_weights(final)
    assert "generation_config.json has settings for sampling" in capsys.readouterr().err
    if not train:
        assert read_json(final / "generation_config.json")["temperature"] == 0.6


def test_training_refuses_before_the_first_step(tmp_path: Path) -> None:
    model = tiny_qwen()
    model.config.rope_note = {1, 2}
    with pytest.raises(UserError, match=r"config\.json of the model can't be saved"):
        train_toy(tmp_path / "run", {"max_steps": 2, "per_device_train_batch_size": 2}, model=model)
    assert not list((tmp_path / "run").rglob("checkpoint-*"))


def test_export_keeps_the_settings_too(tmp_path: Path) -> None:
    from sft.hub.export import export

    lines: list[str] = []
    source = start(tmp_path / "start", {"temperature": 0.6}, tiny_sambay)
    out = export(source, tmp_path / "out", check=False, progress=lines.append)
    assert read_json(out / "generation_config.json")["temperature"] == 0.6
    assert any("do_sample" in line for line in lines)
