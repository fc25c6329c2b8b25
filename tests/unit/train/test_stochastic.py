"""Weights in bfloat16 whose steps are rounded by chance: right on average, the same again, and trained."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from train_toys import saved_weights, tiny_sambay, train_toy

from sft.train import stochastic
from sft.train.optimizer import takes_decay
from sft.train.stochastic import StochasticAdamW, round_stochastically


def test_the_mean_of_many_roundings_is_the_value() -> None:
    draws = 40_000
    values = torch.tensor([1.001, -1.001, 3.14159, -2.5e-5, 1e30, -7e-40])
    generator = torch.Generator().manual_seed(1)
    found = round_stochastically(values.repeat(draws, 1), generator).double()
    steps = found.amax(0) - found.amin(0)
    mean_error = (found.mean(0) - values.double()).abs()
    assert (mean_error < 4 * 0.5 * steps / draws**0.5).all(), "four standard errors at most"
    assert ((found.amin(0) <= values) & (values <= found.amax(0))).all()
    assert all(len(column.unique()) == 2 for column in found.T)


def test_what_is_exact_stays_and_what_is_no_number_too() -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -0.75, float("inf"), -float("inf"), float("nan")])
    found = round_stochastically(values, torch.Generator().manual_seed(1))
    assert torch.equal(found.float()[:6], values[:6]) and found[6].isnan()
    assert torch.equal(torch.signbit(found[:2]), torch.signbit(values[:2]))


def weights(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=g).to(dtype)) for shape in ((5, 7), (3,), (2, 1, 4))]


def optimizer(parameters: list[torch.nn.Parameter], **changes: Any) -> StochasticAdamW:
    groups = [{"params": parameters[:1], "weight_decay": 0.1}, {"params": parameters[1:], "weight_decay": 0.0}]
    return StochasticAdamW(groups, lr=1e-2, betas=(0.9, 0.99), **changes)


def train(parameters: list[torch.nn.Parameter], optim: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        g = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=g).to(parameter.dtype)
        optim.step()


def test_float32_weights_are_trained_as_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stochastic, "PIECE", 4)
    ours, theirs = weights(torch.float32), weights(torch.float32)
    groups = [{"params": theirs[:1], "weight_decay": 0.1}, {"params": theirs[1:], "weight_decay": 0.0}]
    train(ours, optimizer(ours), range(5))
    train(theirs, torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.99)), range(5))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("state", ["float32", "bfloat16"])
def test_a_run_goes_on_bit_for_bit_whatever_else_draws(state: str) -> None:
    whole, first = weights(torch.bfloat16), weights(torch.bfloat16)
    optim = optimizer(whole, state_dtype=state, seed=7)
    train(whole, optim, range(6))
    assert {value.dtype for s in optim.state.values() for k, value in s.items() if k != "step"} == {
        getattr(torch, state)
    }
    begun = optimizer(first, state_dtype=state, seed=7)
    train(first, begun, range(3))
    torch.rand(5)
    saved, second = copy.deepcopy(begun.state_dict()), [torch.nn.Parameter(p.detach().clone()) for p in first]
    resumed = optimizer(second, state_dtype=state, seed=7)
    resumed.load_state_dict(saved)
    train(second, resumed, range(3, 6))
    assert all(map(torch.equal, second, whole))
    other = weights(torch.bfloat16)
    train(other, optimizer(other, state_dtype=state, seed=8), range(6))
    assert not all(map(torch.equal, other, whole)), "another seed rounds otherwise"


def test_small_steps_add_up_where_rounding_to_the_nearest_stands_still() -> None:
    """1,000 steps of 1e-4 from 1, where bfloat16 numbers are 2^-7 apart."""

    def moved(kind: str) -> Tensor:
        parameter = torch.nn.Parameter(torch.ones(200, dtype=torch.bfloat16))
        if kind == "nearest":
            optim: Any = torch.optim.AdamW([parameter], lr=1e-4, weight_decay=0.0)
        else:
            optim = StochasticAdamW([{"params": [parameter]}], lr=1e-4, state_dtype=kind)
        for _ in range(1000):
            parameter.grad = torch.full_like(parameter, 0.5)
            optim.step()
        return parameter.detach().float().mean()

    assert moved("nearest") == 1.0
    for kind in ("float32", "bfloat16"):
        assert abs(moved(kind) - 0.9) < 0.01


def test_a_stage_that_is_killed_goes_on_bit_for_bit(tmp_path: Path) -> None:
    keys = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-3, "weights_dtype": "bfloat16"}
    keys["keep_optimizer"] = True
    _, paths = train_toy(tmp_path, keys, model=tiny_sambay())
    straight = saved_weights(paths.final_dir("one"))
    paths.stage_manifest("one").unlink()
    for name in ("checkpoint-4", "final"):
        shutil.rmtree(paths.stage_dir("one") / name)
    model = tiny_sambay(seed=1)
    train_toy(tmp_path, keys, model=model)
    again = saved_weights(paths.final_dir("one"))
    assert straight.keys() == again.keys() and all(torch.equal(straight[name], again[name]) for name in again)
    wide = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    assert all(takes_decay(name, p) is (name not in wide) for name, p in model.named_parameters())
    delicate = ("A_log", "attn.D", "lambda_q1", "subln.weight", "input_layernorm.weight", "dt_proj.bias")
    assert all(any(name.endswith(part) for name in wide) for part in delicate)
