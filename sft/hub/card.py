"""The model card: what the model is, how to run it, what it was trained on, what it scored, and what isn't known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from sft.hub.folder import RESULTS
from sft.hub.licences import contradictions
from sft.hub.results import Results, model_index, results_of
from sft.recipe.outcome_keys import handed_on
from sft.tokenizers.dates import DATE

JOB = (
    "hf jobs run --flavor a100-large --timeout 24h --secrets HF_TOKEN pytorch/pytorch:2.11.0-cuda12.8-cudnn9-devel \\\n"
    '  bash -c "pip install sambay-sft && sft eval {suites} --model THIS_REPOSITORY --trust_remote_code --json"'
)
BASE_LICENCES = {"microsoft/Phi-4-mini-flash-reasoning": "mit"}

CODE_LICENCE = """\
MIT License

Copyright (c) 2026 the sambay-sft authors

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""


SPACE = "https://huggingface.co/spaces/{}"


def model_card(record: dict[str, Any] | None, facts: dict[str, Any]) -> str:
    """README.md of an export: YAML metadata and the card.

    Args:
        record: what `sft.hub.provenance.run_record` found; None: a model outside a run. Missing parts are said to be.
        facts: what export knows of the model itself (see `sft.hub.export`).
    """
    record = record or {}
    parts = [
        f"---\n{yaml.safe_dump(_metadata(record, facts), sort_keys=False, allow_unicode=True)}---",
        f"# {record.get('name') or facts['architecture']}",
        _what(record, facts),
        "## How to use\n\n" + _usage(facts),
        "## Recipe\n\n" + _stages(record),
        "## Data\n\n" + _funnels(record),
        "## Evaluation\n\n" + _results(record),
        "## Limits\n\n" + _limits(record, facts),
        "## Made with\n\n" + _environment(record) + _metrics(record),
    ]
    return "\n\n".join(parts) + "\n"


def licence_text(record: dict[str, Any] | None, facts: dict[str, Any]) -> str:
    """LICENSE of an export: what covers the code, and what is known of the weights."""
    travelling = ("configuration", "contract", "layout", "modeling", "ops", "shared")
    code = travelling if facts["model_type"] == "phi4flash" else ()
    files = ", ".join(f"{name}_phi4flash.py" for name in code)
    base, kind = _base(record or {}, facts), _kind(record or {}, facts)
    told = {
        "hub": f"The weights derive from {base}, whose licence applies to them.",
        "folder": "The weights derive from a model in a local folder, whose licence applies to them.",
        "scratch": "The weights were trained from scratch; their owner decides on their licence.",
    }
    weights = told.get(kind or "", "What the weights derive from isn't recorded; their owner decides on their licence.")
    weights += " Licences of the training data, where known, stand in README.md."
    return f"{weights}\n\n" + (
        f"The code in this folder ({files}) is part of sambay-sft:\n\n{CODE_LICENCE}" if code else ""
    )


def _metadata(record: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    base = _base(record, facts)
    datasets = sorted(
        {s["name"] for stage in record.get("stages") or [] if stage["done"] for s in stage["sources"] if s["hub"]}
    )
    tags = ["text-generation", "sft", "reasoning", "sambay-sft"]
    tags += ["sambay", "phi4flash", "custom_code"] if facts["model_type"] == "phi4flash" else []
    # By these the Hub shows a Space of trackio's beside the model.
    spaces = record.get("spaces") or []
    tags += ["trackio", *(f"trackio:{SPACE.format(name)}" for name in spaces)] if spaces else []
    metadata: dict[str, Any] = {
        "license": BASE_LICENCES.get(base or ""),
        "base_model": base,
        "base_model_relation": ("adapter" if facts["adapter_base"] else "finetune") if base else None,
        "datasets": datasets or None,
        "library_name": "peft" if facts["adapter_base"] else "transformers",
        "pipeline_tag": "text-generation",
        "tags": [*tags, "lora"] if facts["adapter_base"] else tags,
    }
    metadata["model-index"] = model_index(record.get("name") or facts["architecture"], results_of(record))
    return {key: value for key, value in metadata.items() if value is not None}


def licence_problems(record: dict[str, Any] | None, facts: dict[str, Any]) -> list[str]:
    """What of the training data contradicts the licence that the card states, a sentence each."""
    found = record or {}
    sources = [source for stage in found.get("stages") or [] if stage["done"] for source in stage["sources"]]
    return contradictions(BASE_LICENCES.get(_base(found, facts) or ""), sources)


def _kind(record: dict[str, Any], facts: dict[str, Any]) -> str | None:
    """Where the weights began: `hub`, `folder`, `scratch`; None: unknown. An adapter's base is its beginning."""
    adapted = facts["adapter_base"]
    if adapted:
        return "folder" if adapted.startswith((".", "~", "/")) or adapted.count("/") > 1 else "hub"
    return (record.get("start") or {}).get("kind")


def _base(record: dict[str, Any], facts: dict[str, Any]) -> str | None:
    """The base model's Hub id; None for a model from scratch, or from a folder of a machine."""
    if _kind(record, facts) != "hub":
        return None
    name: str = facts["adapter_base"] or record["start"]["model_name_or_path"]
    return name


def _what(record: dict[str, Any], facts: dict[str, Any]) -> str:
    kind = "SambaY (Mamba-1, sliding-window and shared differential attention, gated memory units; arXiv 2507.06607)"
    kind = kind if facts["model_type"] == "phi4flash" else f"{facts['model_type']} ({facts['architecture']})"
    base = _base(record, facts)
    origins = {
        "hub": f"fine-tuned from [{base}](https://huggingface.co/{base})",
        "folder": "fine-tuned from a local checkpoint",
        "scratch": "trained from scratch",
    }
    origin = origins.get(_kind(record, facts) or "", "of an origin that this folder doesn't tell")
    stages = len(record.get("stages") or [])
    how = f", by supervised fine-tuning in {stages} stage{'s' if stages != 1 else ''} (no reinforcement learning)"
    lines = [record.get("description") or "", f"A {kind} language model {origin}{how if stages else ''}."]
    size = [f"{facts['parameters']:,} parameters", f"stored in {facts['dtype']}"]
    size += [f"{facts['layers']} layers"] if facts["layers"] else []
    size += [f"hidden size {facts['hidden_size']}"] if facts["hidden_size"] else []
    lines.append(", ".join([*size, f"vocabulary {facts['vocab_size']:,}"]) + ".")
    if facts["adapter_base"]:
        lines.append("This is an adapter: it needs its base model.")
    if facts["reload"]:
        lines.append(
            "Loaded in a clean process from these files, its logits differ from the trained model's by "
            f"{facts['reload']['error']:.1e} (relative, on random tokens)."
        )
    if facts["merge"]:
        lines.append(
            "LoRA adapters were merged into the weights; merging changed the logits by "
            f"{facts['merge']['error']:.1e} (relative, on random tokens)."
        )
    return "\n\n".join(line for line in lines if line)


def _usage(facts: dict[str, Any]) -> str:
    trust = ", trust_remote_code=True" if facts["model_type"] == "phi4flash" and not facts["adapter_base"] else ""
    no_code = trust.replace("True", "False")  # else it asks whether to run the model's code, which it doesn't need
    if facts["adapter_base"]:
        load = "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer\n"
        load += "import sft.models  # pip install sambay-sft\n" if facts["model_type"] == "phi4flash" else ""
        call = 'AutoPeftModelForCausalLM.from_pretrained(name, dtype="auto")'
    else:
        load = "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        call = f'AutoModelForCausalLM.from_pretrained(name, dtype="auto"{trust})'
    prompt = (
        'messages = [{"role": "user", "content": "What is 17 * 23 + 5?"}]\n'
        "inputs = tokenizer.apply_chat_template("
        'messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)\n'
        if facts["has_template"]
        else 'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
    )
    code = (
        f"{load}\n"
        'name = "..."  # this repository, or a folder with its files\n'
        f"tokenizer = AutoTokenizer.from_pretrained(name{no_code})\nmodel = {call}\n{prompt}"
        "output = model.generate(**inputs, max_new_tokens=2048)\n"
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:]))'
    )
    text = f"```python\n{code}\n```"
    if facts.get("writes_date"):
        text += (
            f"\n\nThe chat template writes the day's date; in training and evaluation it always was {DATE:%d %b %Y}."
        )
    if facts["model_type"] == "phi4flash" and not facts["adapter_base"]:
        text += (
            f"\n\nIt needs torch and transformers 5 (written with {facts['transformers']}), and runs on a CPU too. "
            "Where sambay-sft is installed, its faster kernels are used."
        )
        text += (
            "\n\nvLLM 0.32 or newer serves it, with a plug-in:\n\n```bash\npip install vllm sambay-vllm\n"
            "vllm serve ...  # this repository, or a folder with its files\n```"
        )
    return text


def _stages(record: dict[str, Any]) -> str:
    stages = record.get("stages") or []
    if not stages:
        return "Not recorded."
    head = ["stage", "data", "rows", "tokens", "trained tokens", "length", "learning rate", "epochs", "steps", "loss"]
    rows = []
    for stage in stages:
        data, train = stage["data"], stage["train"]
        rows.append(
            [
                stage["name"] + ("" if stage["done"] else " (not trained)"),
                ", ".join(source["name"] for source in stage["sources"]),
                _number(data.get("documents", data.get("rows"))),
                _number(data.get("tokens")),
                _number(data.get("supervised_tokens")),
                _number(train.get("max_length")) + (" packed" if train.get("packing") else ""),
                f"{train['learning_rate']:g}" if "learning_rate" in train else "-",
                _number(stage["epochs"]),
                _number(stage["steps"]),
                _number(stage["final_loss"]),
            ]
        )
    note = "The loss is on the assistant's tokens only. The whole recipe is in `recipe.yaml`."
    told = [(stage["name"], handed_on(stage)) for stage in stages]
    handed = [f"Stage {name} hands on {what}, not the weights of its last step." for name, what in told if what]
    held = [_held_out(stage["name"], stage["validation"]) for stage in stages if stage.get("validation")]
    return "\n\n".join([_table(head, rows), f"{note} Seed: {record.get('seed')}.", *handed, *held])


def _held_out(stage: str, held: dict[str, Any]) -> str:
    """The loss of rows that a stage didn't train on."""
    return (
        f"Loss of {_number(held['documents'])} rows that stage {stage} held out ({_number(held['supervised_tokens'])} "
        f"tokens), before and after it: {held['loss_at_start']:.4f}, {held['loss_at_end']:.4f}."
    )


def _funnels(record: dict[str, Any]) -> str:
    """Rows in, rows kept, rows dropped and why, for each stage."""
    stages = [stage for stage in record.get("stages") or [] if stage["data"].get("funnel")]
    if not stages:
        return "Not recorded."
    rows = []
    for stage in stages:
        funnel = stage["data"]["funnel"]
        dropped = ", ".join(f"{reason}: {_number(count)}" for reason, count in (funnel.get("dropped") or {}).items())
        if funnel.get("bad"):
            dropped += " (bad: " + ", ".join(f"{why} {_number(n)}" for why, n in funnel["bad"].items()) + ")"
        cut = _number(funnel.get("truncated", 0))
        taken = _number(funnel.get("rows"))
        if funnel.get("made"):
            taken += f" (made into {_number(funnel['rows'] + funnel['made'])} by steps)"
        held = _number(funnel.get("held_out", 0))
        rows.append([stage["name"], taken, _number(funnel.get("kept")), held, dropped or "none", cut])
    text = _table(["stage", "rows in", "kept", "held out", "dropped", "truncated"], rows)
    licences = sorted({(s["name"], s["license"] or "not stated") for st in record["stages"] for s in st["sources"]})
    return text + "\n\nLicences: " + "; ".join(f"{name}: {licence}" for name, licence in licences) + "."


def _results(record: dict[str, Any]) -> str:
    results = record.get("evaluations") or []
    if not results:
        return "Not evaluated."
    rows = []
    for result in results:
        low, high = (result.get("interval") or [None, None])[:2]
        interval = f"{100 * low:.1f} to {100 * high:.1f}" if low is not None and high is not None else "-"
        settings = result.get("settings") or {}
        drawn = f"temperature {settings['temperature']:g}" if settings.get("temperature") else "greedy"
        rows.append(
            [
                "before training" if result["point"] == "start" else f"after {result['point']}",
                str(result.get("suite")),
                f"{100 * result['pass_at_1']:.1f}" if result.get("pass_at_1") is not None else "-",
                interval,
                _number(result.get("problems")),
                _number(result.get("samples")),
                f"{drawn}, up to {_number(settings.get('max_new_tokens'))} tokens",
            ]
        )
    head = ["point", "suite", "pass@1 (%)", "95% interval", "problems", "samples", "decoding"]
    note = "pass@1: share of answers whose final answer is found to be the right one; undecided and cut-off answers "
    note += "count as wrong."
    return "\n\n".join([_table(head, rows), note, *_standing(results_of(record))])


def _standing(results: Results) -> Iterator[str]:
    """Which results are claimed, which aren't and why, and how they are come by again."""
    if results.claimed:
        yield f"Claimed in `{RESULTS}`: {', '.join(results.claimed)}, asked as the benchmark's protocol says."
        suites = " ".join(f"--suite {suite}" for suite in results.claimed)
        yield f"To repeat that on a GPU of the Hub's:\n\n```\n{JOB.format(suites=suites)}\n```"
    if results.why_not:
        yield "Not claimed: " + "; ".join(f"{suite}, since {why}" for suite, why in results.why_not.items()) + "."


def _limits(record: dict[str, Any], facts: dict[str, Any]) -> str:
    lines = [
        "- What the evaluation above doesn't ask for, other languages among it, was not measured.",
        "- Its reasoning can be wrong while it sounds right: check answers that matter.",
        "- Its safety was not measured.",
    ]
    if not record.get("evaluations"):
        lines.append("- Nothing about its quality was measured.")
    lengths = [stage["data"].get("max_document_length") for stage in record.get("stages") or []]
    longest = max((length for length in lengths if length), default=None)
    if longest:
        lines.append(f"- The longest training document had {_number(longest)} tokens; longer ones are untested.")
    if facts["model_type"] == "phi4flash":
        lines.append("- Assisted (speculative) decoding doesn't work: a recurrent state can't be taken back.")
    lines += [f"- {line}" for line in licence_problems(record, facts)]
    if _base(record, facts) not in BASE_LICENCES:
        lines.append("- No licence of the weights is stated: state one before publishing.")
    return "\n".join(lines)


def _environment(record: dict[str, Any]) -> str:
    environment = record.get("environment") or {}
    packages = environment.get("packages") or {}
    if not packages:
        return "Not recorded."
    git = environment.get("git") or {}
    commit = (
        f" at commit {git['commit'][:12]}" + (" with changes" if git.get("dirty") else "") if git.get("commit") else ""
    )
    text = ", ".join(f"{name} {version}" for name, version in packages.items())
    where = ", ".join(str(environment[key]) for key in ("device", "platform") if environment.get(key))
    return f"{text}; Python {environment.get('python')}{commit}." + (f" {where}." if where else "")


def _metrics(record: dict[str, Any]) -> str:
    links = [f"[{name}]({SPACE.format(name)})" for name in record.get("spaces") or []]
    return f"\n\nTraining metrics: {', '.join(links)}." if links else ""


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _number(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if value == int(value) and abs(value) < 1e15 else f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
