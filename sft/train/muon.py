"""Muon for matrices and AdamW for the rest as one optimizer: one scheduler moves it, one state dict resumes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from sft.recipe.optimizer_keys import given_arguments

if TYPE_CHECKING:
    from sft.recipe.train_keys import TrainSection

SINCE = "2.9"
"""The torch that brought Muon."""


class MuonAndAdamW(Optimizer):
    """torch's Muon for the groups that say `muon: True`, an AdamW that is handed in for the others.

    Both work on this optimizer's own groups and state. Muon (https://kellerjordan.github.io/posts/muon) makes the
    momentum of a matrix's gradient orthogonal by Newton-Schulz steps in bfloat16, from float32 weights and momentum.

    Args:
        groups: groups of torch's kind, each with `lr`, `weight_decay` and `muon`.
        adamw: who steps the groups of AdamW; its own groups give way to these.
        muon: momentum, nesterov, ns_steps and adjust_lr_fn of torch.optim.Muon.
        lr: what schedules take for the highest rate.
    """

    def __init__(self, groups: list[dict[str, Any]], *, adamw: AdamW, muon: dict[str, Any], lr: float) -> None:
        matrices = [group for group in groups if group["muon"]]
        self._muon = torch.optim.Muon(matrices, lr=lr, **muon)
        self._adamw = adamw
        adamw.param_groups.clear()
        for group in groups:
            if not group["muon"]:
                adamw.add_param_group(group)
        super().__init__([*self._muon.param_groups, *adamw.param_groups], {"lr": lr})
        self._share()

    def _share(self) -> None:
        """Let both work on this optimizer's groups and state, which loading replaces."""
        for part in (self._muon, self._adamw):
            part.state = self.state
            part.param_groups = [group for group in self.param_groups if group["muon"] is (part is self._muon)]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's."""
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        self._muon.step()
        self._adamw.step()
        return loss


def muon_arguments(train: TrainSection) -> dict[str, Any]:
    """What `optim_args` says of Muon.

    Its rates are scaled to AdamW's sizes of step (Moonlight, arXiv 2502.16982) unless it says otherwise: so
    `learning_rate` and `weight_decay` mean what they mean for AdamW.
    """
    kinds: dict[str, Callable[[str], Any]] = {
        "momentum": float,
        "nesterov": lambda text: text == "true",
        "ns_steps": int,
        "adjust_lr_fn": str,
    }
    given = {name: kinds[name](text) for name, text in given_arguments(train.optim_args).items()}
    return {"adjust_lr_fn": "match_rms_adamw", **given}


def muon_problem() -> str | None:
    """Why the installed torch can't train with Muon; None where it can."""
    if hasattr(torch.optim, "Muon"):
        return None
    return f"muon needs torch {SINCE} or newer, and this is {torch.__version__}: `pip install -U torch`, or use another"


def matrices(model: Any) -> set[str]:
    """Names of the parameters that Muon is for: trained matrices of hidden layers.

    Not the embeddings and the output head (nor adapters on them), nor what isn't a matrix: kernels of convolutions,
    experts in one tensor, vectors. A_log, which is a table of rates, is taken out by who takes no weight decay.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    ends = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    ends += [module for module in (base.get_input_embeddings(), base.get_output_embeddings()) if module is not None]
    kept = {id(parameter) for module in ends for parameter in module.parameters()}
    return {name for name, p in model.named_parameters() if p.requires_grad and p.ndim == 2 and id(p) not in kept}
