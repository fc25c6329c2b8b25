"""vLLM's batch as a packed row, and states in slots."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import torch

Plugin = Callable[[str], ModuleType]


def metadata(decodes: int, lengths: list[int], known: list[bool]) -> SimpleNamespace:
    """As vLLM's: slots 10, 11, ... of those that write a token, 20, 21, ... of those that read their prompts."""
    prompts = len(lengths)
    return SimpleNamespace(
        num_decodes=decodes,
        num_decode_tokens=decodes,
        num_prefills=prompts,
        num_prefill_tokens=sum(lengths),
        state_indices_tensor_d=torch.arange(10, 10 + decodes, dtype=torch.int32)[:, None] if decodes else None,
        state_indices_tensor_p=torch.arange(20, 20 + prompts, dtype=torch.int32) if prompts else None,
        has_initial_states_p=torch.tensor(known) if prompts else None,
        query_start_loc_p=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32) if prompts else None,
    )


def test_one_token_each_comes_first(plugin: Plugin) -> None:
    batch = plugin("scan").batch_of(metadata(2, [3, 4], [True, False]))
    assert batch.tokens == 9
    assert batch.slots.tolist() == [10, 11, 20, 21] and batch.slots.dtype == torch.int64
    assert batch.borders.tolist() == [0, 1, 2, 5, 9] and batch.borders.dtype == torch.int32
    assert batch.fresh.tolist() == [False, False, False, True]


def test_either_kind_may_be_alone(plugin: Plugin) -> None:
    steps = plugin("scan").batch_of(metadata(3, [], []))
    assert (steps.tokens, steps.borders.tolist(), steps.fresh) == (3, [0, 1, 2, 3], None)
    prompts = plugin("scan").batch_of(metadata(0, [5], [False]))
    assert (prompts.tokens, prompts.borders.tolist(), prompts.fresh.tolist()) == (5, [0, 5], [True])


def test_states_come_from_slots_and_go_back(plugin: Plugin) -> None:
    module = plugin("scan")
    pages = torch.arange(30.0)[:, None].expand(30, 12).contiguous()
    cache = pages[:, 4:10].unflatten(1, (2, 3))  # a part of each page, as vLLM has it
    batch = module.batch_of(metadata(1, [3, 4], [True, False]))
    states = module.read_states(cache, batch)
    assert states[:, 0, 0].tolist() == [10.0, 20.0, 0.0]
    module.write_states(cache, batch, states.double() + 0.5)
    assert cache[:, 1, 2][[10, 20, 21]].tolist() == [10.5, 20.5, 0.5]
    untouched = [slot for slot in range(30) if slot not in (10, 20, 21)]
    assert cache[untouched, 0, 0].tolist() == untouched and bool((pages[:, :4] == torch.arange(30.0)[:, None]).all())
