"""Checks at start, for any model whatever its name: documents don't see each other, and the loss is scaled as asked.

Hybrid models leak between packed documents in many ways (convolution, scan state, shared keys), and no configuration
key says so. So the model itself is asked: change every token of one document, demand that no bit of another's changes.
"""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sft.models.chunked_head import chunk_loss
from sft.train.collator import COUNT_KEYS, PackedCollator, PaddedCollator
from sft.train.engine import autocast_dtype
from sft.utils.errors import UserError

Collator = PackedCollator | PaddedCollator
LossScaling = Literal["sum", "mean"]


def accepted_inputs(model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of `batch` the model's forward takes (all of it when it takes **kwargs), without the counters."""
    parameters = _parameters(model)
    inputs = {key: value for key, value in batch.items() if key not in COUNT_KEYS}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return inputs
    return {key: value for key, value in inputs.items() if key in parameters}


def takes(model: Any, name: str) -> bool:
    """Whether a model's forward has a parameter of this name."""
    return name in _parameters(model)


def _parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inspect.signature(base.forward).parameters


@dataclass(frozen=True)
class TrainedPath:
    """How a stage runs the model in its steps: what the probes ask has to be asked on the very same path.

    `autocast`: the type that the steps compute in, None for the weights' own; `checkpointing`: the settings of
    activation checkpointing, None without; `tokens`: the most that a micro-batch holds, None for no limit.
    """

    autocast: torch.dtype | None = None
    checkpointing: Mapping[str, Any] | None = None
    tokens: int | None = None

    @classmethod
    def of(cls, args: Any, max_length: int | None) -> TrainedPath:
        """The path of a stage's SFTConfig, with rows of at most `max_length` tokens."""
        checkpointing = dict(args.gradient_checkpointing_kwargs or {}) if args.gradient_checkpointing else None
        tokens = max_length and max_length * args.per_device_train_batch_size
        return cls(autocast=autocast_dtype(args), checkpointing=checkpointing, tokens=tokens)

    @contextmanager
    def run(self, model: Any) -> Iterator[None]:
        """One pass, with the same random numbers each time. (Autocast keeps weights it has cast for as long as it
        lasts: those of a pass without gradients would have none in the next.)"""
        device = model.get_input_embeddings().weight.device
        torch.manual_seed(0)
        with torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None):
            yield

    def enter(self, model: Any) -> None:
        """Turn activation checkpointing on where the trainer will."""
        if self.checkpointing is None:
            return
        kwargs = {key: value for key, value in self.checkpointing.items() if key not in _NOT_CHECKPOINTS}
        enable = getattr(model, "activation_checkpointing_enable", None)
        if enable is not None:
            enable(activation_checkpointing_kwargs=kwargs)
        else:  # an older transformers
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


_NOT_CHECKPOINTS = ("selective", "every_n_layers", "offload")
"""Keys of gradient_checkpointing_kwargs that the trainers take out before torch's checkpoint() sees the rest."""

PLAIN = TrainedPath()


def choose_collator(
    model: Any, *, packing: bool, pad_token_id: int, path: TrainedPath = PLAIN
) -> PackedCollator | PaddedCollator:
    """The collator that keeps documents apart in `model`: packed rows where they are exact, else padded ones.

    Raises UserError when the stage asks for packing and the model mixes packed documents, or mixes padded rows too.
    """
    packed = PackedCollator(pad_token_id)
    path.enter(model)
    try:
        packing_probe(model, packed, path)
        return packed
    except UserError as error:
        if packing:
            raise UserError(f"{error} Set `packing: false` to train it on padded rows.") from error
        reason = str(error)
    padded = PaddedCollator(pad_token_id)
    packing_probe(model, padded, path)
    print(f"Training on padded rows, which costs time: {reason}", file=sys.stderr, flush=True)
    return padded


def packing_probe(model: Any, collator: Collator | None = None, path: TrainedPath = PLAIN) -> None:
    """Raise UserError unless documents in one batch of `collator` leave each other alone, bit for bit, on `path`.

    Three documents run through the model; then every token of the outer two is changed, and then every token of the
    middle one. The others' logits must not change in any bit. In training mode, where a model may take another way,
    the same holds for their losses, and the gradient of a document's loss must be exactly zero at the others'
    embeddings. Where a sliding window fits into a micro-batch, a document that is longer takes part in training mode.
    Modes, random state and gradients of the model are left as they were. Costs about a dozen passes over 78 tokens,
    and for a window of 512 seven over 566.
    """
    collator = collator or PackedCollator()
    with undisturbed(model), _refusals_told(model):
        short, *longer = [_documents(model, lengths) for lengths in probe_lengths(model, path.tokens)]
        model.eval()
        _logits_probe(model, collator, path, *short)
        model.train()
        _training_probe(model, collator, path, *short)
        for documents, changed in longer:
            _training_probe(model, collator, path, documents, changed, both=False)


def chunk_own_loss(model: Any, collator: Collator, path: TrainedPath = PLAIN) -> bool:
    """Spare a model that isn't SambaY the logits of whole rows, where its own loss is plain cross entropy."""
    generator = torch.Generator().manual_seed(2)
    documents = [torch.randint(_vocabulary(model), (length,), generator=generator) for length in (17, 24)]
    inputs = accepted_inputs(model, _batch(model, collator, documents, supervised=[True, True]))
    with undisturbed(model), path.run(model):
        model.eval()
        return chunk_loss(model, inputs)


def loss_scaling(model: Any, collator: Collator | None = None, path: TrainedPath = PLAIN) -> LossScaling:
    """How the model's own loss treats `num_items_in_batch`: "sum" divides the summed loss by it, "mean" ignores it.

    Raises UserError for a loss that does neither: the trainer couldn't make every supervised token count once.
    """
    collator = collator or PackedCollator()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(_vocabulary(model), (24,), generator=generator)
    batch = _batch(model, collator, [ids], supervised=[True])
    if "num_items_in_batch" not in accepted_inputs(model, {**batch, "num_items_in_batch": 1}):
        return "mean"
    losses = []
    with undisturbed(model), torch.no_grad():
        model.train()
        for count in (23, 46):
            with path.run(model):
                losses.append(_loss(model, {**batch, "num_items_in_batch": torch.tensor(count)}).item())
    ratio = losses[0] / losses[1] if losses[1] else float("nan")
    # A loss in bfloat16 is rounded.
    if abs(ratio - 2) < 1e-2:
        return "sum"
    if abs(ratio - 1) < 1e-2:
        return "mean"
    raise UserError(
        f"{type(model).__name__} neither divides its loss by num_items_in_batch nor averages it over the supervised "
        f"tokens (its loss is {losses[0]:.6g} for 23 items and {losses[1]:.6g} for 46), so gradient accumulation "
        "would change what is trained: this model can't be trained here."
    )


def _documents(model: Any, lengths: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Documents of random tokens, and the same with every token changed."""
    vocabulary, generator = _vocabulary(model), torch.Generator().manual_seed(0)
    documents = [torch.randint(vocabulary, (length,), generator=generator) for length in lengths]
    changed = [(doc + torch.randint(1, vocabulary, doc.shape, generator=generator)) % vocabulary for doc in documents]
    return documents, changed


OUTER, MIDDLE = [True, False, True], [False, True, False]


def _logits_probe(
    model: Any, collator: Collator, path: TrainedPath, documents: list[Tensor], changed: list[Tensor]
) -> None:
    """Refuse a model in which changing a document changes another one's logits."""
    plain = _document_logits(model, collator, path, documents)
    if not all(torch.isfinite(logits).all() for logits in plain):
        raise UserError("The model's logits on random tokens are not finite: its weights are broken.")
    outer = _document_logits(model, collator, path, [changed[0], documents[1], changed[2]])
    middle = _document_logits(model, collator, path, [documents[0], changed[1], documents[2]])
    leaks = [
        (1, "the documents around it", plain[1], outer[1]),
        (0, "the document after it", plain[0], middle[0]),
        (2, "the document before it", plain[2], middle[2]),
    ]
    for index, where, before, after in leaks:
        if not torch.equal(before, after):
            raise _leak(model, f"changing {where} changes document {index + 1}'s logits")


def _training_probe(
    model: Any,
    collator: Collator,
    path: TrainedPath,
    documents: list[Tensor],
    changed: list[Tensor],
    both: bool = True,
) -> None:
    """Refuse a model in which a document's loss depends on another, or has a gradient there (`both`: both ways)."""
    around = [changed[0], documents[1], changed[2]]
    loss, gradients = _gradients(model, collator, path, documents, MIDDLE)
    if not gradients[1].any():
        raise _leak(model, "a document's loss has no gradient at its own embeddings")
    for index in (0, 2):
        if gradients[index].any():
            raise _leak(model, f"document 2's loss has a gradient at document {index + 1}'s embeddings")
    if not torch.equal(loss, _training_loss(model, collator, path, around, MIDDLE)):
        raise _leak(model, "in training, changing the documents around it changes document 2's loss")
    if both:
        loss, gradients = _gradients(model, collator, path, documents, OUTER)
        if gradients[1].any():
            raise _leak(model, "document 1's or 3's loss has a gradient at document 2's embeddings")
    else:
        loss = _training_loss(model, collator, path, documents, OUTER)
    between = [documents[0], changed[1], documents[2]]
    if not torch.equal(loss, _training_loss(model, collator, path, between, OUTER)):
        raise _leak(model, "in training, changing the document between them changes document 1's or 3's loss")


def _training_loss(
    model: Any, collator: Collator, path: TrainedPath, documents: list[Tensor], supervised: list[bool]
) -> Tensor:
    """The loss of the supervised documents. With gradients, as in a step: kernels may differ without them."""
    batch = _batch(model, collator, documents, supervised)
    with torch.enable_grad(), path.run(model):
        return _loss(model, batch).detach()


def _gradients(
    model: Any, collator: Collator, path: TrainedPath, documents: list[Tensor], supervised: list[bool]
) -> tuple[Tensor, list[Tensor]]:
    """The loss of the supervised documents, and its gradients at each document's embeddings."""
    batch = _batch(model, collator, documents, supervised)
    captured: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output if output.requires_grad else output.detach().requires_grad_()
        captured.append(output)
        return output

    handle = model.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad(), path.run(model):
            loss = _loss(model, batch)
        (gradient,) = torch.autograd.grad(loss, captured[:1])
    finally:
        handle.remove()
    return loss.detach(), _split(gradient, [len(doc) for doc in documents], batch)


def _loss(model: Any, batch: Mapping[str, Any]) -> Tensor:
    return model(**accepted_inputs(model, batch), use_cache=False).loss


@contextmanager
def _refusals_told(model: Any) -> Iterator[None]:
    """Turn a model's own refusal of such a batch into a UserError."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError) as error:
        name = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(f"{name} refuses several documents in one batch: {reason}.") from error


def _leak(model: Any, what: str) -> UserError:
    name = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    return UserError(f"{name} doesn't keep documents of one batch apart: {what}.")


def _document_logits(model: Any, collator: Collator, path: TrainedPath, documents: list[Tensor]) -> list[Tensor]:
    batch = _batch(model, collator, documents, supervised=[True] * len(documents))
    inputs = accepted_inputs(model, batch)
    inputs.pop("labels")
    with torch.no_grad(), path.run(model):
        logits = model(**inputs, use_cache=False).logits
    return _split(logits, [len(doc) for doc in documents], batch)


def _split(values: Tensor, lengths: list[int], batch: Mapping[str, Any]) -> list[Tensor]:
    """Cut (1, T, n) or (documents, longest, n) into one (length, n) tensor per document."""
    if "attention_mask" in batch:
        return [values[index, :length] for index, length in enumerate(lengths)]
    return list(values[0].split(lengths))


def _batch(model: Any, collator: Collator, documents: list[Tensor], supervised: list[bool]) -> dict[str, Any]:
    """`documents` through the collator, on the model's device."""
    rows = [
        {"input_ids": doc.numpy(), "assistant_masks": [int(trained)] * len(doc), "seq_lengths": [len(doc)]}
        for doc, trained in zip(documents, supervised, strict=True)
    ]
    device = model.get_input_embeddings().weight.device
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in collator(rows).items()}


def _vocabulary(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def probe_lengths(model: Any, tokens: int | None) -> list[list[int]]:
    """Lengths of three documents; the middle one is longer than a small sliding window, so that its edge is inside.

    And three more for a larger window, if rows of `tokens` can hold a document that is longer.
    """
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    window = getattr(config, "sliding_window", None)
    windows = [w for w in (window if isinstance(window, (list, tuple)) else [window]) if isinstance(w, int) and w > 0]
    small = max((w for w in windows if w <= 64), default=0)
    large = max((w for w in windows if w > 64 and (tokens is None or w < tokens)), default=0)
    return [[19, max(33, small + 9), 26], *([[19, large + 9, 26]] if large else [])]


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Put the modes of all modules, and the random states of torch, numpy and Python, back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    plain, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(plain)
            np.random.set_state(arrays)
            for module, training in modes:
                module.training = training
