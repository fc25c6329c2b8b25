"""What a block's backward pass finds of its forward pass: its inputs, or also what is dear to compute again.

`gradient_checkpointing` keeps a block's inputs alone. With `gradient_checkpointing_kwargs: {selective: true}` it keeps
the results of attention over whole documents too. Per token of the published model in bfloat16, a layer:

    kept beside the input           bytes   FLOPs to compute it again      FLOPs a byte
    attention over 16K tokens      10,400                 125,800,000            12,100   (twice that over 32K)
    Mamba's output projection       5,120                  26,200,000             5,100
    gate and value of the MLP      40,960                 104,900,000             2,600
    Mamba's input projection       20,480                  52,400,000             2,600
    attention's projections        10,240                  26,200,000             2,600
    attention over a window        10,400                   7,900,000               760

So attention that sees all of a document is the one thing worth its bytes: eight layers of it, 83 KB a token (1.3 GiB of
16K), where whole blocks without checkpointing keep about 3 MB a token; it is an eighth of the work that is done twice
at 16K, and more than a third at 64K. (The MLP's second projection is never done twice: nothing reads its result.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from sft.train.offload import BlockInputs

if TYPE_CHECKING:
    from trl import SFTConfig

    from sft.recipe.train_keys import TrainSection

OURS = {"differential_maps_fwd": 5, "differential_attention_fwd": 5, "flash_attention_fwd": 5}
"""The attention ops of sambay_kernels, and where among their arguments the window is; 0: none."""
OTHERS = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_flash_attention_forward",
    "_efficient_attention_forward",
)
"""torch's own, which other models are made of."""


def recompute_as_asked(model: Any, train: TrainSection, args: SFTConfig) -> None:
    """What a stage's keys say of it."""
    again = bool(args.gradient_checkpointing)
    set_recomputation(model, selective=again and train.selective, offload=again and train.activation_offloading)


def set_recomputation(model: Any, *, selective: bool = False, offload: bool = False) -> None:
    """Say what activation checkpointing, once it is switched on in `model`, keeps of a block, and where.

    `offload`: see `BlockInputs`. Each call takes the place of the last; without either it is checkpointing as it comes.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.__dict__.pop("_set_gradient_checkpointing", None)
    if not (selective or offload):
        return
    own, inputs = base._set_gradient_checkpointing, BlockInputs() if offload else None

    def switch(enable: bool = True, *args: Any, **kwargs: Any) -> None:
        own(enable, *args, **kwargs)
        for module in base.modules() if enable else ():
            if function := vars(module).get("_gradient_checkpointing_func"):
                if selective:
                    function = functools.partial(function, context_fn=_kept_attention)
                if inputs is not None:
                    function = functools.partial(inputs.call, function)
                module._gradient_checkpointing_func = function

    base._set_gradient_checkpointing = switch


def _kept_attention() -> Any:
    """The contexts of a block's two forward passes; the second finds in them what the first has left."""
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, op: Callable[..., Any], *args: Any, **kwargs: Any) -> CheckpointPolicy:
    dear = _is_whole_attention(op, args)
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE


def _is_whole_attention(op: Any, args: tuple[Any, ...]) -> bool:
    if not isinstance(op, torch._ops.OpOverload):
        return False
    library, _, name = op._schema.name.partition("::")
    if library == "sambay_kernels":
        return name in OURS and args[OURS[name]] == 0
    return (library == "aten" and name in OTHERS) or "flash_attn" in library
