"""`sft doctor`: what is installed here, what will be used, and what to do about what is missing."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sft.utils.environment import git_state, package_version
from sft.utils.files import unwritable

TAKES_OVERRIDES = False

REQUIRED = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "accelerate",
    "deepspeed",
    "huggingface-hub",
    "math-verify",
    "duckdb",
    "rensa",
)
OPTIONAL = {
    "flash-attn": "pip install 'sambay-sft[cuda]' on a machine with a CUDA GPU",
    "bitsandbytes": "pip install 'sambay-sft[cuda]' on a machine with a CUDA GPU",
    "openai": "pip install 'sambay-sft[teacher]' to ask a teacher's server for answers",
    "fastapi": "pip install 'sambay-sft[serve]' for sft serve",
    "ray": "pip install 'sambay-sft[ray]' to prepare data on a Ray cluster",
}
TRACKERS = {"trackio": "trackio", "wandb": "wandb", "mlflow": "mlflow-skinny"}
"""By what `report_to` calls them: the package that a run needs."""
LOW_DISK_GB = 20


class Finding(NamedTuple):
    """One line: `state` is ok, note (works, could be better) or problem."""

    what: str
    state: str
    text: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def execute(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Print the findings. Exit status 1 when something is missing that the tool can't do without."""
    from sft.cli.common import console
    from sft.utils.quiet import quiet_libraries

    quiet_libraries()
    findings = list(examine())
    well = all(finding.state != "problem" for finding in findings)
    arguments.told.update(ok=well, findings=[finding._asdict() for finding in findings])
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "note": "yellow", "problem": "red"}
    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in findings:
        table.add_row(finding.what, Text(finding.state, style=colours[finding.state]), finding.text)
    console().print(table)
    return 0 if well else 1


def examine() -> Iterator[Finding]:
    """Everything, cheapest first."""
    yield _python()
    yield from _packages()
    yield from _compiler()
    yield from _devices()
    yield from _kernels()
    yield _disk()
    yield from _caches()
    yield _hub()


def _python() -> Finding:
    commit = git_state()
    checkout = f", checkout {commit['commit'][:10]}{' (changed)' if commit['dirty'] else ''}" if commit else ""
    state = "ok" if sys.version_info >= (3, 11) else "problem"
    own = package_version("sambay-sft") or "not installed"
    return Finding("python", state, f"{platform.python_version()} at {sys.executable}; sambay-sft {own}{checkout}")


def _packages() -> Iterator[Finding]:
    for name in REQUIRED:
        version = package_version(name)
        yield Finding(name, "ok", version) if version else Finding(name, "problem", "missing; pip install sambay-sft")
    for name, remedy in OPTIONAL.items():
        version = package_version(name)
        yield Finding(name, "ok", version) if version else Finding(name, "note", f"not installed (optional); {remedy}")
    yield _trackers()


def _trackers() -> Finding:
    found = {name: package_version(package) or package_version(name) for name, package in TRACKERS.items()}
    installed = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    missing = ", ".join(name for name, version in found.items() if not version)
    remedy = f"not installed (optional): {missing}; pip install 'sambay-sft[trackers]' for report_to" if missing else ""
    return Finding("trackers", "ok" if installed else "note", "; ".join(filter(None, (installed, remedy))))


def _compiler() -> Iterator[Finding]:
    if package_version("torch") is None:
        return
    from sambay_kernels.native.cpp_build import REMEDY, compiler

    path = compiler()
    if path is None:
        yield Finding("C++ compiler", "note", f"none, so CPU kernels run in plain torch, slower: {REMEDY}")
    else:
        yield Finding("C++ compiler", "ok", path)
    yield from _cuda_compiler()


def _cuda_compiler() -> Iterator[Finding]:
    """nvcc, where there is a GPU that it could compile for."""
    import torch
    from sambay_kernels.native.cuda_build import REMEDY, compiler

    if not torch.cuda.is_available():
        return
    path = compiler()
    if path is None:
        text = f"not found (optional: SAMBAY_KERNELS=cuda needs it, the default is Triton); {REMEDY}"
        yield Finding("nvcc", "note", text)
    else:
        yield Finding("nvcc", "ok", f"{path}; SAMBAY_KERNELS=cuda builds and takes the CUDA C++ kernels")


def _devices() -> Iterator[Finding]:
    if package_version("torch") is None:
        return
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        built = (
            "this torch is built without CUDA" if torch.version.cuda is None else "no driver or no device is visible"
        )
        yield Finding("CUDA", "note", f"no device ({built}): everything runs on {os.cpu_count()} CPU cores")
        yield _bfloat16()
    for index in range(count):
        found = torch.cuda.get_device_properties(index)
        text = f"{found.name}, {found.total_memory / 2**30:.0f} GiB, compute capability {found.major}.{found.minor}"
        yield Finding(f"cuda:{index}", "ok", text)


def _bfloat16() -> Finding:
    """What stages compute and models answer in on this processor."""
    from sft.utils.processor import bf16_unit

    unit = bf16_unit()
    if unit is None:
        return Finding(
            "bfloat16",
            "note",
            "no instructions for its matrix products: stages and small models' answers are in float32",
        )
    return Finding(
        "bfloat16",
        "ok",
        f"{unit}: stages compute in it unless train.bf16 is false, and models that are stored in it answer in it",
    )


def _kernels() -> Iterator[Finding]:
    if package_version("torch") is None:
        return
    import warnings

    import sambay_kernels  # noqa: F401  (registers the ops)
    from sambay_kernels.runtime.dispatch import BackendError, ops, why

    for op in ops():
        try:
            with warnings.catch_warnings(action="ignore"):
                choice = why(op)
        except BackendError as error:
            yield Finding(op, "problem", str(error))
            continue
        text = f"{choice.backend} on {choice.device}: {choice.reason}"
        yield Finding(op, "note" if choice.remedy else "ok", f"{text}. {choice.remedy}" if choice.remedy else text)


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    state = "ok" if free >= LOW_DISK_GB else "note"
    return Finding("disk", state, f"{free:.0f} GB free in {Path.cwd()}")


def _caches() -> Iterator[Finding]:
    """Folders that are written to beside a run's own, where that isn't possible."""
    from huggingface_hub import constants

    from sft.utils.hub_cache import REMEDY

    if why := unwritable(constants.HF_HUB_CACHE):
        text = f"{constants.HF_HUB_CACHE} can't be written to ({why}): nothing can be fetched; {REMEDY}"
        yield Finding("Hub's cache", "note", text)
    if package_version("torch") is None:
        return
    from sambay_kernels.native.build import named_cache

    folder = named_cache()
    if why := unwritable(folder):
        text = f"{folder} can't be written to ({why}): set TORCH_EXTENSIONS_DIR to a folder that can be"
        yield Finding("kernels' cache", "note", text)


def _hub() -> Finding:
    """Whether a token is there; the Hub itself isn't asked, and the token isn't shown."""
    from huggingface_hub import constants, get_token

    if get_token() is None:
        text = "not logged in: public models and data work; to push, `hf auth login` or set HF_TOKEN"
        return Finding("Hugging Face Hub", "note", text)
    source = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "`hf auth login`"
    offline = "; HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
    return Finding("Hugging Face Hub", "ok", f"a token is set ({source}) for {constants.ENDPOINT}{offline}")
