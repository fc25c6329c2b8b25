"""Which modules adapters go on, and that each kind of adapter merges into what it computed."""

import pytest
import torch
from train_toys import tiny_sambay

from sft.models.lora import attach_adapters, default_targets
from sft.utils.errors import UsageError

SETTINGS = {
    "r": 2,
    "alpha": 4,
    "dropout": 0.0,
    "target_modules": None,
    "target_parameters": None,
    "modules_to_save": None,
    "use_rslora": False,
    "use_dora": False,
}


def test_dora_leaves_out_the_projection_whose_bias_the_scan_adds():
    model = tiny_sambay()
    assert "dt_proj" in default_targets(model)
    assert "dt_proj" not in default_targets(model, dora=True)
    for targets in (["dt_proj", "fc1"], "all-linear"):
        with pytest.raises(UsageError, match="DoRA can't adapt dt_proj"):
            attach_adapters(tiny_sambay(), {**SETTINGS, "use_dora": True, "target_modules": targets}, seed=0)


@pytest.mark.parametrize("dora", [False, True])
def test_default_adapters_merge_into_what_they_computed(dora):
    adapted = attach_adapters(tiny_sambay(), {**SETTINGS, "use_dora": dora}, seed=0).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        ids = torch.randint(3, 96, (1, 40))
        before = adapted(input_ids=ids, use_cache=False).logits
        after = adapted.merge_and_unload()(input_ids=ids, use_cache=False).logits
    assert (before - after).abs().max() < 1e-4 * before.abs().max()
