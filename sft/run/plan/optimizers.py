"""What an optimizer holds of what it trains, and how much more it takes while it steps."""

from __future__ import annotations

from sft.run.plan.shape import FLOAT32, Shape

PER_VALUE = {
    "adamw_torch_fused": 8.0, "adamw_torch": 8.0, "paged_adamw_32bit": 8.0, "lion_32bit": 4.0, "paged_lion_32bit": 4.0,
    "adamw_8bit": 2.03125, "adamw_bnb_8bit": 2.03125, "paged_adamw_8bit": 2.03125, "lion_8bit": 1.015625,
    "paged_lion_8bit": 1.015625, "rmsprop": 4.0, "adagrad": 4.0,
}  # fmt: skip
"""Bytes of state a trained value: two float32 moments or one; of 8 bits with a float32 scale for each 256 values."""
STEP_COPIES = {"adamw_torch": 1.0, "rmsprop": 1.0, "adagrad": 1.0}
"""Copies of the trained values that a step makes: of those that aren't fused (torch's foreach)."""


def state_bytes(name: str, arguments: str | None, shape: Shape, trained: int, *, adapters: bool) -> int:
    """Of all that is trained, on however many processes."""
    if name == "sgd":
        return trained * FLOAT32 if "momentum" in (arguments or "") else 0
    if name == "adafactor":
        # A row and a column of each matrix in place of the second moment; vectors have theirs whole.
        factored = sum(matrix.out + matrix.width for matrix in shape.matrices())
        whole = shape.parameters - sum(matrix.numel for matrix in shape.matrices()) - shape.embedding
        embedding = shape.vocab_size + shape.hidden_size
        return trained * FLOAT32 // 8 if adapters else (factored + whole + embedding) * FLOAT32
    if name == "muon":
        matrices = min(trained, sum(matrix.numel for matrix in shape.matrices()))
        return matrices * FLOAT32 + (trained - matrices) * 2 * FLOAT32
    return round(PER_VALUE[name] * trained)


def is_paged(name: str) -> bool:
    """Whether its state goes to the host's memory when a GPU's is full."""
    return name.startswith("paged_")
