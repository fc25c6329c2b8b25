"""Two ranks of a machine hold a checkpoint's weights once, however it is stored, until one of them changes them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from ranks import run_ranks

WIDE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8}
WIDE |= {"num_key_value_heads": 4, "sliding_window": 16, "vocab_size": 512}
WIDE |= {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
SMALL = {**WIDE, "hidden_size": 64, "intermediate_size": 64}


@pytest.fixture(scope="module")
def copy() -> float:
    """MiB of the weights in float32."""
    from sft.models import Phi4FlashConfig, Phi4FlashForCausalLM

    with torch.device("meta"):
        model = Phi4FlashForCausalLM(Phi4FlashConfig(**WIDE))
    return sum(parameter.numel() for parameter in model.parameters()) * 4 / 2**20


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank says, by case."""
    from sft.models import Phi4FlashConfig, Phi4FlashForCausalLM
    from sft.models.save import save_model

    root = tmp_path_factory.mktemp("loading")
    for name, dtype, shape in (("float32", None, WIDE), ("bfloat16", "bfloat16", WIDE), ("small", None, SMALL)):
        torch.manual_seed(0)
        model = Phi4FlashForCausalLM._from_config(Phi4FlashConfig(**shape), dtype=torch.float32)
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().float() if name != "small" else parameter.data
        (root / name).mkdir()
        # A bfloat16 file as the published one: A_log and the lambdas, too.
        save_model(root / name, model if dtype is None else model.bfloat16())
        del model
    # What is freed goes back at once: it isn't held any more.
    returned = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    ends = run_ranks("loading_worker.py", str(root), str(root), limit=400, env=returned)
    assert [end.code for end in ends] == [0, 0], "\n".join(end.stderr[-2000:] for end in ends)
    return [json.loads((root / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_weights_are_in_memory_once(found, copy, dtype):
    case = [results[f"widened-{dtype}"] for results in found]
    assert sum(one["pss"] for one in case) < 1.3 * copy
    assert all(one["types"] == ["torch.float32"] for one in case)
    # The same numbers as by the plain way.
    plain = found[0][f"each_for_itself-{dtype}"]
    assert [one["sum"] for one in case] == [plain["sum"]] * 2


def test_the_plain_way_has_them_twice(found, copy):
    assert sum(results["each_for_itself-bfloat16"]["pss"] for results in found) > 1.8 * copy


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_one_rank_writes_the_other_does_not_see(found, dtype):
    first = [results[f"widened-{dtype}"]["first"] for results in found]
    assert first[0] == [7.0] and first[1] == found[1][f"each_for_itself-{dtype}"]["first"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_zero3_never_has_a_copy_of_its_own(found, copy, dtype):
    """Each rank ends with its half; on the way there it has a tensor more."""
    case = [results[f"sharded-{dtype}"] for results in found]
    assert sum(one["pss"] for one in case) < 1.3 * copy
    assert all(one["own"] < 0.8 * copy for one in case)
