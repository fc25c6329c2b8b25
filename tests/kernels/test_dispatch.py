"""Choice of backends, the reasons given for it, and the C++ build in its cache: no compiler, torn files, races."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import packed_ops as ops
import pytest
import torch
from sambay_kernels import BackendError, backend_for, causal_conv1d, selective_scan, swiglu, why
from sambay_kernels.native import build as native_build
from sambay_kernels.native import cpp_build
from sambay_kernels.native.cuda_call import problem as cuda_problem
from sambay_kernels.runtime import dispatch as registry
from sambay_kernels.runtime.checks import FLOAT_TYPES
from sambay_kernels.runtime.packing import check_cu_seqlens_form, check_cu_seqlens_values, document_count
from sambay_kernels.triton.launch import problem as triton_problem

OPS = ("selective_scan", "causal_conv1d", "swiglu", "add_layer_norm")


@pytest.mark.parametrize("op", OPS)
def test_choice_by_name(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.zeros(1)
    for name in ("torch", "reference"):
        monkeypatch.setenv("SAMBAY_KERNELS", name)
        assert backend_for(op, tensor) == name
        assert why(op, "cpu").reason == f"SAMBAY_KERNELS={name}"
    monkeypatch.setenv("SAMBAY_KERNELS", " Torch ")
    assert backend_for(op, tensor) == "torch"


@pytest.mark.parametrize("value", ["auto", ""])
def test_auto_takes_the_best(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMBAY_KERNELS", value)
    with ops.backend("cpp"):
        pass  # skips where there is no compiler
    for op in OPS:
        assert why(op, "cpu").backend == "cpp" and why(op, "cpu").remedy == ""
        best = why(op, "cuda")
        lacking = {"cuda": cuda_problem() if op == "selective_scan" else None, "triton": triton_problem()}
        assert best.backend == ("torch" if triton_problem() else "triton")
        assert best.remedy == "; ".join(f"{name}: {problem}" for name, problem in lacking.items() if problem)


def test_kernels_in_single_precision_leave_float64_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registry", {})
    registry.register("fast", "triton")
    registry.register("fast", "torch")
    monkeypatch.setenv("SAMBAY_KERNELS", "auto")
    assert backend_for("fast", torch.zeros(1)) == "triton"
    assert backend_for("fast", torch.zeros(1, dtype=torch.float64)) == "torch"
    monkeypatch.setenv("SAMBAY_KERNELS", "triton")
    assert backend_for("fast", torch.zeros(1, dtype=torch.float64)) == "torch"
    reason = why("fast", "cpu", torch.float64).reason
    assert reason == "SAMBAY_KERNELS=triton, which fast doesn't have for float64: the best for cpu"


def test_a_backend_may_be_the_best_for_some_types_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registry", {})
    registry.register("mixed", "torch", dtypes=(torch.bfloat16,))
    registry.register("mixed", "triton")
    registry.register("mixed", "torch")
    chosen = {
        wish: [_chosen("mixed", wish, dtype, monkeypatch) for dtype in (torch.bfloat16, torch.float32, torch.float64)]
        for wish in ("auto", "triton", "torch")
    }
    assert chosen == {
        "auto": ["torch", "triton", "torch"],
        "triton": ["triton", "triton", "torch"],
        "torch": ["torch", "torch", "torch"],
    }


def _chosen(op: str, wish: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend that runs; `why` has to name the same."""
    monkeypatch.setenv("SAMBAY_KERNELS", wish)
    name = backend_for(op, torch.zeros(1, dtype=dtype))
    assert why(op, "cpu", dtype).backend == name
    return name


def test_flash_attention_is_for_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMBAY_KERNELS", "auto")
    names = {dtype: why("differential_attention", "cuda", dtype).backend for dtype in FLOAT_TYPES}
    wide = "torch" if triton_problem() else "triton"
    half = (torch.bfloat16, torch.float16)
    assert names == {torch.float32: wide, torch.float64: "torch", **dict.fromkeys(half, "torch")}
    assert why("differential_attention", "cuda").backend == "torch"


def test_a_backend_that_cannot_run_is_an_error_for_every_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registry", {})
    registry.register("fast", "triton", ("cuda",))
    registry.register("fast", "torch")
    monkeypatch.setenv("SAMBAY_KERNELS", "triton")
    with pytest.raises(BackendError, match="fast's triton backend runs on cuda, not on cpu"):
        backend_for("fast", torch.zeros(1, dtype=torch.float64))
    monkeypatch.setattr(registry, "_registry", {"fast": registry._registry["fast"][:1]})
    monkeypatch.setenv("SAMBAY_KERNELS", "auto")
    with pytest.raises(BackendError, match="fast: no backend can run on cuda in float64"):
        why("fast", "cuda", torch.float64)


def test_the_choice_is_a_constant_of_a_traced_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMBAY_KERNELS", "torch")

    def doubled(tensor: torch.Tensor) -> torch.Tensor:
        return tensor * 2 if backend_for("swiglu", tensor) == "torch" else tensor

    traced = torch.compile(doubled, backend="eager", fullgraph=True)
    assert traced(torch.ones(1)).item() == 2


def test_bad_requests_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMBAY_KERNELS", "tritn")
    with pytest.raises(BackendError, match="SAMBAY_KERNELS='tritn' is unknown, choose from auto, triton"):
        swiglu(torch.zeros(1), torch.zeros(1))
    monkeypatch.setenv("SAMBAY_KERNELS", "cuda")
    with pytest.raises(BackendError, match="cuda backend runs on cuda, not on cpu"):
        backend_for("swiglu", torch.zeros(1))
    monkeypatch.setenv("SAMBAY_KERNELS", "cpp")
    with pytest.raises(BackendError, match="cpp backend runs on cpu, not on meta"):
        backend_for("swiglu", torch.zeros(1, device="meta"))
    with pytest.raises(BackendError, match="unknown op 'gate'"):
        why("gate")
    assert isinstance(BackendError("x"), ValueError)


def test_an_op_without_the_wished_backend_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registry", {})
    registry.register("fast", "triton", ("cuda",), lambda: "no driver")
    registry.register("fast", "torch")
    registry.register("plain", "torch")
    monkeypatch.setenv("SAMBAY_KERNELS", "triton")
    choice = why("plain", "cuda")
    assert choice.backend == "torch" and "SAMBAY_KERNELS=triton, which plain doesn't have" in choice.reason
    with pytest.raises(BackendError, match="fast can't use it: no driver"):
        why("fast", "cuda")
    monkeypatch.setenv("SAMBAY_KERNELS", "auto")
    choice = why("fast", "cuda")
    assert choice.backend == "torch" and choice.remedy == "triton: no driver"
    with pytest.raises(BackendError, match="unknown backend 'tron'"):
        registry.register("fast", "tron")


def test_cu_seqlens_checks() -> None:
    cpu = torch.device("cpu")
    good = torch.tensor([0, 0, 3, 3], dtype=torch.int32)
    for fits, total in ((good, 3), (None, 3), (torch.zeros(1, dtype=torch.int32), 0)):
        check_cu_seqlens_form(fits, cpu)
        check_cu_seqlens_values(fits, total)
    assert document_count(good) == 3 and document_count(None) == 1
    with pytest.raises(ValueError, match="cu_seqlens_q must end at the number of tokens, 4, got 3"):
        check_cu_seqlens_values(good, 4, name="cu_seqlens_q")
    with pytest.raises(TypeError, match="must be an int32 tensor"):
        check_cu_seqlens_form([0, 3], cpu)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must have shape"):
        check_cu_seqlens_form(torch.zeros(0, dtype=torch.int32), cpu)


def test_the_backward_stays_on_the_forwards_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The C++ form keeps states that the torch form doesn't: a changed environment must not mix them."""
    case = ops.scan_case([40, 33])
    with ops.backend("cpp"):
        want = ops.run(case, "cpp")
        leaves = {key: value.requires_grad_() for key, value in case.tensors.items()}
        y, final = selective_scan(**leaves, cu_seqlens=case.cu_seqlens)
    weights = ops.loss_weights({"y": y.shape, "final_state": final.shape})
    monkeypatch.setenv("SAMBAY_KERNELS", "torch")
    grads = torch.autograd.grad([y, final], list(leaves.values()), list(weights.values()))
    for key, grad in zip(leaves, grads, strict=True):
        assert torch.equal(grad, want[f"d_{key}"]), key


SCRIPT = """
import warnings
warnings.simplefilter("always")
import torch
from sambay_kernels import causal_conv1d, swiglu, selective_scan, why
with warnings.catch_warnings(record=True) as seen:
    for _ in range(2):
        u = torch.ones(3, 4)
        selective_scan(u, u, -u.t(), u[:, :3], u[:, :3])
        swiglu(u, u)
        causal_conv1d(u, torch.ones(4, 2))
print(len(seen), "|".join(str(w.message) for w in seen))
print(why("swiglu", "cpu").backend, "|", why("swiglu", "cpu").remedy)
"""


def test_without_a_compiler_it_warns_once_and_works(tmp_path: Path) -> None:
    env = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), "PATH": str(tmp_path), "CXX": "", "SAMBAY_KERNELS": ""}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    seen, choice = done.stdout.splitlines()
    assert seen.startswith("1 sambay_kernels runs on its slower torch backend: no C++ compiler was found: install")
    assert choice.startswith("torch | cpp: no C++ compiler was found")


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of built libraries with nothing in it; skips where there is no compiler."""
    with ops.backend("cpp"):
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path / "sambay_kernels"


def build() -> int:
    """Build or load as a new process would; returns something only a working library knows."""
    return cpp_build.library.__wrapped__().sambay_lanes()


def test_compilers_that_do_not_work(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(cpp_build.BuildError, match="CXX=no-such-compiler is not a program: install"):
        build()
    fake = empty_cache.parent / "fake"
    fake.write_text("#!/bin/sh\necho 'fake: internal error' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    with pytest.raises(cpp_build.BuildError, match=r"fake can't build .* \(fake: internal error\): install"):
        build()
    assert not list(empty_cache.glob("*.so")) and not list(empty_cache.glob("build-*"))


def test_two_at_once_build_once_and_a_torn_library_is_built_again(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpp_build, "FLAGS", ["-O0", *cpp_build.FLAGS[1:]])  # a fourth of the time
    runs: list[Path] = []
    compile_once = cpp_build._compile

    def counted(path: str, target: Path) -> None:
        runs.append(target)
        compile_once(path, target)

    monkeypatch.setattr(cpp_build, "_compile", counted)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda _: build(), range(2))) == [64, 64]
    assert len(runs) == 1 and runs[0].is_file() and not list(empty_cache.glob("build-*"))
    torn = runs[0].read_bytes()[:1000]
    runs[0].unlink()  # the old file stays mapped in this process: writing into it would tear that
    runs[0].write_bytes(torn)
    (empty_cache / f"build-{runs[0].stem}-killed").mkdir()
    assert build() == 64 and len(runs) == 2 and not list(empty_cache.glob("build-*"))
    assert build() == 64 and len(runs) == 2


def test_the_cache_falls_back_to_a_private_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(blocked))
    monkeypatch.setattr(native_build.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = native_build.cache_folder()
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700


def test_ops_take_one_document_without_borders() -> None:
    case = ops.scan_case([7]).without("initial_state")
    with ops.backend("torch"):
        one = selective_scan(**case.tensors)
        two = selective_scan(**case.tensors, cu_seqlens=case.cu_seqlens)
        x, weight = torch.ones(5, 3), torch.ones(3, 2)
        assert torch.equal(
            causal_conv1d(x, weight)[0], causal_conv1d(x, weight, cu_seqlens=torch.tensor([0, 5]).int())[0]
        )
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
