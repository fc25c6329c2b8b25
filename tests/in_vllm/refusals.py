"""What can't be served is refused with one sentence that names it: checkpoints, configurations, options."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from environment import run
from models import write
from safetensors.torch import load_file, save_file

LOAD = str(Path(__file__).with_name("load.py"))
WEIGHTS = "model.safetensors"
Change = Callable[[Path], None]


def tensors(change: Callable[[dict[str, Any]], None]) -> Change:
    """A change of a copy's tensors."""

    def of_folder(folder: Path) -> None:
        held = load_file(folder / WEIGHTS)
        change(held)
        save_file(held, folder / WEIGHTS, metadata={"format": "pt"})

    return of_folder


def configured(**keys: Any) -> Change:
    """A change of a copy's config.json."""

    def of_folder(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))

    return of_folder


def cut(folder: Path) -> None:
    """The first half of the weights alone."""
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


NORM = "model.final_layernorm.bias"
OTHERS = "model.layers.0.self_attn.q_proj.weight"
BROKEN: dict[str, tuple[Change, str]] = {
    "missing": (tensors(lambda held: held.pop(NORM)), f"the checkpoint lacks 1 tensor ({NORM})"),
    "left over": (tensors(lambda held: held.update({OTHERS: held[NORM].clone()})), f"doesn't have ({OTHERS})"),
    "shape": (configured(intermediate_size=80), "has shape [256, 64], and config.json asks for [160, 64]"),
    "cut short": (cut, "cut short or damaged"),
    "family": (configured(num_hidden_layers=6), "config.json is not of a SambaY model: it has num_hidden_layers 6"),
    "window": (configured(sliding_window=0), "sliding_window must be one width of at least 2 tokens, not 0"),
}
OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "tensor parallel": ({"tensor_parallel_size": 2}, "tensor_parallel_size=2 is not supported"),
    "speculative": (
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
        "speculative decoding is not supported: a recurrent state can't be taken back",
    ),
    "LoRA": ({"enable_lora": True}, "LoRA adapters (enable_lora) are not supported"),
}


def refusals(folder: Path) -> list[str]:
    """Each is refused with its sentence; and where an engine has processes of its own, their log has it."""
    model = write(folder, "one")
    cases: list[tuple[str, Path, dict[str, Any], str]] = []
    for name, (change, sentence) in BROKEN.items():
        copy = folder / name.replace(" ", "-")
        shutil.copytree(model, copy)
        change(copy)
        cases.append((name, copy, {}, sentence))
    cases += [(name, model, *asked) for name, asked in OPTIONS.items()]
    (folder / "cases.json").write_text(json.dumps([[str(place), options] for _, place, options, _ in cases]))
    run([LOAD, str(folder / "cases.json"), str(folder / "said.json")], folder, one_process=True)
    for (name, _, _, sentence), said in zip(cases, json.loads((folder / "said.json").read_text()), strict=True):
        assert said is not None and sentence in said, f"{name}: {said!r} has no {sentence!r}"
    (folder / "cases.json").write_text(json.dumps([[str(folder / "missing"), {}]]))
    log = run([LOAD, str(folder / "cases.json"), str(folder / "said.json")], folder)
    assert BROKEN["missing"][1] in log, log[-6000:]
    return [f"{name} refused: ... {sentence} ..." for name, _, _, sentence in cases]
