"""`import sft`: a recipe's verbs as functions, without the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from run_toys import small_recipe

from sft.recipe import resolved_yaml
from sft.utils.errors import UsageError, UserError


def test_a_recipe_from_file_to_export(tmp_path: Path) -> None:
    import sft

    (tmp_path / "r.yaml").write_text(resolved_yaml(small_recipe(tmp_path, stages=({},))))
    recipe = sft.load_recipe(tmp_path / "r.yaml", ["--stages.a.train.max_steps", "2"])
    assert len(sft.prepare(recipe)["a"].dataset) == 16
    with pytest.raises(UserError, match="no stage is trained"):
        sft.evaluate(recipe)
    result = sft.run(recipe)
    assert result["stages"]["a"]["steps"] == 2
    assert sft.evaluate(recipe, stage="a") == {"a": result["evaluations"]["a"]}
    folder = sft.export(recipe, out=tmp_path / "exported")
    assert (folder / "model.safetensors").is_file()
    model = sft.models.load.load_checkpoint(str(folder), dtype="float32")
    assert type(model) is sft.models.Phi4FlashForCausalLM


def test_the_names_are_importable_and_cost_nothing_before_use() -> None:
    code = (
        "import sys; from sft import load_recipe, run, evaluate; import sft; assert callable(run); "
        "assert callable(evaluate); load_recipe('tiny'); assert 'torch' not in sys.modules; "
        "from sft import prepare, export, models; assert callable(export); "
        "assert set(sft.__all__) <= set(dir(sft)) | {'load_recipe', 'prepare', 'export', 'models'}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_node_s_variables_start_nothing_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sft

    recipe = small_recipe(tmp_path, stages=({},))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "n0")
    for verb in (sft.run, sft.evaluate):
        with pytest.raises(UsageError, match="WORLD_SIZE is 2, and LOCAL_RANK isn't set: start this by torchrun"):
            verb(recipe)


def test_an_unknown_name_is_an_attribute_error() -> None:
    import sft

    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = sft.trian


def test_the_former_name_of_the_models_still_registers_them() -> None:
    import sft.model
    import sft.models

    for name in sft.model.__all__:
        assert getattr(sft.model, name) is getattr(sft.models, name)
