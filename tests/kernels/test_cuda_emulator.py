"""The emulated CUDA runtime finds what it is there to find: otherwise the tests that use it would prove little."""

from __future__ import annotations

import ctypes

import emulated_cuda
import pytest
import torch

KERNELS = ("neighbour", "no barrier", "barrier for some", "shuffle for some", "different shuffles", "beyond shared")


@pytest.fixture(scope="module")
def faults() -> ctypes.CDLL:
    return emulated_cuda.build("faults", [emulated_cuda.EMULATOR / "faults.cu"])


def run(faults: ctypes.CDLL, name: str, order: int = 0, shared: int = 4096) -> tuple[int, torch.Tensor]:
    out = torch.full((64,), float("nan"))
    faults.emulator_order(order)
    return faults.run_fault(KERNELS.index(name), ctypes.c_void_p(out.data_ptr()), shared), out


@pytest.mark.parametrize("order", [0, 1, 5])
def test_a_right_kernel_runs(faults: ctypes.CDLL, order: int) -> None:
    error, out = run(faults, "neighbour", order)
    assert error == 0 and torch.equal(out, torch.arange(64.0).roll(-1))


def test_a_race_depends_on_the_order(faults: ctypes.CDLL) -> None:
    found = [run(faults, "no barrier", order)[1] for order in (0, 1)]
    assert not torch.equal(*found)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("barrier for some", "wait at __syncthreads for threads that have left"),
        ("shuffle for some", "wait for each other for ever"),
        ("different shuffles", "meet at different shuffles"),
        ("beyond shared", "wrote beyond the shared memory"),
    ],
)
def test_faults_are_errors(faults: ctypes.CDLL, name: str, said: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(faults, name)[0] == 719
    ctypes.CDLL(None).fflush(None)
    assert said in capfd.readouterr().err


def test_shared_memory_has_to_be_asked_for(faults: ctypes.CDLL) -> None:
    assert run(faults, "neighbour", shared=64 * 1024)[0] == 1
