"""The model against the float64 oracle: logits, loss and every gradient, across the window's edge."""

import pytest
import torch
from reference_sambay import document_logits, documents_loss, float64_weights
from tiny_sambay import tiny_model


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize("length", [1, 2, 3, 4, 23, 24, 25, 48, 100, 600])
def test_logits_equal_the_oracle(model, length):
    ids = torch.randint(1, 96, (length,), generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        expected = document_logits(model.config, float64_weights(model), ids)
        found = model(input_ids=ids[None], use_cache=False).logits[0]
    assert relative_error(found, expected) < 1e-5


def test_float64_logits_equal_the_oracle_to_rounding():
    model = tiny_model(seed=3, dtype=torch.float64)
    ids = torch.randint(1, 96, (70,))
    with torch.no_grad():
        expected = document_logits(model.config, float64_weights(model), ids)
        found = model(input_ids=ids[None], use_cache=False).logits[0]
    assert found.dtype == torch.float64
    assert relative_error(found, expected) < 1e-12


# In float64 nothing but the formulas can differ, on any processor. In float32 gradients are sums whose terms cancel
# (the lambdas' most of all), so their last digits are the processor's; the bound lies below the rounding of any lower
# precision (TF32: 5e-4, bfloat16: 4e-3), which is what float32 has to be told from.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("training", [True, False])
def test_loss_and_gradients_equal_the_oracle(training, dtype, bound):
    """Several documents in one packed row, loss on a part of each; training skips the cross-decoder before it."""
    model = tiny_model(seed=1, dtype=dtype).train(training)
    generator = torch.Generator().manual_seed(5)
    lengths, prompts = [1, 2, 30, 57, 25], [0, 1, 12, 40, 25]
    documents = [torch.randint(1, 96, (n,), generator=generator) for n in lengths]
    labels = [torch.cat([torch.full((p,), -100), ids[p:]]) for ids, p in zip(documents, prompts, strict=True)]
    weights = float64_weights(model)
    expected = documents_loss(model.config, weights, documents, labels)
    expected.backward()

    boundaries = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    output = model(
        input_ids=torch.cat(documents)[None],
        labels=torch.cat(labels)[None],
        cu_seq_lens_q=boundaries,
        cu_seq_lens_k=boundaries,
        max_length_q=max(lengths),
        max_length_k=max(lengths),
    )
    output.loss.backward()
    assert (output.logits is None) == training
    assert relative_error(output.loss.detach(), expected.detach()) < bound / 100
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == dtype and relative_error(parameter.grad, weights[name].grad) < bound, name


def test_the_window_counts_the_token_itself():
    """With a window of w, changing token t changes what window layers give at t+w-1 and nothing they give at t+w."""
    model = tiny_model(seed=2, num_hidden_layers=8, sliding_window=6)
    attention = model.model.layers[1]
    hidden = torch.randn(20, 32)
    changed = hidden.clone()
    changed[3] += 1.0
    from sft.models.sambay.layout_phi4flash import make_layout

    layout = make_layout((1, 20), hidden.device)
    with torch.no_grad():
        before = attention(hidden, None, None, None, layout, hidden.dtype)[0]
        after = attention(changed, None, None, None, layout, hidden.dtype)[0]
    moved = (before != after).any(-1).nonzero().flatten().tolist()
    assert moved == [3, 4, 5, 6, 7, 8]


def test_the_gate_of_the_mlp_is_the_first_half():
    mlp = tiny_model().model.layers[0].mlp
    hidden = torch.randn(3, 32)
    with torch.no_grad():
        gate, value = (hidden @ mlp.fc1.weight.T).chunk(2, -1)
        expected = (gate * torch.sigmoid(gate) * value) @ mlp.fc2.weight.T
        assert torch.allclose(mlp(hidden), expected, atol=1e-6)


def test_positions_mean_nothing():
    model = tiny_model()
    ids = torch.randint(1, 96, (1, 30))
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False).logits
        shifted = model(input_ids=ids, position_ids=torch.arange(7, 37)[None], use_cache=False).logits
    assert torch.equal(plain, shifted)
