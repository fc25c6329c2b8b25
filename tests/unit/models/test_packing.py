"""A document never sees another, and how a batch is laid out changes nothing: packed, padded left or right, alone."""

import pytest
import torch
from tiny_sambay import tiny_model

LENGTHS = [5, 1, 40, 2, 33]


def boundaries(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


def packed_arguments(documents):
    lengths = [len(d) for d in documents]
    cu = boundaries(lengths)
    return {
        "input_ids": torch.cat(documents)[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": cu,
        "cu_seq_lens_k": cu,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "seq_idx": torch.cat([torch.full((n,), i, dtype=torch.int32) for i, n in enumerate(lengths)])[None],
        "use_cache": False,
    }


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def documents():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 96, (n,), generator=generator) for n in LENGTHS]


@pytest.fixture(scope="module")
def alone(model, documents):
    with torch.no_grad():
        return [model(input_ids=d[None], use_cache=False).logits[0] for d in documents]


def padded(documents, side):
    width = max(LENGTHS)
    ids = torch.zeros(len(documents), width, dtype=torch.long)
    mask = torch.zeros(len(documents), width, dtype=torch.long)
    for row, document in enumerate(documents):
        place = slice(0, len(document)) if side == "right" else slice(width - len(document), width)
        ids[row, place], mask[row, place] = document, 1
    return ids, mask


def test_packed_equals_alone(model, documents, alone):
    with torch.no_grad():
        found = model(**packed_arguments(documents)).logits[0].split(LENGTHS)
    for a, b in zip(found, alone, strict=True):
        assert (a - b).abs().max() < 1e-6 * b.abs().max() * 10


@pytest.mark.parametrize("told_by", ["cu_seq_lens_q", "seq_idx", "position_ids"])
def test_boundaries_are_read_from_whatever_names_them(model, documents, told_by):
    whole = packed_arguments(documents)
    part = {k: whole[k] for k in ("input_ids", "use_cache", told_by)}
    with torch.no_grad():
        assert torch.equal(model(**part).logits, model(**whole).logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_equals_alone(model, documents, alone, side):
    ids, mask = padded(documents, side)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    for row, expected in enumerate(alone):
        assert (logits[row][mask[row].bool()] - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_gradient(documents, side):
    """The published code masks padding forward and forgets it backward: left padding gave wrong gradients."""
    model = tiny_model(seed=4).train()
    packed = packed_arguments(documents)
    model(**packed, labels=packed["input_ids"]).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    ids, mask = padded(documents, side)
    model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
    for name, parameter in model.named_parameters():
        scale = expected[name].abs().max()
        assert (parameter.grad - expected[name]).abs().max() <= 1e-5 * scale, name


@pytest.mark.parametrize("changed", range(len(LENGTHS)))
def test_changing_one_document_changes_no_bit_of_another(model, documents, changed):
    """Through the convolution, the scan, window, full and cross attention and the gated memory units."""
    other = list(documents)
    other[changed] = (other[changed] + 17) % 95 + 1
    outputs, gradients = [], []
    for batch in (documents, other):
        arguments = packed_arguments(batch)
        embeds = model.model.embed_tokens(arguments.pop("input_ids")).detach().requires_grad_()
        logits = model(inputs_embeds=embeds, **arguments).logits
        logits.square().sum().backward()
        outputs.append(logits.detach()[0].split(LENGTHS))
        gradients.append(embeds.grad[0].split(LENGTHS))
    model.zero_grad()
    for i in range(len(LENGTHS)):
        same = torch.equal(outputs[0][i], outputs[1][i]) and torch.equal(gradients[0][i], gradients[1][i])
        assert same == (i != changed)


def test_a_nan_in_one_document_stays_there(model, documents):
    arguments = packed_arguments(documents)
    embeds = model.model.embed_tokens(arguments.pop("input_ids")).detach()
    embeds[0, 10] = float("nan")
    with torch.no_grad():
        found = model(inputs_embeds=embeds, **arguments).logits[0].split(LENGTHS)
    assert [bool(x.isnan().any()) for x in found] == [False, False, True, False, False]


def test_skipping_unsupervised_tokens_is_exact(documents):
    """Loss and every gradient with the cross-decoder skipped before each document's first target = without."""
    model = tiny_model(seed=6).train()
    arguments = packed_arguments(documents)
    labels = arguments["input_ids"].clone()
    for start, prompt in zip(boundaries(LENGTHS).tolist(), [3, 1, 30, 2, 0], strict=False):
        labels[0, start : start + prompt] = -100
    model(**arguments, labels=labels).loss.backward()
    skipped = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logits = model(**arguments).logits[0].float()
    targets = torch.full_like(labels[0], -100)
    for a, b in zip(boundaries(LENGTHS)[:-1].tolist(), boundaries(LENGTHS)[1:].tolist(), strict=True):
        targets[a : b - 1] = labels[0, a + 1 : b]
    full = torch.nn.functional.cross_entropy(logits, targets)
    full.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad - skipped[name]).abs().max() <= 2e-6 * max(1.0, skipped[name].abs().max()), name


def test_the_cross_decoder_sees_only_what_the_loss_reads(model, documents):
    arguments = packed_arguments(documents)
    labels = arguments["input_ids"].clone()
    labels[0, : -(LENGTHS[-1] - 20)] = -100  # 13 targets, in the last document
    seen = []
    hook = model.model.layers[6].register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].shape[0]))
    try:
        with torch.no_grad():
            model(**arguments, labels=labels, skip_logits=True)
    finally:
        hook.remove()
    assert seen == [14]  # the token before the first target too: it predicts it


@pytest.mark.parametrize("padding", ["packed", "left", "right"])
def test_loss_and_logits_come_from_one_pass_through_the_layers(model, documents, padding):
    arguments = packed_arguments(documents)
    if padding != "packed":
        arguments = dict(zip(("input_ids", "attention_mask"), padded(documents, padding), strict=True))
    labels = arguments["input_ids"].masked_fill(arguments["input_ids"] % 3 == 0, -100)  # 0 is padding
    calls = []
    hooks = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in model.model.layers]
    try:
        with torch.no_grad():
            both = model(**arguments, labels=labels)
            assert len(calls) == len(model.model.layers)
            alone = model(**arguments, labels=labels, skip_logits=True)
            logits = model(**arguments).logits
            tail = model(**arguments, labels=labels, logits_to_keep=3, output_hidden_states=True)
    finally:
        for hook in hooks:
            hook.remove()
    assert alone.logits is None and abs(both.loss - alone.loss) < 1e-6 * alone.loss
    assert torch.equal(both.logits, logits)
    if padding != "packed":
        targets = labels[:, 1:].masked_fill(arguments["attention_mask"][:, :-1] == 0, -100)  # nothing predicts a first
        expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())
        assert abs(both.loss - expected) < 1e-6 * expected
    assert torch.equal(tail.loss, both.loss) and (tail.logits - logits[:, -3:]).abs().max() < 1e-5 * logits.abs().max()
    assert len(tail.hidden_states) == len(model.model.layers) + 1


def test_a_row_without_targets_gives_zero_loss_and_zero_gradients(documents):
    model = tiny_model().train()
    arguments = packed_arguments(documents)
    loss = model(**arguments, labels=torch.full_like(arguments["input_ids"], -100)).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_contradicting_inputs_are_refused(model):
    ids = torch.randint(1, 96, (2, 6))
    with pytest.raises(ValueError, match="cu_seq_lens must go from 0"):
        model(input_ids=ids, cu_seq_lens_q=torch.tensor([0, 5]), use_cache=False)
    mask = torch.tensor([[1] * 6, [0, 1, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match="packed documents"):
        model(input_ids=ids, cu_seq_lens_q=torch.tensor([0, 12]), attention_mask=mask, use_cache=False)
    with pytest.raises(ValueError, match="attention_mask must be"):
        model(input_ids=ids, attention_mask=torch.ones(2, 1, 6, 6), use_cache=False)
    with pytest.raises(ValueError, match="exactly one of"):
        model()
