"""Runs inside vLLM's environment: loads a folder with the options of vllm.LLM given as JSON, which has to fail.

    python load.py FOLDER OPTIONS
"""

from __future__ import annotations

import json
import sys

if __name__ == "__main__":
    from vllm import LLM

    LLM(sys.argv[1], skip_tokenizer_init=True, **{"dtype": "float32", "max_model_len": 256, **json.loads(sys.argv[2])})
