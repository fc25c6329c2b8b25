"""The flat ops file of an export: the same functions, from torch alone."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import sambay_kernels
import torch

from sft.hub.flatten import OPS, flatten, ops_file

PACKAGE = Path(sambay_kernels.__file__).parent


@pytest.fixture(scope="module")
def text() -> str:
    return ops_file(PACKAGE)


@pytest.fixture
def flat(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The flat file, imported where `sambay_kernels` isn't installed."""
    for name in [name for name in sys.modules if name.split(".")[0] == "sambay_kernels"]:
        monkeypatch.setitem(sys.modules, name, None)
    return _import(tmp_path / "flat_ops.py", text, monkeypatch)


def _import(path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    return module


def test_signatures_are_those_of_the_package(flat: ModuleType) -> None:
    for op in OPS:
        mine, theirs = inspect.signature(getattr(flat, op)), inspect.signature(getattr(sambay_kernels, op))
        assert [(p.name, p.kind, p.default) for p in mine.parameters.values()] == [
            (p.name, p.kind, p.default) for p in theirs.parameters.values()
        ], op
        assert getattr(flat, op).__module__ == "flat_ops"


def test_the_packages_kernels_are_used_where_they_are(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = _import(tmp_path / "with_package.py", text, monkeypatch)
    assert all(getattr(module, op) is getattr(sambay_kernels, op) for op in OPS)


def _arguments(op: str) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Random float64 arguments of `op`: two documents of 5 and 4 tokens."""
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=draw).requires_grad_()

    borders = torch.tensor([0, 5, 9], dtype=torch.int32)
    if op == "selective_scan":
        tensors = [random(9, 6), random(9, 6), random(6, 3), random(9, 3), random(9, 3)]
        with torch.no_grad():
            tensors[2].copy_(-tensors[2].exp())
        return tensors, {"D": random(6), "z": random(9, 6), "delta_bias": random(6), "cu_seqlens": borders}
    if op == "causal_conv1d":
        return [random(9, 6), random(6, 4), random(6)], {"cu_seqlens": borders, "initial_state": random(2, 6, 3)}
    if op == "selective_scan_step":
        tensors = [random(3, 6, 4), random(2, 6), random(2, 6), random(6, 4), random(2, 4), random(2, 4)]
        return tensors, {"D": random(6), "z": random(2, 6), "delta_bias": random(6), "slots": torch.tensor([2, 0])}
    if op == "causal_conv1d_step":
        return [random(3, 6, 3), random(2, 6), random(6, 4), random(6)], {"slots": torch.tensor([2, 0])}
    if op == "add_layer_norm":
        return [random(9, 6), random(9, 6), random(6), random(6)], {"eps": 1e-3}
    if op == "swiglu":
        return [random(9, 6), random(9, 6)], {}
    if op == "differential_attention":
        tensors = [random(9, 4, 8), random(9, 2, 8), random(9, 2, 8), random(), random(16)]
        return tensors, {"lambda_init": 0.3, "cu_seqlens_q": borders, "window": 3}
    if op == "differential_attention_step":
        tensors = [random(2, 4, 8), random(2, 2, 7, 8), random(2, 2, 7, 8), random(), random(16)]
        return tensors, {"lambda_init": 0.3}
    labels = torch.tensor([1, -100, 3, 0, -100, 2, 4, 4, 1])
    return [random(9, 6), random(5, 6), labels], {}


@pytest.mark.parametrize("op", OPS)
def test_ops_and_their_gradients_are_those_of_the_package(op: str, flat: ModuleType) -> None:
    results = []
    for function in (getattr(flat, op), getattr(sambay_kernels, op)):
        tensors, options = _arguments(op)
        out = function(*tensors, **options)
        outs = [value for value in (out if isinstance(out, tuple) else (out,))]
        leaves = [t for t in [*tensors, *options.values()] if isinstance(t, torch.Tensor) and t.requires_grad]
        total = sum((value.square().sum() for value in outs), torch.zeros((), dtype=torch.float64))
        grads = torch.autograd.grad(total, leaves) if total.requires_grad else ()
        # The arguments too: a step changes its state.
        results.append([*(value.detach() for value in (*outs, *tensors)), *grads])
    assert len(results[0]) == len(results[1]) > 0
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_the_file_imports_torch_and_the_standard_library_only(flat: ModuleType) -> None:
    """By transformers' own rule for a checkpoint's code, which leaves out what stands in a try block."""
    from transformers.dynamic_module_utils import get_imports, get_relative_imports

    assert flat.__file__ is not None
    assert {name for name in get_imports(flat.__file__) if name not in sys.stdlib_module_names} == {"torch"}
    assert get_relative_imports(flat.__file__) == []


# ---- the joining of files ----


def _files(folder: Path, **texts: str) -> list[Path]:
    paths = []
    for name, text in texts.items():
        path = folder / f"{name}.py"
        path.write_text(text)
        paths.append(path)
    return paths


def test_flatten_keeps_code_and_comments_and_drops_what_only_files_need(tmp_path: Path) -> None:
    paths = _files(
        tmp_path,
        one='"""A docstring."""\n\nfrom __future__ import annotations\n\nimport torch\n\n__all__ = ["f"]\n\n\n'
        'def f(x):\n    """Stays."""\n    return x  # why\n',
        two="from torch import Tensor\n\nfrom .one import f\n\nTOP: int = 3\n\n\ndef g(x):\n    return f(x) + TOP\n",
    )
    text = flatten(paths)
    assert "A docstring." not in text and "__all__" not in text and ".one" not in text and "__future__" not in text
    assert "# why" in text and '"""Stays."""' in text
    assert text.index("import torch\n") < text.index("from torch import Tensor") < text.index("def f(x)")
    space: dict[str, Any] = {}
    exec(text, space)
    assert space["g"](1) == 4


@pytest.mark.parametrize(
    ("one", "two", "message"),
    [
        ("def f():\n    return 1\n", "def f():\n    return 2\n", "f is defined in .* and, differently, in"),
        ("import numpy as np\n", "", "numpy is not torch or the standard library"),
        ("from .two import g\n", "", "g is defined in none of the files"),
        ("from .two import g as h\n", "def g():\n    pass\n", "import g by its own name"),
        ("def f():\n    from .two import g\n", "def g():\n    pass\n", "inside a definition"),
    ],
)
def test_what_cannot_be_joined_is_an_error(tmp_path: Path, one: str, two: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flatten(_files(tmp_path, one=one, two=two))


def test_the_same_helper_in_two_files_is_fine(tmp_path: Path) -> None:
    helper = "def f():\n    return 1\n"
    space: dict[str, Any] = {}
    exec(flatten(_files(tmp_path, one=helper, two=f"# another comment\n{helper}")), space)
    assert space["f"]() == 1


def test_an_op_without_a_torch_form_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "ops" / "swiglu"
    folder.mkdir(parents=True)
    (folder / "torch.py").write_text("def swiglu_torch(gate, value):\n    return gate\n")
    (folder / "api.py").write_text("def swiglu(gate, value):\n    return gate\n")
    with pytest.raises(ValueError, match="add_layer_norm has no public function"):
        ops_file(tmp_path)
