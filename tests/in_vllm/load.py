"""Runs inside vLLM's environment: tries to load folders, and tells what is said when they can't be.

    python load.py CASES SAID

CASES: a list of [folder, options of vllm.LLM]; SAID gets the error of each, null where it loads.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def said(folder: str, options: dict[str, Any]) -> str | None:
    """The error of one case, with what it came from."""
    from vllm import LLM

    try:
        LLM(folder, skip_tokenizer_init=True, **{"dtype": "float32", "max_model_len": 256, **options})
    except Exception as error:  # whatever vLLM makes of it: the sentence is looked for in its text
        return str(error)
    return None


if __name__ == "__main__":
    cases = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([said(*case) for case in cases]))
