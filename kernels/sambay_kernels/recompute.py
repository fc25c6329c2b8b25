"""Autograd inside an op: the backward of a backend that is written in differentiable torch functions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def autograd_inside_op() -> Iterator[None]:
    """Record operations although an opaque op runs below autograd: it is torch.library that leaves autograd out there."""
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView"):
        exclude = exclude.remove(getattr(torch.DispatchKey, key, None) or torch._C._parse_dispatch_key(key))
    include = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(include, exclude), torch.enable_grad():
        yield
