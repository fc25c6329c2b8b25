"""Load model folders the way a stranger would, and write down what they compute.

Run as a program of its own (`python -P clean_load.py job.json`): it imports only the standard library, torch and
transformers, and hides this project and every optional package from all that it loads, so that a folder which works
here works where they are not installed. The job file holds:

    folders         list of model folders
    inputs          list of token id lists
    new_tokens      how many tokens to generate after each input
    adapters        true: the folders hold adapters; `peft` and this project may be imported
    out             where to write {folder: {"logits": [Tensor (T, V)], "generated": [list of ids], "dtypes": {...},
                    "sums": {name of a tensor: its type, shape and SHA-256}}}
"""

import gc
import hashlib
import json
import sys
from typing import Any

# This project, and what transformers or a model file would use if it found it.
HIDDEN = (
    "sft",
    "sambay_kernels",
    "accelerate",
    "causal_conv1d",
    "datasets",
    "deepspeed",
    "flash_attn",
    "mamba_ssm",
    "peft",
    "trl",
)


class Hiding:
    """A finder of modules that doesn't find hidden packages: they look as if they weren't installed."""

    def __init__(self, finder: Any) -> None:
        self.finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname.split(".")[0] in HIDDEN:
            return None
        return self.finder.find_spec(fullname, path, target)


def hide() -> None:
    """Hide the packages of HIDDEN from every import from now on."""
    sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]


def load(folder: str, adapters: bool) -> Any:
    """The model of `folder`, in evaluation mode, in the dtypes of its files.

    Weights are copied to memory of the allocator's own: where they lie in a file shifts their alignment, on which the
    last bits of a matrix product depend.
    """
    model = from_folder(folder, adapters).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def from_folder(folder: str, adapters: bool) -> Any:
    """What transformers (or peft) makes of `folder`."""
    from transformers import AutoModelForCausalLM

    if not adapters:
        return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
    from peft import AutoPeftModelForCausalLM

    import sft.models  # noqa: F401  (registers phi4flash)

    return AutoPeftModelForCausalLM.from_pretrained(folder, dtype="auto")


def compute(model: Any, inputs: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """Logits of every input and what the model says after it (greedy)."""
    import torch

    logits, generated = [], []
    with torch.no_grad():
        for ids in inputs:
            row = torch.tensor([ids])
            logits.append(model(input_ids=row, use_cache=False).logits[0].clone())
            if new_tokens:
                output = model.generate(
                    input_ids=row,
                    attention_mask=torch.ones_like(row),
                    max_new_tokens=new_tokens,
                    min_new_tokens=new_tokens,
                    do_sample=False,
                )
                generated.append(output[0, len(ids) :].tolist())
    tensors = model.state_dict()
    dtypes = {name: str(tensor.dtype) for name, tensor in tensors.items()}
    sums = {name: tensor_sum(tensor) for name, tensor in tensors.items()}
    return {"logits": logits, "generated": generated, "dtypes": dtypes, "sums": sums}


def tensor_sum(tensor: Any) -> str:
    """As `sft.models.save.tensor_sum`, which can't be imported here."""
    import torch

    values = hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()
    return f"{tensor.dtype} {list(tensor.shape)} {values}"


def main() -> None:
    """Do the job that the first argument names."""
    with open(sys.argv[1], encoding="utf-8") as handle:
        job = json.load(handle)
    if not job["adapters"]:
        hide()
    import torch

    results = {}
    for folder in job["folders"]:
        model = load(folder, job["adapters"])
        results[folder] = compute(model, job["inputs"], job["new_tokens"])
        del model
        gc.collect()
    torch.save(results, job["out"])
    if not job["adapters"]:
        loaded = sorted(name for name in sys.modules if name.split(".")[0] in HIDDEN)
        if loaded:
            sys.exit(f"these were to stay away but were loaded: {loaded}")


if __name__ == "__main__":
    main()
