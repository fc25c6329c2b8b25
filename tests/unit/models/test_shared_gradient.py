"""The gradient of a memory that many layers read, summed in float32."""

from __future__ import annotations

import torch
from tiny_sambay import tiny_model

from sft.models.sambay.shared_phi4flash import SharedTensor


def test_the_sum_of_many_gradients_is_rounded_once() -> None:
    torch.manual_seed(0)
    memory = torch.randn(64).bfloat16().requires_grad_()
    factors = [torch.randn(64).bfloat16() for _ in range(100)]
    shared = SharedTensor(memory)
    sum((shared.read() * factor).float().sum() for factor in factors).backward()
    want = torch.stack(factors).float().sum(0)
    assert memory.grad.dtype == torch.bfloat16 and torch.equal(memory.grad, want.bfloat16())
    plain = memory.detach().clone().requires_grad_()
    sum((plain * factor).float().sum() for factor in factors).backward()
    assert not torch.equal(plain.grad, want.bfloat16())  # what autograd does by itself


def test_another_reader_of_the_tensor_itself_counts_too() -> None:
    memory = torch.randn(8).bfloat16().requires_grad_()
    shared = SharedTensor(memory)
    (shared.read().sum() + 3 * shared.tensor.sum() + 5 * memory.sum()).backward()
    assert torch.equal(memory.grad, torch.full((8,), 9.0, dtype=torch.bfloat16))


def test_an_unread_tensor_gets_the_rest_and_a_second_backward_starts_anew() -> None:
    memory = torch.ones(8).bfloat16().requires_grad_()
    shared = SharedTensor(memory)
    loss = (2 * shared.read()).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert torch.equal(memory.grad, torch.full((8,), 4.0, dtype=torch.bfloat16))
    SharedTensor(memory).tensor.sum().backward()
    assert torch.equal(memory.grad, torch.full((8,), 5.0, dtype=torch.bfloat16))


def test_a_half_precision_model_uses_it_with_and_without_checkpointing() -> None:
    ids = torch.randint(1, 96, (1, 40), generator=torch.Generator().manual_seed(0))
    grads = []
    for checkpointing in (False, True):
        model = tiny_model(dtype=torch.bfloat16).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(grad is not None and grad.isfinite().all() for grad in grads[0].values())
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
    exact = tiny_model(dtype=torch.bfloat16).float().train()
    exact(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in exact.named_parameters():
        if ".layers.4.attn." in name:  # the layer whose memory is read
            error = (grads[0][name].float() - parameter.grad).norm() / parameter.grad.norm()
            assert error < 0.1, (name, error)
