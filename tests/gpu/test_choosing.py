"""Choosing a token on a GPU: that of the definition, which sorts everything."""

from __future__ import annotations

import pytest
import torch
from choice_toys import assert_as_defined, cases

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(cases()))
def test_the_token_is_that_of_the_definition(name: str, dtype: torch.dtype) -> None:
    assert_as_defined(name, dtype, "cuda")
