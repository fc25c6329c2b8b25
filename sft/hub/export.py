"""Write the folder that goes to the Hub: it loads with torch and transformers alone, and says where it comes from.

A SambaY folder carries its own code (`trust_remote_code`): the model's files as they are, and the ops in plain torch.
Everything is written beside the target and renamed at the end, so a kill leaves either the old export or the new one.
"""

from __future__ import annotations

import ast
import gc
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sft.hub.card import licence_problems, licence_text, model_card
from sft.hub.flatten import ops_file
from sft.hub.folder import KIND, MANIFEST, describe_files, is_export
from sft.hub.merge import TOLERANCE, logits_of, merged_logits, stored_logits
from sft.hub.provenance import run_record, write_recipe
from sft.hub.reload import check_against, fixed_inputs
from sft.hub.results import results_of, write_results
from sft.hub.source import Source, open_source
from sft.models.merge import base_of
from sft.models.savable import check_savable
from sft.models.save import drop_absent_code, save_model
from sft.tokenizers.control import template_of
from sft.tokenizers.dates import reads_clock
from sft.utils.errors import UserError, disk_full
from sft.utils.files import atomic_folder, check_writable, read_json, recover_folder, write_json, write_text

AUTO_MAP = {
    "AutoConfig": "configuration_phi4flash.Phi4FlashConfig",
    "AutoModel": "modeling_phi4flash.Phi4FlashModel",
    "AutoModelForCausalLM": "modeling_phi4flash.Phi4FlashForCausalLM",
}
OPS_FILE = "ops_phi4flash.py"


def export(
    source: str | Path | tuple[Any, Any],
    out_dir: str | Path,
    *,
    merge_lora: bool = True,
    dtype: str | None = None,
    run_dir: str | Path | None = None,
    max_shard_size: str = "5GB",
    check: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Write a model as a Hugging Face folder.

    Weights of a folder stay in their mapped files: this takes the memory of the largest tensor, and that of one copy of
    what was written while it is checked.

    Args:
        source: a model or adapter folder (such as a stage's `final`), or (model, tokenizer).
        out_dir: the folder to write. One that `export` wrote before is replaced, any other is refused.
        merge_lora: merge adapters into the weights, and check the merge; False: write the adapter as it is.
        dtype: "float32" or "bfloat16": what weights are stored in. Default: the run's `model.dtype`; without a run, as
            they are (an adapter's: as its base is). A_log and the lambdas of a SambaY model are stored in float32,
            always, as in the published checkpoint.
        run_dir: the run that the card and the manifest tell of. Default: the one that `source` lies in.
        max_shard_size: largest weight file.
        check: load the result in a clean process and compare logits with the model's.
        progress: called with one line of text per step.

    Returns:
        out_dir.

    Raises:
        UserError: when the source can't be loaded, the target is something else's, the disk is full, a merge changes
            the logits, or the folder doesn't compute in a clean process what the model does.
    """
    out, say = Path(os.path.abspath(out_dir)), progress or (lambda line: None)
    _make_way(out, dtype)
    say(f"loading {source}" if isinstance(source, str | Path) else "exporting the model in memory")
    opened = open_source(source, Path(run_dir) if run_dir else None)
    opened.dtype = dtype or opened.dtype
    opened.merges = opened.is_adapter and merge_lora
    check_savable(opened.model, opened.tokenizer, say)
    size = _size_gb(opened)
    try:
        with atomic_folder(out) as temporary:
            facts = _write_checked(temporary, opened, max_shard_size, check, say)
            _describe(temporary, opened, facts, say)
    except BaseException as error:
        if disk_full(error):
            raise UserError(f"the disk of {out} is full; the export needs about {size:.1f} GB") from error
        raise
    return Path(out_dir)


def _write_checked(
    folder: Path, source: Source, max_shard_size: str, check: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    """Everything that loading needs; what the manifest and the card say of the model and of the checks.

    The model is let go of before the folder is loaded in another process: one copy at most is in memory.
    """
    # In float32 a layer at a time each sequence costs as much as a hundred: one has to do.
    lengths = (40,) if source.merges else (1, 9, 40)
    inputs = fixed_inputs(source.model.config.get_text_config().vocab_size, lengths=lengths)
    logits, merge, reload = None, None, None
    if source.merges:
        say("merging the adapter into the weights")
        logits, merge = merged_logits(source.model, inputs)
    if check and source.is_adapter and not source.merges:
        logits = logits_of(source.model, inputs)
    elif check and not (source.merges and source.dtype == "float32"):
        # As it is written: rounding to the type of the file would hide what loading it changes.
        logits = stored_logits(source.model, inputs, source.dtype, merged=source.merges)
    if logits is not None and not all(bool(rows.isfinite().all()) for rows in logits):
        raise UserError("the model's logits aren't finite: its weights are broken, and nothing was exported")
    say(f"writing the model in {source.dtype}")
    sums: dict[str, str] = {}
    facts = _facts(source, _write(folder, source, max_shard_size, sums))
    source.model = None
    gc.collect()
    if check and logits is not None:
        say("loading it in a clean process")
        reload = check_against(folder, logits, inputs, tolerance=TOLERANCE[source.dtype], sums=sums)
    return {**facts, "merge": merge and asdict(merge), "reload": reload and asdict(reload)}


def _write(folder: Path, source: Source, max_shard_size: str, sums: dict[str, str]) -> int:
    """Weights, configurations, code and tokenizer; the number of parameters. `sums`: see `save_model`."""
    if source.is_adapter and not source.merges:
        parameters = _write_adapter(folder, source)
    else:
        parameters = _write_model(folder, source, max_shard_size, sums)
    if source.tokenizer is not None:
        source.tokenizer.save_pretrained(folder)
        drop_absent_code(folder / "tokenizer_config.json")
        _name_tokenizer_class(folder / "tokenizer_config.json")
    return parameters


def _name_tokenizer_class(path: Path) -> None:
    """Call the tokenizer by the name that transformers 4 knows too; for transformers 5 it is the same class."""
    config = read_json(path) if path.is_file() else {}
    if config.get("tokenizer_class") == "TokenizersBackend":
        write_json(path, {**config, "tokenizer_class": "PreTrainedTokenizerFast"})


def _write_adapter(folder: Path, source: Source) -> int:
    """The adapter, with the name of a base model that can be loaded; the number of parameters of both."""
    if not source.base:
        raise UserError(
            "the adapter's base model was made in this run and has no name; export it merged (push.merge_lora: true)"
        )
    for config in source.model.peft_config.values():
        config.base_model_name_or_path = source.base
    source.model.save_pretrained(folder, safe_serialization=True)
    return sum(parameter.numel() for parameter in source.model.parameters())


def _describe(folder: Path, source: Source, facts: dict[str, Any], say: Callable[[str], None]) -> None:
    """Recipe, licence and card, then the manifest, which names every file."""
    record = run_record(source.run, source.stage)
    write_recipe(source.run, folder)
    write_text(folder / "LICENSE", licence_text(record, facts))
    write_text(folder / "README.md", model_card(record, facts))
    results = results_of(record)
    write_results(folder, results, source.run)
    told = {"run": record, "not_claimed": results.why_not, "files": describe_files(folder)}
    write_json(folder / MANIFEST, {"kind": KIND, **facts, **told})
    for suite, why in results.why_not.items():
        say(f"{suite} isn't claimed as a result on the Hub: {why}")
    for line in licence_problems(record, facts):
        say(f"licences: {line}")
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o644)  # safetensors writes files that only their owner can read


def _write_model(folder: Path, source: Source, max_shard_size: str, sums: dict[str, str]) -> int:
    """Weights, configurations and, for SambaY, the code; the number of parameters."""
    _set_end_tokens(source)
    parameters = save_model(folder, source.model, sums=sums, dtype=source.dtype, max_shard_size=max_shard_size)
    config = read_json(folder / "config.json")
    config["dtype"] = source.dtype
    for key in ("_name_or_path", "_attn_implementation", "attn_implementation", "torch_dtype"):
        config.pop(key, None)
    if config.get("model_type") == "phi4flash":
        config["auto_map"] = AUTO_MAP
        write_code(folder)
    write_json(folder / "config.json", config)
    return parameters


def write_code(folder: Path) -> None:
    """The files that make a SambaY folder load without this package: the model's own, and the ops in plain torch.

    Raises:
        ValueError: when a file needs more than the standard library, torch, transformers and its neighbours.
    """
    import sambay_kernels

    import sft.models.sambay

    package = Path(sft.models.sambay.__file__).parent
    texts = {OPS_FILE: ops_file(Path(sambay_kernels.__file__).parent)}
    queue = ["modeling_phi4flash.py", "configuration_phi4flash.py"]
    while queue:
        name = queue.pop()
        if name not in texts:
            texts[name] = (package / name).read_text(encoding="utf-8")
            queue += [f"{neighbour}.py" for neighbour in _relative_imports(texts[name])]
    for name, text in texts.items():
        _refuse_foreign_imports(name, text)
        write_text(folder / name, text)


def _relative_imports(text: str) -> list[str]:
    """Modules that a file imports from its own folder."""
    nodes = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom))
    return [node.module for node in nodes if node.level == 1 and node.module]


def _refuse_foreign_imports(name: str, text: str) -> None:
    """What a file imports when it is loaded has to be there everywhere; a try block or a function may ask for more."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.ImportFrom):
            modules = [] if node.level == 1 else [node.module or ""]
        else:
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for module in modules:
            top = module.split(".")[0]
            if top not in ("torch", "transformers") and top not in sys.stdlib_module_names:
                raise ValueError(f"{name}:{node.lineno}: {module} would be missing where the checkpoint is loaded")


def _set_end_tokens(source: Source) -> None:
    """A SambaY model stops at the end of its answer; other models keep the generation configuration they came with."""
    if source.tokenizer is None or source.model.config.model_type != "phi4flash":
        return
    from sft.models.end_tokens import end_token_ids

    config = base_of(source.model).generation_config
    config.eos_token_id = end_token_ids(source.tokenizer)
    config.bos_token_id, config.pad_token_id = source.tokenizer.bos_token_id, source.tokenizer.pad_token_id


def _facts(source: Source, parameters: int) -> dict[str, Any]:
    """What the manifest and the card say of the model itself."""
    import transformers

    config = source.model.config
    return {
        "model_type": config.model_type,
        "architecture": type(base_of(source.model) if source.merges else source.model).__name__,
        "dtype": source.dtype,
        "parameters": parameters,
        "layers": getattr(config, "num_hidden_layers", None),
        "hidden_size": getattr(config, "hidden_size", None),
        "vocab_size": config.get_text_config().vocab_size,
        "has_tokenizer": source.tokenizer is not None,
        "has_template": bool(getattr(source.tokenizer, "chat_template", None)),
        "writes_date": source.tokenizer is not None and reads_clock(template_of(source.tokenizer) or ""),
        "adapter_base": source.base if source.is_adapter and not source.merges else None,
        "transformers": transformers.__version__,
    }


def _make_way(out: Path, dtype: str | None) -> None:
    """Refuse a target that isn't ours to replace, and a type; put right what a kill may have left."""
    if dtype not in (None, "float32", "bfloat16"):
        raise UserError(f"export stores weights in float32 or bfloat16, not in {dtype}")
    if not out.name:
        raise UserError(f"{out} can't be an export folder")
    check_writable(out.parent, "choose another folder")
    recover_folder(out)
    if out.exists() and not is_export(out) and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and isn't an export of ours; choose another folder or remove it")


def _size_gb(source: Source) -> float:
    width = 4 if source.dtype == "float32" else 2
    return sum(p.numel() for p in source.model.parameters()) * width / 1e9
