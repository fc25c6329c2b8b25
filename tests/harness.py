"""lm-evaluation-harness on an export, in an environment of its own: `lm_eval --model hf`, as a stranger calls it.

    python tests/harness.py [--model FOLDER] [--fresh]

A small random model is exported (or FOLDER, an export), the harness generates and scores with it in an environment that
has transformers and not this project, and what it finds is compared with the engine: answers letter for letter, and
log-likelihoods to 1e-4. The environment is kept in .versions/ for the next run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".versions" / "harness"
INSTALL_MINUTES, RUN_MINUTES = 20, 10
NEW, PROBLEMS = 40, 12
ANSWERS = """
task: answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{completion}}}}"
generation_kwargs: {{until: ["<never>"], max_gen_toks: {new}, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
LIKELIHOODS = """
task: likelihoods
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: choices
doc_to_target: 0
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def build(fresh: bool) -> None:
    """The environment: the harness, and the pinned transformers that export promises to work with."""
    if fresh:
        shutil.rmtree(FOLDER, ignore_errors=True)
    if (FOLDER / "made").is_file():
        return
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(FOLDER)], check=True, timeout=120)
    pip = [str(FOLDER / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += ["-c", str(ROOT / "constraints.txt"), "lm_eval", "torch", "transformers", "accelerate"]
    subprocess.run(pip, check=True, timeout=60 * INSTALL_MINUTES)
    (FOLDER / "made").touch()


def exported(folder: Path) -> Path:
    """A small random SambaY with the tiny tokenizer, exported."""
    import torch

    from sft.hub.export import export
    from sft.models import Phi4FlashConfig, Phi4FlashForCausalLM
    from sft.tokenizers.tiny import build_tokenizer

    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    model = Phi4FlashForCausalLM(
        Phi4FlashConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=8, sliding_window=16,
            num_attention_heads=8, num_key_value_heads=4, pad_token_id=end, bos_token_id=end, eos_token_id=end,
        )
    )  # fmt: skip
    for parameter in model.parameters():  # far from uniform, so that no choice is a near one
        parameter.data.mul_(3.0)
    return export((model.eval(), tokenizer), folder / "model", check=False)


def asked(model_folder: Path) -> list[dict[str, Any]]:
    """Prompts, the engine's greedy answers with their log-likelihoods, and other texts beside them."""
    from transformers import AutoTokenizer

    from sft.generate import Engine, SamplingParams
    from sft.models import Phi4FlashForCausalLM

    model = Phi4FlashForCausalLM.from_pretrained(model_folder).float().eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    prompts = [
        f"Start with {7 * i + 11}." + "".join(f"\n ({j + 1}) + {j}" for j in range(i % 5)) for i in range(PROBLEMS)
    ]
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    engine = Engine(model, tokenizer, batch_size=5)
    found = engine.generate(ids, SamplingParams(max_new_tokens=NEW))
    rows = []
    for prompt, one in zip(prompts, found, strict=True):
        text = tokenizer.decode(one.ids, skip_special_tokens=True)
        texts = [text, text[::-1]]
        rows.append({"prompt": prompt, "completion": text, "choices": texts})
        rows[-1]["totals"] = [log_likelihood(model, tokenizer, prompt, other) for other in texts]
    return rows


def log_likelihood(model: Any, tokenizer: Any, prompt: str, text: str) -> float:
    """Of a text behind a prompt, cut into tokens as the harness does it."""
    import torch

    begin = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    ids = torch.tensor([tokenizer(prompt + text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        logs = model(input_ids=ids).logits[0].double().log_softmax(-1)
    return float(logs[begin - 1 : -1].gather(1, ids[0, begin:, None]).sum())


def harness(model: Path, folder: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What lm_eval makes of the rows: by task its results, and its samples."""
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("answers", ANSWERS), ("likelihoods", LIKELIHOODS)):
        (folder / f"{name}.yaml").write_text(text.format(data=data, new=NEW))
    command = [str(FOLDER / "bin/python"), "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={model},trust_remote_code=True,dtype=float32", "--batch_size", "4"]
    command += ["--include_path", str(folder), "--tasks", "answers,likelihoods", "--output_path", str(folder / "out")]
    command += ["--log_samples"]
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    settings = {key: value for key, value in settings.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command, env=settings, cwd=folder, capture_output=True, text=True, timeout=60 * RUN_MINUTES, check=False
    )
    if done.returncode:
        raise SystemExit(f"lm_eval failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    results = json.loads(next((folder / "out").rglob("results_*.json")).read_text())["results"]
    samples = next((folder / "out").rglob("samples_likelihoods_*.jsonl")).read_text().splitlines()
    return {"results": results, "likelihoods": [json.loads(line) for line in samples]}


def check(rows: list[dict[str, Any]], found: dict[str, Any]) -> None:
    """Compare; a difference is an AssertionError."""
    assert found["results"]["answers"]["exact_match,none"] == 1.0, found["results"]
    for sample in found["likelihoods"]:
        for told, want in zip(sample["filtered_resps"], rows[sample["doc_id"]]["totals"], strict=True):
            assert abs(float(told[0]) - want) < 1e-4 * abs(want), (told, want)
    print(f"{len(rows)} answers equal, {2 * len(rows)} log-likelihoods within 1e-4")


def main() -> int:
    """Build, export, run, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="an export to check instead")
    parser.add_argument("--fresh", action="store_true", help="make the environment anew")
    options = parser.parse_args()
    build(options.fresh)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = options.model or exported(folder)
        rows = asked(model)
        check(rows, harness(model.resolve(), folder, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
