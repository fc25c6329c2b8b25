"""Residual addition and LayerNorm in Triton against their float64 definition."""

from __future__ import annotations

import norm_ops as norm
import packed_ops as ops
import pytest
import torch
from sambay_kernels.ops.add_layer_norm import triton as backend
from sambay_kernels.ops.add_layer_norm.op import add_layer_norm_fwd

ROUNDED = 2**-7  # the interpreter cuts bfloat16 off where a GPU rounds it


@pytest.fixture(params=[(2048, 32), (64, 2)])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One program for all rows, and several, of several blocks."""
    for name, value in zip(("BLOCK", "STEPS"), request.param, strict=True):
        monkeypatch.setattr(backend, name, value)


@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("shape", [(13, 40), (2, 3, 8), (5,), (0, 4), (3, 100)])
def test_fp32_matches_the_definition(blocks: None, shape: tuple[int, ...], added: bool) -> None:
    case = norm.case(*shape, added=added)
    ops.assert_close(norm.run("triton", case), norm.run("reference", norm.wide(case)), 1e-5)


@pytest.mark.parametrize("types", norm.TYPES)
def test_other_types(blocks: None, types: tuple[torch.dtype, ...]) -> None:
    case = norm.case(13, 40, types=types)
    found = norm.run("triton", case, out_dtype=types[2])
    ops.assert_close(found, norm.run("reference", norm.wide(case)), 2 * ROUNDED)


def test_rows_do_not_depend_on_their_neighbours(blocks: None) -> None:
    norm.assert_rows_stand_alone("triton")


def test_frozen_weights_and_one_output() -> None:
    norm.assert_only_what_is_wanted("triton")


def test_as_a_torch_op() -> None:
    hidden, delta, weight, bias = (x.requires_grad_() for x in norm.tensors(norm.case(3, 8)))
    torch.library.opcheck(add_layer_norm_fwd.op, (hidden, delta, weight, bias, 1e-5, torch.float32, "triton"))
