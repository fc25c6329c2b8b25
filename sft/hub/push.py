"""Push an export folder to the Hugging Face Hub, so that the repository is never half a model.

Large files go up first, one after the other; nothing shows in the repository until one commit names all of them. A push
that is stopped (error, Ctrl-C, kill) leaves the repository as it was, and the same command goes on from what is stored
already. A repository is made private; it is published only at the end, when everything is there and was checked.
"""

from __future__ import annotations

import fnmatch
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.hub.folder import EDITABLE, MANIFEST, LocalFile, is_export, list_files, read_manifest
from sft.hub.hub_errors import LOG_IN, OFFLINE, explained
from sft.utils.errors import UserError
from sft.utils.files import read_json, sha256_file, write_json
from sft.utils.secrets import scrub, to_look_for, without_paths

if TYPE_CHECKING:
    from huggingface_hub import HfApi

THE_HUB = "https://huggingface.co"

SEEN = "{} is public, so everybody would see this push; choose another repository, make it private, or say --public"

# Files of this size, and all weights, are sent by themselves before the commit; the commit carries the small ones.
LARGE = 1_000_000
WEIGHTS = (".safetensors", ".bin")

# In an export folder, beside what is pushed: the cards written by hand that were, by repository.
PUSHED = ".pushed.json"

# Files that decide what a repository loads as: a stale one beside a new model would be loaded with it.
LOADED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*",
    "adapter_config.json",
    "*.py",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "chat_template*",
    "added_tokens.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True)
class PushResult:
    """What a push did.

    Attributes:
        repo_id: with its namespace.
        url: of the repository's page.
        commit: the commit that holds the folder.
        uploaded: files that this call sent; unchanged: files that were there already; deleted: stale ones removed.
        kept: the card or licence that was edited on the Hub, and left as it is there.
        public: whether everybody can see the repository.
        verified: whether it was downloaded again, compared and run.
    """

    repo_id: str
    url: str
    commit: str
    uploaded: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    public: bool = False
    verified: bool = False


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    public: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    replace_card: bool = False,
    verify: bool = True,
    endpoint: str | None = None,
    token: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> PushResult:
    """Make the repository hold what `folder` holds, and check it by loading it from there.

    Args:
        folder: what `sft.hub.export.export` wrote.
        repo_id: "namespace/name", or "name" in the token's own namespace.
        private: keep the repository private; `public=True` (or `private=False`) publishes it once all is there.
        revision: branch to push to (made where it is missing); default "main".
        commit_message: of the one commit.
        replace_card: also a card or licence that was edited on the Hub, which else stays.
        verify: download into an empty cache, compare every file, and compare logits in a clean process.
        endpoint, token: default: HF_ENDPOINT, and the token of HF_TOKEN or `hf auth login`.
        progress: called with one line of text per step.

    Raises:
        UserError: one sentence that says what failed, what is stored and what is missing. The same call goes on.
    """
    folder = Path(folder)
    say = progress or (lambda line: None)
    files = list_files(folder)
    _refuse_unportable(folder)
    hub = _Hub(repo_id, endpoint=endpoint, token=token, revision=revision)
    publish = public or not private
    hub.prepare(publish=publish)
    message = scrub(without_paths(commit_message or f"Upload {folder.name} with sft push"), *to_look_for(), hub.token)
    result = _transfer(hub, folder, files, message, replace_card, say)
    if verify:
        from sft.hub.verify_upload import verify_upload

        say(f"downloading {hub.repo_id} again to compare it")
        verify_upload(
            folder, hub.repo_id, revision=result.commit, endpoint=hub.endpoint, token=hub.token, but=result.kept
        )
    if publish:
        hub.publish()
    return replace(result, public=publish, verified=verify)


def check_destination(repo_id: str) -> None:
    """Raise UserError for what would keep a push to `repo_id` from beginning and is known without asking the Hub: an
    impossible name, a missing token, offline mode."""
    _Hub(repo_id, endpoint=None, token=None, revision=None)


def check_unseen(repo_id: str, seconds: float) -> None:
    """Raise UserError where everybody sees the repository `repo_id` already.

    One that isn't there, or can't be asked for within `seconds`, is the push's own business.
    """
    hub = _Hub(repo_id, endpoint=None, token=None, revision=None)
    try:
        info = hub.api.model_info(repo_id, timeout=seconds)
    except Exception:
        return
    if not info.private:
        raise UserError(SEEN.format(repo_id))


def _transfer(
    hub: _Hub, folder: Path, files: Sequence[LocalFile], message: str, replace_card: bool, say: Callable[[str], None]
) -> PushResult:
    """Send what the repository hasn't got, in one commit."""
    with hub.storage():
        remote = hub.tree()
        kept = [] if replace_card else hub.edited(remote, folder, files)
        for path in kept:
            say(f"{path} of {hub.repo_id} was edited there and is kept; --replace_card puts the export's in its place")
        files = [file for file in files if file.path not in kept]
        todo = [file for file in files if not _same(file, remote.get(file.path))]
        stale = hub.stale(remote, files)
        say(_plan_line(hub, files, todo))
        commit = hub.head
        if todo or stale:
            commit = _Upload(hub, folder, todo, stale, say).run(message)
            hub.check_tree(files, commit)
    _note_own_cards(folder, hub.repo_id, files)
    return PushResult(
        repo_id=hub.repo_id,
        url=f"{hub.endpoint}/{hub.repo_id}",
        commit=commit,
        uploaded=[file.path for file in todo],
        unchanged=[file.path for file in files if file not in todo],
        deleted=stale,
        kept=kept,
    )


def _note_own_cards(folder: Path, repo_id: str, files: Sequence[LocalFile]) -> None:
    """Remember a card written by hand that was pushed, so that the next push doesn't take it for the Hub's own."""
    promised = read_manifest(folder)["files"]
    cards = {file.path: file.sha256 for file in files if file.path in EDITABLE}
    if any(sha256 != promised.get(path, {}).get("sha256") for path, sha256 in cards.items()):
        write_json(folder / PUSHED, {**_own_cards(folder), repo_id: cards})


def _own_cards(folder: Path) -> dict[str, dict[str, str]]:
    return read_json(folder / PUSHED) if (folder / PUSHED).is_file() else {}


class _Hub:
    """One repository on one Hub, with one token."""

    def __init__(self, repo_id: str, *, endpoint: str | None, token: str | None, revision: str | None) -> None:
        from huggingface_hub import HfApi, constants, get_token

        self.endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self.repo_id = _check_repo_id(repo_id)
        self.branch = revision or "main"
        self.head = ""
        with self.explained("the token can't be read"):
            found = token or get_token()
        if not found:
            raise UserError(LOG_IN)
        if not re.fullmatch(r"[!-~]+", found):
            # Such a header would be refused with an error that quotes it.
            raise UserError("the Hugging Face token holds spaces or characters that no token has; copy it again")
        if constants.HF_HUB_OFFLINE:
            raise UserError(f"nothing can be pushed: {OFFLINE}")
        self.token = found
        self.api: HfApi = HfApi(endpoint=self.endpoint, token=found)

    def explained(self, doing: str) -> Any:
        """Errors of the Hub inside become one sentence."""
        return explained(doing, self.repo_id, self.endpoint, getattr(self, "token", None))

    def prepare(self, *, publish: bool) -> None:
        """Find the repository and the branch or make them; refuse one that everybody sees unless that is wanted."""
        from huggingface_hub.errors import RepositoryNotFoundError

        with self.explained("push stopped before anything was sent"):
            if "/" not in self.repo_id:
                self.repo_id = f"{self.api.whoami()['name']}/{self.repo_id}"
            try:
                info = self.api.model_info(self.repo_id)
            except RepositoryNotFoundError:
                self.api.create_repo(self.repo_id, private=True, exist_ok=True)
                info = self.api.model_info(self.repo_id)
            if not info.private and not publish:
                raise UserError(SEEN.format(self.repo_id))
            if self.branch != "main":
                self.api.create_branch(self.repo_id, branch=self.branch, exist_ok=True)
            self.head = self.api.model_info(self.repo_id, revision=self.branch).sha or ""

    def tree(self) -> dict[str, Any]:
        """Path -> what the branch holds there."""
        from huggingface_hub.hf_api import RepoFile

        with self.explained(f"the files of {self.repo_id} can't be listed"):
            entries = self.api.list_repo_tree(self.repo_id, recursive=True, revision=self.head)
            return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def stale(self, remote: dict[str, Any], files: Sequence[LocalFile]) -> list[str]:
        """Files in the repository that would be loaded along with the new model, and have to go.

        Raises:
            UserError: when the repository holds a model that `sft` didn't push.
        """
        model_files = [path for path in remote if any(fnmatch.fnmatch(path, pattern) for pattern in LOADED)]
        if model_files and self._manifest(remote) is None:
            raise UserError(
                f"{self.repo_id} already holds a model that sft didn't push ({', '.join(sorted(model_files)[:3])}); "
                "choose another repository, or delete those files first"
            )
        local = {file.path for file in files}
        return sorted(path for path in model_files if path not in local)

    def edited(self, remote: dict[str, Any], folder: Path, files: Sequence[LocalFile]) -> list[str]:
        """The card and licence, where the repository holds neither these nor those that were pushed before."""
        cards = [file for file in files if file.path in EDITABLE and file.path in remote]
        differ = [file for file in cards if not _same(file, remote[file.path])]
        promised = (self._manifest(remote) or {}).get("files", {}) if differ else {}
        own = _own_cards(folder).get(self.repo_id, {})
        found = []
        for file in differ:
            sha256 = self._download(file.path, sha256_file)
            if sha256 not in (promised.get(file.path, {}).get("sha256"), own.get(file.path)):
                found.append(file.path)
        return found

    def _manifest(self, remote: dict[str, Any]) -> dict[str, Any] | None:
        """The manifest of the export that the repository holds; None where it holds none of ours."""
        return self._download(MANIFEST, _export_manifest) if MANIFEST in remote else None

    def _download(self, name: str, read: Callable[[Path], Any]) -> Any:
        with tempfile.TemporaryDirectory() as cache, self.explained(f"{self.repo_id}/{name} can't be read"):
            return read(Path(self.api.hf_hub_download(self.repo_id, name, revision=self.head, cache_dir=cache)))

    def check_tree(self, files: Sequence[LocalFile], commit: str) -> None:
        """Demand that `commit` holds every file; the Hub drops files that the repository's .gitignore names.

        Raises:
            UserError: naming the files that are missing or differ.
        """
        self.head = commit
        remote = self.tree()
        bad = [file.path for file in files if not _same(file, remote.get(file.path))]
        if bad:
            raise UserError(
                f"{self.repo_id} took the commit but {', '.join(bad)} is missing there or differs; "
                "look for a .gitignore in the repository, then push again"
            )

    def publish(self) -> None:
        """Let everybody see the repository."""
        with self.explained(f"everything is in {self.repo_id}, but it could not be made public"):
            if self.api.model_info(self.repo_id).private:
                self.api.update_repo_settings(self.repo_id, private=False)

    @contextmanager
    def storage(self) -> Iterator[None]:
        """Use plain LFS instead of Xet where this Hub has no Xet.

        `huggingface_hub` uploads through Xet wherever `hf_xet` is installed, and fails on mirrors and test servers that
        don't know its token call. The Hub itself always has it, so only another endpoint is asked.
        """
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers, get_session

        before = constants.HF_HUB_DISABLE_XET
        if not before and self.endpoint != THE_HUB:
            url = f"{self.endpoint}/api/models/{self.repo_id}/xet-write-token/main"
            with self.explained("push stopped before anything was sent"):
                answer = get_session().get(url, headers=build_hf_headers(token=self.token))
            constants.HF_HUB_DISABLE_XET = answer.status_code != 200
        try:
            yield
        finally:
            constants.HF_HUB_DISABLE_XET = before


class _Upload:
    """The files that are missing, sent and committed; knows at any moment which are stored."""

    def __init__(
        self, hub: _Hub, folder: Path, todo: Sequence[LocalFile], stale: Sequence[str], say: Callable[[str], None]
    ) -> None:
        self.hub, self.folder, self.stale, self.say = hub, folder, stale, say
        self.todo = sorted(todo, key=lambda file: (not _is_large(file), file.path))
        self.stored: list[str] = []

    def run(self, message: str) -> str:
        """Store every large file, then commit everything at once; the commit's id."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        additions = []
        for file in self.todo:
            addition = CommitOperationAdd(file.path, str(self.folder / file.path))
            if _is_large(file):
                self.say(f"uploading {file.path} ({_size(file.size)})")
                with self._explained(f"while uploading {file.path}"):
                    self.hub.api.preupload_lfs_files(self.hub.repo_id, [addition], revision=self.hub.branch)
                self.stored.append(file.path)
            additions.append(addition)
        deletions = [CommitOperationDelete(path) for path in self.stale]
        self.say(f"committing {len(additions)} files to {self.hub.repo_id}")
        with self._explained("while committing"):
            info = self.hub.api.create_commit(
                self.hub.repo_id,
                [*additions, *deletions],
                commit_message=message,
                revision=self.hub.branch,
                parent_commit=self.hub.head or None,
            )
        return info.oid

    @contextmanager
    def _explained(self, moment: str) -> Iterator[None]:
        """Say what is stored, what is missing and how to go on."""
        try:
            with self.hub.explained(f"push to {self.hub.repo_id} stopped {moment}"):
                yield
        except UserError as error:
            missing = [file.path for file in self.todo if file.path not in self.stored]
            stored = f"stored so far: {', '.join(self.stored)}; " if self.stored else ""
            text = (
                f"{error}. The repository is unchanged; {stored}still missing: {', '.join(missing)}. "
                "The same command goes on from here"
            )
            raise UserError(scrub(text, self.hub.token)) from error.__cause__


def _is_large(file: LocalFile) -> bool:
    return file.path.endswith(WEIGHTS) or file.size >= LARGE


def _export_manifest(path: Path) -> dict[str, Any] | None:
    return read_manifest(path.parent) if is_export(path.parent) else None


def _same(file: LocalFile, remote: Any) -> bool:
    """Whether the repository holds this very content: by SHA-256 for large files, by git's SHA-1 for small ones."""
    if remote is None:
        return False
    return remote.lfs.sha256 == file.sha256 if remote.lfs else remote.blob_id == file.blob()


def _check_repo_id(repo_id: str) -> str:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"{repo_id!r} is no repository name like my-name/my-model: {error}") from None
    if not re.search(r"[A-Za-z0-9]", repo_id):
        raise UserError(f"{repo_id!r} is no repository name like my-name/my-model")
    return repo_id


def _refuse_unportable(folder: Path) -> None:
    base = read_manifest(folder).get("adapter_base")
    if base and (base.startswith(("/", ".", "~")) or base.count("/") > 1 or Path(base).is_dir()):
        raise UserError(
            f"{folder} is an adapter on a model folder of this machine ({base}), which nobody else can load; "
            "export with merged weights (push.merge_lora: true)"
        )


def _plan_line(hub: _Hub, files: Sequence[LocalFile], todo: Sequence[LocalFile]) -> str:
    there = len(files) - len(todo)
    size = _size(sum(file.size for file in todo))
    return f"{hub.repo_id}: {there} of {len(files)} files are there already, {len(todo)} ({size}) to send"


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
