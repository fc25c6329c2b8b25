"""A packed forward and backward pass never makes the host wait, and what it held is freed by reference counts."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_sambay import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from sft.models.sambay import contract_phi4flash, layout_phi4flash, modeling_phi4flash
from sft.models.sambay.shared_phi4flash import SharedTensor

IDS = torch.randint(1, 96, (1, 60), generator=torch.Generator().manual_seed(3))
BORDERS = torch.tensor([0, 11, 12, 60], dtype=torch.int32)


def packed() -> dict[str, Any]:
    """What the collator gives, with all that says where documents begin."""
    lengths = BORDERS.diff()
    return {
        "input_ids": IDS,
        "labels": IDS.masked_fill(IDS % 3 == 0, -100),
        "position_ids": torch.cat([torch.arange(n) for n in lengths.tolist()])[None],
        "seq_idx": torch.repeat_interleave(torch.arange(3, dtype=torch.int32), lengths)[None],
        "cu_seq_lens_q": BORDERS,
        "cu_seq_lens_k": BORDERS.clone(),
        "max_length_q": 48,
        "max_length_k": 48,
        "num_items_in_batch": torch.tensor(40),
        "use_cache": False,
    }


class Reads(TorchDispatchMode):
    """Counts the ops by which the host reads a tensor's values, or its size where that is data."""

    NAMES = ("_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.NAMES:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_packed_training_pass_reads_no_value(dtype: torch.dtype, checkpointing: bool) -> None:
    model = tiny_model(dtype=dtype).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    with Reads() as reads:
        model(**packed()).loss.backward()
    # How many tokens the cross-decoder computes is the one thing that the labels decide.
    assert dict(reads.seen) == {"nonzero": 1}


def test_a_device_asserts_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA what the labels and borders have to be is asserted there; nothing is read."""

    class OnDevice:
        is_cuda = True

        def tolist(self) -> None:
            raise AssertionError("the host read it")

    asked: list[Any] = []
    monkeypatch.setattr(torch, "_assert_async", lambda condition, message: asked.append((condition, message)))
    condition: Any = OnDevice()
    contract_phi4flash.require(condition, "borders")
    assert asked == [(condition, "borders")]


def test_a_mask_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, :4] = 0
    reads = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(tuple(self.shape)) or tolist(self))
    layout = layout_phi4flash.make_layout((2, 30), mask.device, layout_phi4flash.Documents(attention_mask=mask))
    assert reads == [(3,)] and layout.token_index is not None
    with torch.no_grad(), Reads() as seen:
        model(input_ids=IDS.reshape(2, 30), attention_mask=mask, use_cache=False)
    assert dict(seen.seen) == {"nonzero": 1}


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_a_shared_tensor_dies_with_its_last_name(no_collector: None) -> None:
    memory = torch.randn(64).bfloat16().requires_grad_()
    shared = SharedTensor(memory)
    loss = (shared.read() * 2).sum() + shared.read().sum()
    held = weakref.ref(shared.tensor)
    loss.backward()
    del shared, loss
    assert held() is None
    forgotten = SharedTensor(memory)  # never read, never run backward
    held = weakref.ref(forgotten.tensor)
    del forgotten
    assert held() is None


def test_a_training_step_leaves_nothing_for_the_collector(no_collector: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(dtype=torch.bfloat16).train()
    held: list[weakref.ref[torch.Tensor]] = []

    class Watched(SharedTensor):
        def __init__(self, tensor: torch.Tensor) -> None:
            super().__init__(tensor)
            held.append(weakref.ref(self.tensor))

    monkeypatch.setattr(modeling_phi4flash, "SharedTensor", Watched)
    loss = model(**packed()).loss
    loss.backward()
    assert len(held) == 1
    del loss
    assert held[0]() is None
