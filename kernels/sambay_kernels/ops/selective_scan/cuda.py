"""Selective scan by the CUDA C++ kernels: plan, buffers, launches."""

from __future__ import annotations

import torch
from torch import Tensor

from ...native.cuda_call import ScanArgs, ScanBackward, ScanForward, call, common_type, sum_parts
from ...native.tensors import packed, pointer, rows, rows_of
from ...runtime.segments import power_of_two, segment_length, segments
from .inputs import ScanInputs

CUDA_KEPT_EVERY = 16  # tokens between two kept states; kKeep in csrc/scan.cu
LANES = 32  # of a warp; a lane is one channel, or one of several that share it
LANE_STATES = 16  # states that a lane holds; kStates in csrc/scan.cu
BLOCK_WARPS = 4  # kWarps in csrc/scan.cu
MOST_STATES = 256  # shared memory for more would not fit


class _Call:
    """The plan, and the inputs in the form the kernels read, kept alive while they do."""

    def __init__(self, inputs: ScanInputs) -> None:
        u, delta, A, B, C, D, z, delta_bias, softplus, cu_seqlens, initial_state = inputs
        (self.total, self.channels), self.states = u.shape, A.shape[1]
        if self.states > MOST_STATES:
            raise ValueError(
                f"selective_scan: the cuda backend takes up to {MOST_STATES} states a channel, got {self.states}: "
                "use SAMBAY_KERNELS=triton"
            )
        self.like = u
        # Half-precision kernels exist for 16 states.
        self.dtype = common_type(u, delta, B, C, z) if self.states == LANE_STATES else torch.float32
        slabs = power_of_two(-(-self.states // LANE_STATES))
        self.tiles = -(-self.channels // (LANES // slabs * BLOCK_WARPS))
        length = segment_length(self.total, self.channels, LANES // slabs)
        self.cut = segments(cu_seqlens, self.total, length, u.device)
        self.count, self.documents = self.cut.start.shape[0], self.cut.borders.shape[0] - 1
        self.several = self.total > length  # otherwise no document can be cut
        self.tensors = [rows(value, self.dtype) for value in (u, delta, B, C, z)]
        self.tensors += [packed(value, torch.float32) for value in (A, D, delta_bias, initial_state)]
        self.plan = [x.contiguous() for x in (*self.cut[:3], self.cut.first, self.cut.borders)]
        sizes = (self.total, self.channels, self.states, self.documents, self.count, slabs, self.tiles)
        matrices, vectors = map(rows_of, self.tensors[:5]), map(pointer, self.tensors[5:])
        self.args = ScanArgs(*sizes, *map(pointer, self.plan), *matrices, *vectors, int(softplus))

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialised tensor on the inputs' device."""
        return self.like.new_empty(shape, dtype=dtype)

    def scratch(self) -> list[Tensor | None]:
        """States and steps of segments: (n, N, d_inner), (n, d_inner), (n, N, d_inner); None if no document is cut."""
        if not self.several:
            return [None, None, None]
        shape = (self.count, self.states, self.channels)
        return [self.empty(*shape), self.empty(self.count, self.channels), self.empty(*shape)]


def selective_scan_cuda(inputs: ScanInputs, kept_shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """y, final_state and the states kept for the backward, (rows, N, d_inner); with 0 rows none is.

    Raises:
        ValueError: more than 256 states.
        KernelError: a launch failed.
    """
    made, u = _Call(inputs), inputs.u
    y = made.empty(*u.shape, dtype=made.dtype)
    final = made.empty(made.documents, *inputs.A.shape)
    # Zeros, because short documents leave rows unused and an op's output should be the same in every run.
    kept = u.new_zeros(kept_shape, dtype=torch.float32)
    scratch = made.scratch()
    outputs = (*map(pointer, (*scratch, y, final)), pointer(kept) if kept_shape[0] else None)
    call("scan_forward", ScanForward(made.args, *outputs), made.dtype, u.device)
    return y.to(u.dtype), final, kept


def selective_scan_cuda_backward(
    grad_y: Tensor | None, grad_final: Tensor | None, inputs: ScanInputs, kept: Tensor
) -> list[Tensor | None]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias, initial_state; None for None.

    Raises:
        KernelError: a launch failed.
    """
    made, u = _Call(inputs), inputs.u
    channels, count = made.channels, made.count
    tokens = [None if x is None else made.empty(*u.shape, dtype=made.dtype) for x in (u, inputs.delta, inputs.z)]
    of_A = made.empty(count, made.states, channels)
    of_vectors = [None if x is None else made.empty(count, channels) for x in (inputs.D, inputs.delta_bias)]
    maps = [made.empty(made.tiles, made.total, made.states) for _ in "BC"]
    initial = None if inputs.initial_state is None else made.empty(*inputs.initial_state.shape)
    given = (rows(grad_y, made.dtype), packed(grad_final, torch.float32), kept)
    scratch = made.scratch()
    outputs = map(pointer, (*given[1:], *scratch, *tokens, of_A, *of_vectors, *maps, initial))
    args = ScanBackward(made.args, rows_of(given[0]), *outputs)
    call("scan_backward", args, made.dtype, u.device)
    grad_D, grad_bias = (None if parts is None else sum_parts(parts) for parts in of_vectors)
    grad_B, grad_C = map(sum_parts, maps)
    grad_A = sum_parts(of_A).t()
    return [tokens[0], tokens[1], grad_A, grad_B, grad_C, grad_D, tokens[2], grad_bias, initial]
