"""A training step's tensors, counted while the real model runs on tensors without values, by the kernels of a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from live_memory import LiveBytes, halve
from sambay_kernels.runtime import dispatch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """What is counted: rows x length tokens in `documents`, of which the share `kept` is computed to the end.

    `half`: as `weights_dtype: bfloat16` has it. `shared`: of a row of one document, so many ranks, and this one; the
    length is that of its share, and `before` tokens come before it.
    """

    length: int
    rows: int = 1
    documents: int = 1
    kept: float = 1.0
    checkpointing: bool = True
    bf16: bool = True
    lora: int = 0
    dropout: float = 0.0
    dtype: str = "float32"
    device: str = "gpu"
    accumulates: bool = False
    selective: bool = False
    offload: bool = False
    half: bool = False
    shared: tuple[int, int] | None = None
    before: int = 0
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True)
class Counted:
    """Bytes: of all weights, what waits for the backward pass, and the most beside weights."""

    weights: int
    after_forward: int
    peak: int


class _Kept(LiveBytes):
    """Where a mask is asked which tokens it means, it means this share of them. A second gradient of a tied weight is
    added in place: autograd does so, but not with tensors of a subclass, as these are."""

    def __init__(self, share: float, tied: torch.Size) -> None:
        super().__init__()
        self.share, self.tied = share, tied

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.nonzero.default:
            (mask,) = args
            return torch.arange(int(mask.shape[0] * self.share), device=mask.device)[:, None]
        if func is torch.ops.aten.add.Tensor and [getattr(x, "shape", None) for x in args] == [self.tied] * 2:
            return args[0]
        return super().__torch_dispatch__(func, types, args, kwargs)


@contextmanager
def kernels_of(device: str) -> Iterator[None]:
    """`gpu`: Triton's kernels, which without values never run; and the loss as a GPU's autocast has it."""
    import sft.models.sambay.layout_phi4flash as layouts
    import sft.models.sambay.modeling_phi4flash as modeling

    if device == "cpu":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layouts, "require", lambda *_: None)
            yield
        return
    loss = modeling.linear_cross_entropy

    def rounded(hidden: Tensor, weight: Tensor, *args: Any, **options: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            hidden, weight = hidden.bfloat16(), weight.bfloat16()
        return loss(hidden, weight, *args, **options)

    anywhere = {
        op: [dataclasses.replace(b, devices=()) if b.name == "triton" else b for b in backends]
        for op, backends in dispatch._registry.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "_registry", anywhere)
        patch.setenv("SAMBAY_KERNELS", "triton")
        patch.setattr(layouts, "require", lambda *_: None)
        patch.setattr(modeling, "linear_cross_entropy", rounded)
        yield


@contextmanager
def other_ranks() -> Iterator[None]:
    """The ranks that share a row send whatever is wanted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "all_to_all_single", lambda *tensors, **options: None)
        yield


@contextmanager
def host_of(bytes_: LiveBytes) -> Iterator[None]:
    """What is sent to the host's memory isn't in the memory that is counted."""
    from sft.train.offload import Link

    send = Link.send

    def uncounted(link: Link, tensor: Tensor) -> Any:
        held = send(link, tensor)
        bytes_.elsewhere(held)
        return held

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Link, "send", uncounted)
        yield


def _model(layout: Layout) -> Any:
    """On the meta device, which adapters can be put on."""
    from sft.models import Phi4FlashConfig, Phi4FlashForCausalLM
    from sft.train.recompute import set_recomputation

    with torch.device("meta"):
        config = Phi4FlashConfig(**layout.config)
        model: Any = Phi4FlashForCausalLM._from_config(config, dtype=getattr(torch, layout.dtype))
        if layout.half:
            halve(model)
        set_recomputation(model, selective=layout.selective, offload=layout.offload)
        if layout.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if layout.lora:
            from peft import LoraConfig, get_peft_model

            from sft.models.load import LORA_TARGETS

            settings = LoraConfig(r=layout.lora, lora_dropout=layout.dropout, target_modules=list(LORA_TARGETS))
            model = get_peft_model(model, settings)
    return model.train()


def _without_values(model: Any) -> None:
    """Put fake tensors in the place of parameters, inside FakeTensorMode."""
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                empty = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                module._parameters[name] = made.setdefault(id(old), torch.nn.Parameter(empty, old.requires_grad))


def count(layout: Layout) -> Counted:
    """Run a step of `layout`."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = _model(layout)
    with FakeTensorMode(), kernels_of(layout.device), other_ranks():
        _without_values(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        inputs = _inputs(layout)
        with _Kept(layout.kept, model.get_input_embeddings().weight.shape) as bytes_, host_of(bytes_):
            bytes_.known(model.parameters())
            if layout.accumulates:
                for parameter in trained:
                    parameter.grad = torch.zeros_like(parameter)
            with torch.autocast("cpu", torch.bfloat16, layout.bf16, cache_enabled=not layout.checkpointing):
                loss = model(**inputs).loss
            after, bytes_.peak = bytes_.live, max(bytes_.peak, bytes_.live)
            loss.backward()
            peak = bytes_.peak
            del loss
        return Counted(_bytes(model.parameters()), after, peak)


def _share(layout: Layout) -> Any:
    """Of a row of one document, in which other ranks have as many tokens as they please."""
    from sft.train.parallel.cut import RowCut
    from sft.train.parallel.exchange import Ranks
    from sft.train.parallel.share import RowShare

    size, rank = layout.shared or (1, 0)
    cuts = [round(layout.before * part / max(rank, 1)) for part in range(rank + 1)]
    cuts += [cuts[-1] + layout.length * part for part in range(1, size - rank + 1)]
    return RowShare(RowCut((0, cuts[-1]), tuple(cuts)), Ranks(rank, size))


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of different storages."""
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}.values())


def optimizer_bytes(config: dict[str, Any], name: str) -> int:
    """What torch's optimizer of this name holds of a model after a step."""
    model = _model(Layout(1, config=config))
    optimizer = getattr(torch.optim, name)([torch.nn.Parameter(torch.zeros(p.shape)) for p in model.parameters()])
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    return _bytes(states)


def _inputs(layout: Layout) -> dict[str, Any]:
    ids = torch.zeros(layout.rows, layout.length, dtype=torch.long)
    told: dict[str, Any] = {"input_ids": ids, "labels": ids, "use_cache": False, "num_items_in_batch": layout.tokens}
    if layout.shared:
        del told["labels"]
        told |= {"shift_labels": ids, "row_share": _share(layout)}
    if layout.documents > layout.rows or layout.shared:
        borders = torch.zeros(layout.documents + 1, dtype=torch.int32)
        told |= {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
        told |= {"max_length_q": layout.length, "max_length_k": layout.length}
    return told
