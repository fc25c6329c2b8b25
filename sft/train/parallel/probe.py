"""A check at start, by all ranks that share rows: shares give the loss and the gradients of the whole row.

The model itself is asked, as for packed rows (`sft.train.probe`): on the path that is trained, in its types.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sft.train.agree import over_processes
from sft.train.collator import ROW_CUT
from sft.train.parallel.collate import ShareCollator
from sft.train.parallel.exchange import Ranks
from sft.train.parallel.share import RowShare
from sft.train.probe import TrainedPath, accepted_inputs, probe_lengths, undisturbed
from sft.utils.distributed import alike
from sft.utils.errors import UserError

TOLERANCE, ROUNDED = 1e-4, 0.1
"""How far gradients may be off, of the largest, and how far in half precision. A share that starts from nothing is off
by as much as there is."""


def sharing_probe(model: Any, collator: ShareCollator, ranks: Ranks, path: TrainedPath) -> None:
    """Raise UserError unless a row of three documents, the middle one supervised, is the same in shares.

    Its loss's gradients at the embeddings must be those of the whole row, and exactly zero at the other documents;
    changing these must not change a bit of the loss. All ranks must come here together.
    """
    faults = [0, 0, 0]
    path.enter(model)  # which rank 0 alone has done so far
    with undisturbed(model):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.eval()  # a share of a row draws other numbers than the row
        for lengths in probe_lengths(model, path.tokens):
            row, other = _rows(model, lengths)
            _, expected = _gradients(model, path, collator.collator([row]), None)
            batch = collator([row])
            start, end = batch[ROW_CUT].share(ranks.rank)
            loss, found = _gradients(model, path, batch, ranks)
            changed, _ = _gradients(model, path, collator([other]), ranks)
            outside = torch.ones(sum(lengths), dtype=torch.bool)
            outside[lengths[0] : lengths[0] + lengths[1]] = False
            off = (found - expected[start:end]).abs().amax() if end > start else expected.new_zeros(())
            rounded = path.autocast is not None or found.dtype in (torch.bfloat16, torch.float16)
            faults[0] += int(not off <= (ROUNDED if rounded else TOLERANCE) * expected.abs().max())
            faults[1] += int(found[outside[start:end].to(found.device)].any())
            faults[2] += int(not torch.equal(loss, changed))
    _refuse(type(model).__name__, over_processes(faults))


def _refuse(name: str, faults: list[int]) -> None:
    what = ("a share's gradients aren't the whole row's", "a gradient reaches another document", "documents are mixed")
    for count, why in zip(faults, what, strict=True):
        if count:
            with alike():
                raise UserError(
                    f"{name} can't train on rows that several processes share, because {why}: leave "
                    "sequence_parallel_size out, and report this."
                )


def _rows(model: Any, lengths: list[int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A row of random tokens whose middle document is trained, and the same with other documents around it."""
    vocabulary, total = int(model.get_input_embeddings().weight.shape[0]), sum(lengths)
    generator = np.random.default_rng(0)
    ids, trained = generator.integers(vocabulary, size=total), np.zeros(total, dtype=np.int64)
    trained[lengths[0] : lengths[0] + lengths[1]] = 1
    changed = np.where(trained == 1, ids, (ids + generator.integers(1, vocabulary, size=total)) % vocabulary)
    row = {"input_ids": ids, "assistant_masks": trained, "seq_lengths": lengths}
    return row, {**row, "input_ids": changed}


def _gradients(model: Any, path: TrainedPath, batch: Mapping[str, Any], ranks: Ranks | None) -> tuple[Tensor, Tensor]:
    """The summed loss of a batch, and its gradients at the embeddings `(tokens, hidden)`."""
    device = model.get_input_embeddings().weight.device
    inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    captured: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output if output.requires_grad else output.detach().requires_grad_()
        captured.append(output)
        return output

    share = {} if ranks is None else {"row_share": RowShare(batch[ROW_CUT], ranks)}
    handle = model.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad(), path.run(model):
            count = torch.ones((), device=device)
            loss = model(**accepted_inputs(model, inputs), **share, num_items_in_batch=count, use_cache=False).loss
        (gradient,) = torch.autograd.grad(loss, captured[:1])
    finally:
        handle.remove()
    return loss.detach(), gradient[0]
