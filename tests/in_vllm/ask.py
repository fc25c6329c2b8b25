"""Runs inside vLLM's environment, which knows nothing of this project but the plug-in: answers a job of prompts.

    python ask.py JOB ANSWERS

JOB: {"model", "options" (of vllm.LLM), "prompts", "new"}; ANSWERS gets a row for each prompt, as `models.answers` has
them.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

TOP = 3


def row(completion: Any) -> dict[str, Any]:
    """A completion's tokens and log-probabilities."""
    ids = list(completion.token_ids)
    logprobs = []
    for token, places in zip(ids, completion.logprobs or [], strict=False):
        top = {str(other): value.logprob for other, value in places.items() if (value.rank or 0) <= TOP}
        logprobs.append({"token": places[token].logprob, "top": top})
    return {"ids": ids, "logprobs": logprobs}


def main() -> None:
    """Load, answer everything at once, write."""
    from vllm import LLM, SamplingParams

    job = json.loads(Path(sys.argv[1]).read_text())
    engine = LLM(job["model"], **job["options"])
    params = SamplingParams(temperature=0.0, max_tokens=job["new"], ignore_eos=True, logprobs=TOP, detokenize=False)
    rows: list[dict[str, Any]] = []
    begun = time.monotonic()
    for prompts in job["prompts"]:  # one call after another; a call's prompts are all in flight together
        found = engine.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        rows += [{**row(one.outputs[0]), "cached": one.num_cached_tokens} for one in found]
    print(f"generation took {time.monotonic() - begun:.1f} s")
    Path(sys.argv[2]).write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
