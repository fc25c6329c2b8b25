"""Groups of parameters by pattern, and Muon beside AdamW: who is trained how, and that nothing is lost on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from train_toys import read_metrics, tiny_qwen, tiny_sambay, toy_recipe, train_toy

from sft.recipe import TrainSection
from sft.recipe.optimizer_keys import given_arguments
from sft.train.arguments import check_arguments
from sft.train.muon import matrices, muon_arguments
from sft.train.optimizer import check_groups, parameter_groups, regrouped, takes_decay
from sft.utils.errors import UsageError


def trained_as(model: Any, **train: Any) -> dict[str, tuple[float, float, bool]]:
    """Name -> learning rate, weight decay, and whether Muon trains it; each trained parameter once."""
    groups = parameter_groups(model, TrainSection.model_validate(train))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [(names[id(p)], (g["lr"], g["weight_decay"], g["muon"])) for g in groups for p in g["params"]]
    assert sorted(name for name, _ in found) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    return dict(found)


def adapted(**keys: Any) -> Any:
    from sft.models.lora import attach_adapters, lora_settings

    stage = toy_recipe(Path("unused"), {"use_peft": True, **keys}).stages[0]
    return attach_adapters(tiny_qwen(tie_word_embeddings=False), lora_settings(stage) or {}, seed=0)


# ---- schedules ----


@pytest.mark.parametrize(
    ("schedule", "share"),
    [
        ({"warmup_steps": 50}, "10.0%"),
        ({"warmup_steps": 6, "lr_scheduler_type": "inverse_sqrt"}, "83.3%"),
        (
            {
                **{"warmup_steps": 8, "lr_scheduler_type": "cosine_warmup_with_min_lr"},
                "lr_scheduler_kwargs": {"min_lr": 0.0},
            },
            "75.0%",
        ),
        ({"warmup_steps": 5}, ""),
    ],
    ids=["far", "at the end", "min_lr", "just there"],
)
def test_a_stage_that_ends_in_its_warm_up_is_told_how_far_the_rate_gets(tmp_path, capsys, schedule, share):
    _, paths = train_toy(tmp_path, {"max_steps": 6, "learning_rate": 0.01, **schedule})
    highest = max(line["learning_rate"] for line in read_metrics(paths.metrics("one")) if "learning_rate" in line)
    told = [line for line in capsys.readouterr().err.splitlines() if "end in a warm-up of" in line]
    if share:
        assert f"{highest / 0.01:.1%}" == share and told[0].endswith(f"reaches {share} of learning_rate")
    else:
        assert highest == pytest.approx(0.01) and not told


@pytest.mark.parametrize(
    ("schedule", "line"),
    [
        (
            {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 3}},
            r"lr_scheduler_kwargs\.num_decay_steps: must be at most 2, which is what the stage's steps \(2\) leave",
        ),
        ({"lr_scheduler_type": "polynomial", "warmup_steps": 2}, "warmup_steps: leaves polynomial none of the stage's"),
    ],
)
def test_a_schedule_that_does_not_fit_is_told_before_the_first_step(tmp_path, monkeypatch, schedule, line):
    """Where only the rows tell how many steps there are."""
    monkeypatch.setattr("sft.train.trainer.SambayTrainer.training_step", None)
    with pytest.raises(UsageError, match=rf"stages\[one\]\.train\.{line}"):
        train_toy(tmp_path, {"num_train_epochs": 1, **schedule})


# ---- groups ----


def test_the_first_pattern_that_matches_counts():
    entries = [
        {"match": r"layers\.0\.", "learning_rate": 0.5},
        {"match": "layers", "weight_decay": 0.25},
        {"match": "lambda_|A_log", "weight_decay": 0.75, "learning_rate": 0.0},
        {"match": "embed", "learning_rate": 0.125},
    ]
    model = tiny_sambay()
    found = trained_as(model, learning_rate=1e-3, weight_decay=0.1, param_groups=entries)
    for name, parameter in model.named_parameters():
        own = 0.1 if takes_decay(name, parameter) else 0.0
        if ".layers.0." in name:
            assert found[name] == (0.5, own, False), "a pattern that says no decay leaves it as it was"
        elif "layers" in name:
            assert found[name] == (1e-3, 0.25, False), "one that says it gives it to A_log and norms, too"
        elif "embed" in name:
            assert found[name] == (0.125, own, False)
        else:
            assert found[name] == (1e-3, own, False)


def test_patterns_take_the_names_of_adapters():
    """LoRA+ is one group."""
    found = trained_as(adapted(), learning_rate=1e-3, param_groups=[{"match": "lora_B", "learning_rate": 0.016}])
    rates = {name: rate for name, (rate, _, _) in found.items()}
    assert {rates[name] for name in rates if "lora_B" in name} == {0.016}
    assert {rates[name] for name in rates if "lora_A" in name} == {1e-3}


def test_a_group_trains_at_its_own_rate(tmp_path):
    """At a rate of zero nothing of it moves; all else does."""
    model = tiny_qwen()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train = {"max_steps": 2, "param_groups": [{"match": r"layers\.0\.", "learning_rate": 0.0}]}
    _, paths = train_toy(tmp_path, train, model=model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (".layers.0." in name), name
    assert read_metrics(paths.metrics("one"))[0]["learning_rate"] == 0.01, "what is logged is the stage's own"


IDLE = [
    ("lora_B", "no parameter's name holds 'lora_B'; names are such as model.embed_tokens.weight, "),
    ("embed_tokens", "'embed_tokens' matches frozen parameters alone, such as model.embed_tokens.weight"),
    (r"layers\.1\..*q_proj", "belongs to an earlier group: the first that matches counts"),
]


@pytest.mark.parametrize(("pattern", "reason"), IDLE)
def test_a_pattern_without_effect_is_told_before_training(tmp_path, pattern, reason):
    model = tiny_qwen()
    model.model.embed_tokens.weight.requires_grad_(False)
    entries = [{"match": r"layers\.1\.", "learning_rate": 0.1}, {"match": pattern, "learning_rate": 0.1}]
    with pytest.raises(UsageError) as caught:
        check_groups(model, TrainSection.model_validate({"param_groups": entries}), "stages[one].train")
    assert str(caught.value).startswith("stages[one].train.param_groups[1].match: ") and reason in str(caught.value)


def test_a_stage_tells_it_before_it_writes(tmp_path):
    train = {"use_peft": True, "param_groups": [{"match": "lora_C", "learning_rate": 0.1}]}
    with pytest.raises(UsageError, match=r"stages\[one\]\.train\.param_groups\[0\]\.match: no parameter's name holds"):
        train_toy(tmp_path, train)
    assert not list(tmp_path.iterdir())


# ---- Muon ----


def test_muon_is_for_matrices_of_hidden_layers():
    model = tiny_sambay()
    chosen = {name for name, (_, _, muon) in trained_as(model, optim="muon", weight_decay=0.1).items() if muon}
    for part in ("fc1.weight", "fc2.weight", "in_proj.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight"):
        assert any(part in name for name in chosen), part
    for part in ("embed_tokens", "lm_head", "A_log", "conv1d", "bias", "norm", "lambda_", ".D"):
        assert not any(part in name for name in chosen), part
    assert all(dict(model.named_parameters())[name].ndim == 2 for name in chosen)


def test_muon_takes_adapters_but_not_a_head_or_an_embedding_of_its_own():
    model = adapted(lora_modules_to_save=["lm_head", "embed_tokens"])
    assert {name.split(".")[-3] for name in matrices(model)} == {"lora_A", "lora_B"}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    rest = trained - matrices(model)
    assert len(rest) == 2 and all("modules_to_save" in name for name in rest)


def test_adapters_on_an_embedding_are_none_of_muons():
    model = adapted(lora_target_modules=["embed_tokens", "q_proj"])
    assert matrices(model) and all(".q_proj.lora_" in name for name in matrices(model))


@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
def test_muon_and_adamw_step_as_each_does_alone(adjust):
    """Three steps of one optimizer are three steps of torch's two, to the bit; the schedule moves all rates alike."""
    keys = {"optim": "muon", "learning_rate": 0.02, "adamw_learning_rate": 3e-3, "weight_decay": 0.1}
    train = TrainSection.model_validate({**keys, "optim_args": f"momentum=0.9,ns_steps=4,adjust_lr_fn={adjust}"})
    ours, theirs = tiny_sambay(), tiny_sambay()
    parent = torch.optim.AdamW(ours.parameters(), lr=0.02, fused=True)
    optimizer: Any = regrouped(parent, ours, train)
    names = matrices(theirs)
    parts: dict[bool, dict[bool, list[Any]]] = {True: {True: [], False: []}, False: {True: [], False: []}}
    for name, parameter in theirs.named_parameters():
        decays = takes_decay(name, parameter)
        parts[decays and name in names][decays].append(parameter)
    muon = torch.optim.Muon(parts[True][True], lr=0.02, weight_decay=0.1, momentum=0.9, ns_steps=4, adjust_lr_fn=adjust)
    groups = [{"params": parts[False][True], "weight_decay": 0.1}, {"params": parts[False][False], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=3e-3, fused=True)
    for step in range(3):
        torch.manual_seed(step)
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.grad = other.grad = torch.randn_like(mine)
        optimizer.step()
        muon.step()
        adamw.step()
        for group in (*optimizer.param_groups, *muon.param_groups, *adamw.param_groups):
            group["lr"] *= 0.5
    assert optimizer.defaults["lr"] == 0.02
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other), name


def test_a_step_of_muon_is_orthogonal():
    """Without a momentum behind it a step is lr * 0.2 * sqrt(longer side) times a matrix of singular values near 1."""
    model = tiny_sambay()
    train = TrainSection(optim="muon", learning_rate=0.01)
    optimizer = regrouped(torch.optim.AdamW(model.parameters(), lr=0.01, fused=True), model, train)
    weight = model.model.layers[0].mlp.fc1.weight
    before = weight.detach().clone()
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    values = torch.linalg.svdvals((before - weight.detach()).double()) / (0.01 * 0.2 * max(weight.shape) ** 0.5)
    assert values.numel() == min(weight.shape)
    assert values.min() > 0.5 and values.max() < 1.4


def test_a_state_dict_gives_back_both(tmp_path):
    """Saved and loaded into another optimizer, the next steps are the same to the bit, and its parts see one state."""

    def made(seed: int) -> tuple[Any, Any]:
        model = tiny_sambay(seed)
        train = TrainSection(optim="muon", learning_rate=0.02)
        return model, regrouped(torch.optim.AdamW(model.parameters(), lr=0.02, fused=True), model, train)

    def step(model: Any, optimizer: Any, seed: int) -> None:
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()

    model, optimizer = made(0)
    step(model, optimizer, 0)
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    other, again = made(1)
    weights, state = torch.load(tmp_path / "state.pt")
    other.load_state_dict(weights)
    again.load_state_dict(state)
    for seed in (1, 2):
        step(model, optimizer, seed)
        step(other, again, seed)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), other.parameters(), strict=True))
    assert len(again.state) == len(list(other.parameters())) == len(again.state_dict()["state"])


def test_arguments_of_muon():
    assert muon_arguments(TrainSection(optim="muon")) == {"adjust_lr_fn": "match_rms_adamw"}
    train = TrainSection(optim="muon", optim_args="nesterov=false, ns_steps=3,adjust_lr_fn=original")
    assert muon_arguments(train) == {"nesterov": False, "ns_steps": 3, "adjust_lr_fn": "original"}
    assert given_arguments(None) == {}


def test_a_torch_without_muon_is_told(tmp_path, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(UsageError, match=r"stages\[one\]\.train\.optim: muon needs torch 2\.9 or newer, and this is "):
        check_arguments(toy_recipe(tmp_path, {"optim": "muon"}).stages[0])


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3", {"zero_optimization": {"stage": 0}}])
def test_muon_on_pieces_of_matrices_is_refused(tmp_path, engine):
    with pytest.raises(UsageError, match=r"stages\[one\]\.train\.optim: muon makes whole matrices orthogonal"):
        check_arguments(toy_recipe(tmp_path, {"optim": "muon", "deepspeed": engine}).stages[0])


def test_muon_without_a_matrix_is_refused(tmp_path):
    train = {"optim": "muon", "use_peft": True, "lora_target_modules": ["embed_tokens"]}
    with pytest.raises(UsageError, match=r"stages\[one\]\.train\.optim: this stage trains no matrix of a hidden layer"):
        train_toy(tmp_path, train, model=tiny_qwen(tie_word_embeddings=False))


def test_muon_learns(tmp_path, capsys):
    """From random weights, in fewer steps than AdamW at the same rates of step."""
    losses = {}
    for optim in ("muon", "adamw_torch_fused"):
        train = {"optim": optim, "max_steps": 40, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
        _, paths = train_toy(tmp_path / optim, train, model=tiny_sambay())
        losses[optim] = [line["loss"] for line in read_metrics(paths.metrics("one"))][-1]
    assert losses["muon"] < losses["adamw_torch_fused"] < 4.6
    assert "Muon trains " in capsys.readouterr().err
