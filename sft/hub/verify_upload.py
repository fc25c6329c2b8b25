"""Whether what lies on the Hub is what was pushed: downloaded into an empty cache, compared and run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from sft.hub.folder import list_files
from sft.hub.hub_errors import LOG_IN, explained
from sft.hub.reload import ReloadReport, check_reload
from sft.utils.errors import UserError
from sft.utils.files import scratch_folder, sha256_file


def verify_upload(
    folder: str | Path,
    repo_id: str,
    *,
    revision: str | None = None,
    endpoint: str | None = None,
    token: str | None = None,
    but: Sequence[str] = (),
) -> ReloadReport:
    """Download `repo_id` again; demand the same bytes as in `folder`, and the same logits in a clean process.

    Args:
        folder: the export folder that was pushed.
        repo_id: with its namespace; revision: branch or commit (default: main).
        endpoint, token: default: HF_ENDPOINT, and the token of HF_TOKEN or `hf auth login`.
        but: files that are the repository's own.

    Raises:
        UserError: when a file is missing or differs, or the model computes something else.
    """
    from huggingface_hub import get_token, snapshot_download
    from huggingface_hub.constants import ENDPOINT

    files = [file for file in list_files(Path(folder)) if file.path not in but]
    endpoint, found = endpoint or ENDPOINT, token or get_token()
    if not found:
        raise UserError(LOG_IN)
    # Beside the folder: a disk that held the export once has a better chance to hold it twice than /tmp.
    folder = Path(os.path.abspath(folder))
    with scratch_folder(folder) as scratch:
        _need_space(scratch, sum(file.size for file in files), repo_id)
        with explained(f"{repo_id} can't be downloaded again to check it", repo_id, endpoint, found):
            snapshot = Path(
                snapshot_download(
                    repo_id,
                    revision=revision,
                    endpoint=endpoint,
                    token=found,
                    cache_dir=scratch,
                    allow_patterns=[file.path for file in files],
                )
            )
        for file in files:
            path = snapshot / file.path
            if not path.exists():
                raise UserError(f"{repo_id} has no {file.path}; push again")
            if sha256_file(path) != file.sha256:
                raise UserError(f"{repo_id}/{file.path} is not what was pushed; push again")
        return check_reload(snapshot, folder)


def _need_space(scratch: Path, size: int, repo_id: str) -> None:
    free = shutil.disk_usage(scratch).free
    if free < size:
        raise UserError(
            f"checking {repo_id} needs {size / 1e9:.1f} GB beside the export, {free / 1e9:.1f} GB are free on "
            f"{os.fspath(scratch.parent)}; the push itself is complete"
        )
