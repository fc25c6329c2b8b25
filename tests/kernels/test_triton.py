"""Triton kernels without a GPU: by the interpreter in a process of its own, and compiled for A100 and H100."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed (it is on Linux only)")

# Interpreted kernels can't be compiled, and the other way round: neither runs in the tests' own process.
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "SAMBAY_KERNELS")}


FILES = ["test_scan.py", "test_conv_and_swiglu.py", "test_norm.py", "test_attention.py", "test_loss.py"]
FILES += ["test_model.py", "test_decoding.py"]


@pytest.mark.parametrize("file", FILES)
def test_interpreted_kernels_match_the_references(file: str) -> None:
    interpreted(file, "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("file", [file for file in FILES if file != "test_model.py"])
def test_interpreted_kernels_match_the_references_on_all_cases(file: str) -> None:
    interpreted(file, "slow")


def interpreted(file: str, marked: str) -> None:
    folder = Path(__file__).parent / "interpreted"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(folder / file), "-q", "-x", "-p", "no:cacheprovider", "-m", marked],
        env={**ENVIRONMENT, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"^(\.+)", done.stdout)
    assert passed and len(passed[1]) >= 2, done.stdout[-1000:]


@pytest.mark.parametrize("arch", ["80", pytest.param("90", marks=pytest.mark.slow)])
def test_every_kernel_compiles_for_a100_and_h100_without_spilling(arch: str) -> None:
    # Two registers of a float32 kernel go to memory; older Triton (3.6) keeps ten of two backward kernels there. On an
    # H100 smaller tiles, which spill nothing, take twice the time.
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    local = "8" if version >= (3, 9) else "40"
    done = subprocess.run(
        [sys.executable, "-m", "sambay_kernels.tools.aot", "--arch", arch, "--backend", "triton", "--local", local],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    sources = (Path(__file__).parents[2] / "kernels/sambay_kernels").glob("**/triton_*.py")
    kernels = {name for source in sources for name in re.findall(r"^def (\w+_kernel)\(", source.read_text(), re.M)}
    compiled = set(re.findall(rf"^(\w+_kernel) +sm_{arch}", done.stdout, re.M))
    assert compiled == kernels and len(kernels) >= 15
    single = {f"{name}<fp32>" for name in kernels if name.startswith(("maps_", "combine_", "add_layer_norm_"))}
    assert set(re.findall(r"^(\w+_kernel<fp32>) +sm_", done.stdout, re.M)) == single
    assert done.stdout.count(f"sm_{arch}") == len(kernels | single)
