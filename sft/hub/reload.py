"""Whether a folder computes what it should, found out in a clean process.

Clean: its own interpreter, an empty Hugging Face home, no network, no compiler on the PATH, and nothing but torch,
transformers and what those require to be found: not this project, and no optional package (`clean_load.HIDDEN`).
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.utils.errors import UserError
from sft.utils.files import read_json

if TYPE_CHECKING:
    from torch import Tensor

NEW_TOKENS = 6


@dataclass(frozen=True)
class ReloadReport:
    """What a reload check found.

    Attributes:
        inputs: how many token sequences were run, tokens: how many tokens they have together.
        exact: whether all logits are the same bit for bit.
        error: largest relative difference of a sequence's logits (Frobenius norm, each position centred).
        same_text: whether greedy generation gave the same tokens; None where it wasn't compared.
    """

    inputs: int
    tokens: int
    exact: bool
    error: float
    same_text: bool | None


def fixed_inputs(vocab_size: int, *, lengths: Sequence[int] = (1, 9, 40), seed: int = 0) -> list[list[int]]:
    """Random token ids, the same ones on every machine."""
    draw = random.Random(seed)
    return [[draw.randrange(vocab_size) for _ in range(length)] for length in lengths]


def check_reload(
    folder: str | Path, reference: str | Path, *, tolerance: float = 0.0, timeout: float = 3600
) -> ReloadReport:
    """Load both folders in a clean process and compare their logits and what they generate.

    Args:
        folder: the one in question, for example downloaded from the Hub; reference: the one it has to equal.
        tolerance: largest relative difference of the logits that passes. 0: they must be the same bit for bit.
        timeout: in seconds.

    Raises:
        UserError: when a folder doesn't load in a clean process, or computes something else.
    """
    inputs = fixed_inputs(vocabulary_size(reference))
    results = clean_results([folder, reference], inputs, timeout=timeout)
    one, other = results[str(folder)], results[str(reference)]
    report = compare(one["logits"], other["logits"], one["generated"] == other["generated"])
    demand(report, tolerance, f"{folder} doesn't compute what {reference} does")
    return report


def check_against(
    folder: str | Path,
    logits: Sequence[Tensor],
    inputs: Sequence[Sequence[int]],
    *,
    tolerance: float,
    sums: Mapping[str, str] | None = None,
) -> ReloadReport:
    """Load `folder` in a clean process; demand the very weights, and logits like those that a model in memory gave.

    Args:
        logits: one (T, V) tensor per input.
        inputs: the token ids that were given to the model in memory.
        tolerance: largest relative difference of the logits that passes.
        sums: the `tensor_sum` of each tensor by name; None: they aren't compared.

    Raises:
        UserError: when the folder doesn't load in a clean process, holds other weights, or computes something else.
    """
    result = clean_results([folder], inputs)[str(folder)]
    changed = sorted(name for name, wanted in (sums or {}).items() if result["sums"].get(name) != wanted)
    if changed:
        raise UserError(
            f"{folder} doesn't load with the model's weights: {len(changed)} tensors aren't what was written, "
            f"{changed[0]} among them"
        )
    report = compare(result["logits"], logits, None)
    demand(report, tolerance, f"{folder} doesn't compute what the model in memory does")
    return report


def demand(report: ReloadReport, tolerance: float, what: str) -> None:
    """Raise UserError beginning with `what` unless `report` is within `tolerance`."""
    close = report.exact if tolerance == 0 else report.error <= tolerance
    if not close:
        raise UserError(f"{what}: logits differ by {report.error:.2e} (relative), {tolerance:.0e} is allowed")
    if report.same_text is False and tolerance == 0:
        raise UserError(f"{what}: logits agree, but greedy generation doesn't")


def compare(mine: Sequence[Tensor], theirs: Sequence[Tensor], same_text: bool | None) -> ReloadReport:
    """Compare two lists of (T, V) logits."""
    import torch

    shapes = [a.shape == b.shape for a, b in zip(mine, theirs, strict=True)]
    exact = all(shapes) and all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(mine, theirs, strict=True))
    error = max(relative_error(a, b) for a, b in zip(mine, theirs, strict=True)) if all(shapes) else float("inf")
    tokens = sum(len(a) for a in mine)
    return ReloadReport(len(mine), tokens, exact, 0.0 if exact else error, same_text)


def relative_error(one: Tensor, other: Tensor) -> float:
    """||one - other|| / ||other|| over (T, V) logits, each position less its mean: softmax doesn't see an offset."""
    import torch

    a, b = (x.detach().to("cpu", torch.float64) for x in (one, other))
    a, b = (x - x.mean(-1, keepdim=True) for x in (a, b))
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        return float("inf")
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def vocabulary_size(folder: str | Path) -> int:
    """Rows of the model's embedding, from the folder's config.json (an adapter's: from its base model's)."""
    folder = Path(folder)
    if (folder / "adapter_config.json").exists():
        from transformers import AutoConfig

        base = str(read_json(folder / "adapter_config.json")["base_model_name_or_path"])
        import sft.models  # noqa: F401  (registers phi4flash)

        return int(AutoConfig.from_pretrained(base).get_text_config().vocab_size)
    config = read_json(folder / "config.json")
    size = (config.get("text_config") or config).get("vocab_size")
    if not isinstance(size, int):
        raise UserError(f"{folder / 'config.json'} is no language model's: it names no vocab_size")
    return size


def clean_results(
    folders: Sequence[str | Path], inputs: Sequence[Sequence[int]], *, timeout: float = 3600
) -> dict[str, dict[str, Any]]:
    """Run `clean_load.py` on `folders`: folder -> {"logits", "generated", "dtypes"}.

    Raises:
        UserError: with the last line that the process said, when a folder doesn't load there.
    """
    import torch

    adapters = any((Path(folder) / "adapter_config.json").exists() for folder in folders)
    with tempfile.TemporaryDirectory(prefix="sft-reload-") as scratch:
        job, out = Path(scratch, "job.json"), Path(scratch, "out.pt")
        names = [str(folder) for folder in folders]
        job.write_text(
            json.dumps(
                {
                    "folders": names,
                    "inputs": [list(ids) for ids in inputs],
                    "new_tokens": NEW_TOKENS,
                    "adapters": adapters,
                    "out": str(out),
                }
            )
        )
        # An adapter's base model may have to come from the Hub, or lie in this user's cache.
        environment = dict(os.environ) if adapters else clean_environment(Path(scratch, "home"))
        try:
            done = run_clean(job, environment, timeout)
        except subprocess.TimeoutExpired:
            raise UserError(f"{', '.join(names)} took more than {timeout:.0f} s to load in a clean process") from None
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"{', '.join(names)} can't be loaded in a clean process: {last}")
        return torch.load(out, weights_only=True)


def run_clean(job: Path, environment: Mapping[str, str], timeout: float) -> subprocess.CompletedProcess[str]:
    """`clean_load.py` on a job, in an interpreter of its own."""
    program = Path(__file__).with_name("clean_load.py")
    return subprocess.run(
        [sys.executable, "-P", str(program), str(job)],
        env=dict(environment),
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
    )


def clean_environment(home: Path) -> dict[str, str]:
    """The environment of a clean process: no token, no compiler, no cache of anything, no network."""
    dropped = (
        "HF_",
        "HUGGING_FACE",
        "TRANSFORMERS_",
        "SAMBAY_",
        "SFT_",
        "PYTHONSTARTUP",
        "CC",
        "CXX",
        "TORCH_EXTENSIONS",
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    clean = {
        "PATH": "/nonexistent",
        "HF_HOME": str(home),
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return {**kept, **clean, "HF_HUB_OFFLINE": "1"}
