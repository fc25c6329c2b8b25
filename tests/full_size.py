"""The whole chain at the published size, on a CPU, within a bound of memory and time: `make check-full-size`.

A random checkpoint of the published shape is made, and `sft run` takes it from its first evaluation over two LoRA steps
to a repository on a Hub (a local server): prepare, train, evaluate, merge, export, reload, push, download, compare. The
memory is what the processes together hold of their own (RssAnon): pages of mapped files can be dropped at any time.

    python tests/full_size.py [--layers 32] [--folder DIR] [--memory 12] [--minutes 15] [--cores 2]

Needs about 35 GB of disk at the published size. Nothing but this repository is needed: the tokenizer is the tiny one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "support"))

from hub_server import HubServer, running_hub

PARAMETERS = 3_852_562_944
TENSOR_BYTES = 7_706_608_640
REPO = "tester/full-size"

RECIPE = """\
name: full-size
output_dir: {run}
model: {{model_name_or_path: {start}, dtype: bfloat16}}
stages:
  - name: lora
    data: {{sources: [{{generate: {{family: all, rows: 40}}}}]}}
    train:
      max_length: 256
      packing: true
      max_steps: 2
      per_device_train_batch_size: 1
      learning_rate: 1.0e-3
      bf16: true
      gradient_checkpointing: true
      use_peft: true
      lora_r: 64
      lora_alpha: 128
      save_steps: 1
    evaluate:
      suites:
        - name: two
          source: {{generate: {{family: arithmetic, rows: 2, split: test}}}}
          max_new_tokens: 6
push: {{repo_id: {repo}}}
"""

# What the command says on standard error when a phase ends, and the name of the next.
PHASES = [
    (r"^start/two: 2/2", "train two steps"),
    (r"^lora: step 2/2", "evaluate the stage"),
    (r"^lora/two: 2/2", "merge, and compare logits"),
    (r"^writing the model", "write"),
    (r"in a clean process", "reload in a clean process"),
    (r"files are there already", "push"),
    (r"^downloading .* again", "download and compare"),
]


@dataclass
class Watch:
    """What a tree of processes holds of its own, sampled ten times a second; peaks by phase."""

    phase: str = "begin"
    peaks: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    busy: dict[str, float] = field(default_factory=dict)
    stopped: threading.Event = field(default_factory=threading.Event)

    def run(self, root: int) -> None:
        last, worked = time.monotonic(), 0.0
        while not self.stopped.wait(0.1):
            phase, now, processes = self.phase, time.monotonic(), tree(root)
            work, held = sum(map(processor_seconds, processes)), sum(map(anonymous, processes))
            self.seconds[phase] = self.seconds.get(phase, 0.0) + now - last
            self.busy[phase] = self.busy.get(phase, 0.0) + max(0.0, work - worked)
            self.peaks[phase] = max(self.peaks.get(phase, 0.0), held)
            last, worked = now, work


def tree(root: int) -> list[int]:
    """A process and everything that it has started."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except OSError:  # it has ended
            continue
        parents.setdefault(int(text.rpartition(")")[2].split()[1]), []).append(int(path.parent.name))
    found = [root]
    for process in found:
        found += parents.get(process, [])
    return found


def anonymous(process: int) -> float:
    """RssAnon and shared memory of a process in GiB; 0 once it has ended."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0.0
    return sum(int(size) for size in re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", text, re.MULTILINE)) / 2**20


def processor_seconds(process: int) -> float:
    """What a process and its ended children have had of the processors; 0 once it has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def watching(watch: Watch, root: int) -> Iterator[None]:
    thread = threading.Thread(target=watch.run, args=(root,))
    thread.start()
    try:
        yield
    finally:
        watch.stopped.set()
        thread.join(timeout=30)
        watch.stopped.clear()


def make_checkpoint(folder: Path, layers: int, vocabulary: int) -> None:
    """Random weights of the published shape, and the tiny tokenizer, whose ids are small."""
    import torch

    from sft.models import Phi4FlashConfig, Phi4FlashForCausalLM
    from sft.models.save import save_model
    from sft.tokenizers.load import load_tokenizer

    tokenizer = load_tokenizer("tiny")
    ends = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    torch.manual_seed(0)
    config = Phi4FlashConfig(num_hidden_layers=layers, vocab_size=vocabulary, **ends)
    model = Phi4FlashForCausalLM._from_config(config, dtype=torch.bfloat16)
    count = save_model(folder, model)
    tokenizer.save_pretrained(folder)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if (layers, vocabulary) == (32, 200_064):
        assert count == PARAMETERS and 0 <= size - TENSOR_BYTES < 1_000_000
        assert len(list(folder.glob("*.safetensors"))) == 2
    print(f"{count:,} parameters, {size / 1e9:.1f} GB", file=sys.stderr)


def run(command: list[str], watch: Watch, environment: dict[str, str], cores: int) -> None:
    """Run a command on so many cores; what it says on standard error moves the watch from phase to phase."""
    process = subprocess.Popen(
        command,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores]),
    )
    assert process.stderr is not None
    try:
        with watching(watch, process.pid):
            for line in process.stderr:
                print(line, end="", file=sys.stderr, flush=True)
                for pattern, phase in PHASES:
                    if re.search(pattern, line):
                        watch.phase = phase
            code = process.wait(timeout=60)
    finally:
        for left in reversed(tree(process.pid)) if process.poll() is None else ():
            with suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)
    if code:
        raise SystemExit(f"{' '.join(command[:4])} ended with {code}")


def whole_chain(folder: Path, chosen: argparse.Namespace, watch: Watch, hub: HubServer) -> None:
    """Checkpoint, recipe, `sft run`; what is left behind is looked at."""
    start, recipe = folder / "start", folder / "recipe.yaml"
    environment = {**os.environ, "OMP_NUM_THREADS": str(chosen.cores), **hub.environment(folder / "home")}
    watch.phase = "make the checkpoint"
    made = [sys.executable, __file__, "--make", str(start), "--layers", str(chosen.layers)]
    run([*made, "--vocabulary", str(chosen.vocabulary)], watch, environment, chosen.cores)
    recipe.write_text(RECIPE.format(run=folder / "run", start=start, repo=REPO))
    watch.phase = "prepare"
    run([sys.executable, "-m", "sft", "prepare", "--config", str(recipe)], watch, environment, chosen.cores)
    watch.phase = "evaluate the start"
    run([sys.executable, "-m", "sft", "run", "--config", str(recipe)], watch, environment, chosen.cores)
    manifest = json.loads((folder / "run" / "export" / "manifest.json").read_text())
    assert manifest["merge"]["effect"] > 100 * manifest["merge"]["error"], manifest["merge"]
    assert manifest["reload"]["error"] < 0.1 and any(name.endswith(".safetensors") for name in hub.files(REPO))
    assert {path.name for path in (folder / "run").glob(".*")} <= {".lock", ".export.lock"}, "a temporary was left"
    print(f"merge: {manifest['merge']}\nreload: {manifest['reload']}")


def report(watch: Watch, chosen: argparse.Namespace) -> int:
    """A line for each phase; 1 where a bound is broken."""
    print(f"{'phase':<28}{'seconds':>9}{'of processors':>15}{'GiB held':>10}")
    for phase, seconds in watch.seconds.items():
        print(f"{phase:<28}{seconds:>9.0f}{watch.busy[phase]:>15.0f}{watch.peaks[phase]:>10.2f}")
    peak, minutes = max(watch.peaks.values()), sum(watch.seconds.values()) / 60
    print(f"{'sum, peak':<28}{60 * minutes:>9.0f}{sum(watch.busy.values()):>15.0f}{peak:>10.2f}")
    broken = peak > chosen.memory or minutes > chosen.minutes
    print(
        f"{'FAILED' if broken else 'passed'}: at most {chosen.memory:g} GiB and {chosen.minutes:g} minutes are allowed"
    )
    return int(broken)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--layers", type=int, default=32, help="of the model (published: 32)")
    options.add_argument("--vocabulary", type=int, default=200_064, help="rows of its embedding (published: 200,064)")
    options.add_argument("--folder", type=Path, help="where to work; emptied first (default: a temporary folder)")
    options.add_argument("--memory", type=float, default=12.0, help="GiB that all processes together may hold")
    options.add_argument("--minutes", type=float, default=15.0, help="that it may take")
    options.add_argument("--cores", type=int, default=2, help="that it may use")
    options.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.make:
        make_checkpoint(chosen.make, chosen.layers, chosen.vocabulary)
        return 0
    folder = chosen.folder or Path(tempfile.mkdtemp(prefix="sft-full-size-"))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    watch = Watch()
    try:
        with running_hub(folder / "hub") as hub:
            whole_chain(folder, chosen, watch, hub)
    finally:
        failed = report(watch, chosen) if watch.peaks else 1
        if chosen.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
