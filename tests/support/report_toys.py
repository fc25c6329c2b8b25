"""Runs as they lie on the disk, without anything having been trained: what a report is written from."""

from __future__ import annotations

import json
import random
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from sft.evaluate.metrics import summarize
from sft.evaluate.runner import sample_line
from sft.recipe import Recipe, RunPaths
from sft.utils.files import sha256_file, write_sealed

STAGES = ("broad", "hard", "long")
REACHED = {"start": 0.04, "broad": 0.6, "hard": 0.8, "long": 0.94}


def make_recipe(root: Path) -> Recipe:
    suite = {"name": "held-out", "source": {"path": "x.jsonl"}}
    stages = [
        {"name": name, "data": {"sources": [{"path": "x.jsonl"}]}, "evaluate": {"suites": [suite]}} for name in STAGES
    ]
    model = {"config": {"hidden_size": 64}, "tokenizer": "tiny"}
    return Recipe.model_validate(
        {"name": "demo", "description": "A <small> run.", "output_dir": str(root), "model": model, "stages": stages}
    )


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_sealed(path, value)


def write_stage(paths: RunPaths, name: str, *, done: bool = True, steps: int = 120) -> None:
    rng = random.Random(name)
    lines = [
        {
            "step": step,
            "epoch": step / 60,
            "loss": 2.5 * 0.98**step + 0.1 + 0.05 * rng.random(),
            "tokens": 2048 * step,
            "supervised_tokens": 1500 * step,
            "seconds": 0.5 * step,
            "tokens_per_second": 4000 + 200 * rng.random(),
        }
        for step in range(1, steps)
    ]
    paths.metrics(name).parent.mkdir(parents=True, exist_ok=True)
    paths.metrics(name).write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 1')
    funnel = {"rows": 1000, "kept": 993, "dropped": {"bad": 2, "over_length": 5}, "bad": {"json": 2}, "truncated": 0}
    if done:
        data = {"inputs": [{"source": "x.jsonl", "rows": 1000}], "funnel": funnel, "packs": 70, "tokens": 140_000}
        counters = {"tokens": 2048 * 120, "supervised_tokens": 1500 * 120, "seconds": 60.0}
        manifest = {"steps": 120, "epochs": 2.0, "counters": counters, "final_loss": 0.15, "lora": None, "data": data}
        write(paths.stage_manifest(name), {**manifest, "environment": {"device": "cpu"}})


def write_suite(paths: RunPaths, point: str, suite: str = "held-out") -> None:
    rng = random.Random(point)
    samples = []
    for index in range(200):
        right = rng.random() < REACHED.get(point, 0.5)
        samples.append(
            {
                "problem": index,
                "sample": 0,
                "id": f"p{index}",
                "group": ("arithmetic", "words")[index % 2],
                "steps": 3 + index % 4,
                "question": f"{index} < {index + 1}?",
                "prompt": f"<|user|>{index} < {index + 1}?",
                "completion": f"<think>because\n</think>\\boxed{{{1 if right else 2}}}" * (400 if index == 0 else 1),
                "tokens": int(rng.lognormvariate(5, 0.6)) + 3,
                "finished": rng.random() < 0.97,
                "answer": "1" if right else "2",
                "gold": "1",
                "verdict": "right" if right else "wrong" if index % 50 else "undecided",
                "reason": "same number",
            }
        )
    folder = paths.eval_dir(point, suite)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "samples.jsonl").write_text("".join(map(sample_line, samples)))
    settings = {"max_new_tokens": 512, "temperature": 0.0, "samples_per_problem": 1}
    metrics = {**summarize(samples), "settings": settings, "seconds": 63, "tokens_per_second": 900}
    write(folder / "metrics.json", {**metrics, "content": sha256_file(folder / "samples.jsonl")})


class Page(HTMLParser):
    """Which tags are open at the end, what is loaded from elsewhere, all ids, all text."""

    VOID = ("meta", "br", "img", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and not str(value).startswith("#"):
                self.loaded.append(str(value))
            if name == "id":
                self.ids.append(str(value))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
