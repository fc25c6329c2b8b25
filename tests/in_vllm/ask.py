"""Runs inside vLLM's environment, which knows nothing of this project but the plug-in: answers jobs of prompts.

    python ask.py JOBS ANSWERS

JOBS: a list of {"model", "options" (of vllm.LLM), "prompts" (a list of calls, each a list of prompts), "new"}. ANSWERS
gets {"rows", "crossed"} for each job: for each prompt {"ids", "logprobs", "cached"}, log-probabilities as our engine
tells them; and how many tokens went through the cross-decoder, where vLLM runs in this process.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

TOP = 3


def row(found: Any) -> dict[str, Any]:
    """A completion's tokens and log-probabilities, and how many tokens of its prompt were read before."""
    completion = found.outputs[0]
    logprobs = []
    for token, places in zip(completion.token_ids, completion.logprobs, strict=True):
        top = {str(other): value.logprob for other, value in places.items() if value.rank <= TOP}
        logprobs.append({"token": places[token].logprob, "top": top})
    return {"ids": list(completion.token_ids), "logprobs": logprobs, "cached": found.num_cached_tokens}


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Load the job's model and answer its calls one after another; a call's prompts are in flight together."""
    from vllm import LLM, SamplingParams

    crossed = counted()
    engine = LLM(job["model"], skip_tokenizer_init=True, **job["options"])
    params = SamplingParams(temperature=0.0, max_tokens=job["new"], ignore_eos=True, logprobs=TOP, detokenize=False)
    rows, begun = [], time.monotonic()
    crossed.clear()
    for prompts in job["prompts"]:
        found = engine.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        rows += [row(one) for one in found]
    print(f"answers took {time.monotonic() - begun:.1f} s")
    return {"rows": rows, "crossed": sum(crossed)}


def counted() -> list[int]:
    """Tokens of each pass through the cross-decoder from now on."""
    from sambay_vllm.model import Phi4FlashModel

    counts: list[int] = []
    own = Phi4FlashModel.cross

    def cross(self: Any, hidden: Any, memory: Any) -> Any:
        counts.append(hidden.shape[0])
        return own(self, hidden, memory)

    Phi4FlashModel.cross = cross
    return counts


if __name__ == "__main__":
    answers = [answer(job) for job in json.loads(Path(sys.argv[1]).read_text())]
    Path(sys.argv[2]).write_text(json.dumps(answers))
