"""A model is cut up for ZeRO-3 before its engine starts, a tensor at a time: no process ever has the whole on its GPU,
or a copy of its own in memory, but for the first one, which has tried the model before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sft.models.four_bit import is_four_bit


def is_sharded(args: Any) -> bool:
    """Whether a stage's processes hold a part of each weight (ZeRO-3)."""
    return isinstance(args.deepspeed, dict) and args.deepspeed["zero_optimization"].get("stage") == 3


@contextmanager
def forward_only(engine: Any) -> Iterator[None]:
    """Passes that no backward pass follows; on all processes.

    ZeRO-3 takes each for a step's first half and fetches weights for its second one ahead. What it has fetched is given
    back at the end: weights on their way can't be gathered whole, nor be parted.
    """
    yield
    if hasattr(getattr(engine, "optimizer", None), "empty_partition_cache"):
        engine.empty_partition_cache()


def shard(model: Any, args: Any) -> None:
    """Leave each process its part of every parameter of `model`, as rank 0 has it; in float32 what is trained.

    As DeepSpeed's own `zero.Init(module=model)`, which the engine would call, but for this: the engine moves the whole
    model to the GPU first. All processes must call this.
    """
    from deepspeed import init_distributed
    from deepspeed.runtime.zero.partition_parameters import Init, is_zero_param

    if is_four_bit(model) or any(is_zero_param(parameter) for parameter in model.parameters()):
        return

    class Masters(Init):
        def _convert_to_zero_parameters(self, param_list: Any) -> None:
            for parameter in param_list:
                dtype = torch.float32 if parameter.requires_grad else parameter.dtype
                # A copy: what is mapped from a file is received into, and would stay as long as the file is mapped.
                parameter.data = parameter.data.to(self.local_device, dtype, copy=True)
                self._zero_init_param(parameter)

    init_distributed()  # over the process group that there is; the settings are checked against its size
    Masters(module=model, config_dict_or_path=args.hf_deepspeed_config.config)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(args.device, torch.float32 if buffer.is_floating_point() else buffer.dtype)
