"""What may not leave this machine: passwords, keys and tokens, and where things lie on its disks."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SECRET, TOKEN = "REDACTED", "<token>"

_SECRET_NAME = re.compile(
    r"(?:^|_)(?:(?:api|access|secret|private|account|subscription|master|license|service|auth|admin|openai|hf)_?keys?"
    r"|token|secret|password|passwd|passphrase|passcode|pass|pwd|authorization|auth|bearer|cookie|credentials?"
    r"|signature|sig)$"
)
_NOT_SECRET = {f"{kind}_token" for kind in ("bos", "eos", "pad", "unk", "sep", "cls", "mask")}
# Mappings whose keys are someone else's, so that a mere `key` is one.
_FOREIGN = {"extra_body", "variables", "headers", "extra_headers", "default_headers", "extra_query"}
_SHORTEST = 6
"""Characters from which on a secret is looked for in other texts, too: `a` stands everywhere."""

_USER_IN_URL = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]*://)([^\s/?#'\"<>]+)@")
_QUERY = re.compile(r"(?<=[?&;#])([\w.~-]+)=([^&;#\s'\"]+)")
_SAID = re.compile(
    r"(?i)\b((?:api[ _-]?key|access[ _-]?key|secret[ _-]?key|(?:access|auth|api)[ _-]token|password|passwd|passphrase)"
    r"['\"]?(?: is |\s*[:=])\s*['\"]?)(?!REDACTED)([^\s'\",;&]{4,})"
)
_SHAPES = re.compile(
    r"\b(?:hf_(?:oauth_|jwt_|app_)?|api_org_)[A-Za-z0-9]{16,}[\w.-]*"
    r"|\b(?:sk|pk|rk|xai|nvapi|pplx|glpat|gldt|xox[a-z]|dop_v1|tgp_v1|gsk|r8|fw|gh[opusr]|github_pat|npm|pypi)[-_]"
    r"(?=[\w-]*\d)[\w-]{16,}"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bAIza[\w-]{30,}|\beyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*)?"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    re.DOTALL,
)
_SCHEME = re.compile(r"\b(Bearer|Basic) +(?=[\w.~+/=-]*[\d=._-])[\w.~+/=-]{8,}")

_HOMES = re.compile(r"(?<![\w.])/(?:home|Users)/[^/\s'\"<>:,;]+")
_DISK_PATH = re.compile(
    r"(?<![\w.~/<])/(?:data|etc|fsx|gpfs|home|lustre|media|mnt|net|nfs|opt|private|project|projects|root|scratch|srv"
    r"|storage|tmp|Users|usr|var|work|workspace)(?:/[^\s/'\"<>|,;:)(]+)*/([^\s/'\"<>|,;:)(]+)"
)
_WHOLE_PATH = re.compile(r"/(?:[^/\s]+/)+([^/\s]+)/?")


def is_secret_name(name: str, *, foreign: bool = False) -> bool:
    """Whether a key of this name holds a secret; `foreign`: also where it is `key` alone, or anything that ends so."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    words = re.sub(r"[^a-z0-9]+", "_", words.lower()).strip("_")
    found = _SECRET_NAME.search(words) or (foreign and re.search(r"(?:^|_)key$", words))
    return bool(found) and words not in _NOT_SECRET


def scrub(text: str, *secrets: str | None) -> str:
    """`text` without `secrets`, passwords in addresses, and what looks like a key or token."""
    text = _USER_IN_URL.sub(rf"\1{SECRET}@", text)
    text = _QUERY.sub(lambda m: f"{m[1]}={SECRET if is_secret_name(m[1], foreign=True) else m[2]}", text)
    for secret in sorted({secret for secret in secrets if secret}, key=len, reverse=True):
        text = text.replace(secret, TOKEN)
    return _SHAPES.sub(TOKEN, _SCHEME.sub(rf"\1 {TOKEN}", _SAID.sub(rf"\1{SECRET}", text)))


def without_paths(text: str) -> str:
    """`text` without the folders of this machine: home is `~`, of other absolute paths the last part stays."""
    text = without_home(text)
    whole = _WHOLE_PATH.fullmatch(text)
    return f".../{whole[1]}" if whole else _DISK_PATH.sub(r".../\1", text)


def without_home(text: str) -> str:
    """`text` with `~` for the home folder, and for anybody's."""
    home = str(Path.home())
    if len(home) > 1:
        text = re.sub(rf"(?<![\w.]){re.escape(home)}(?![\w.-])", "~", text)
    return _HOMES.sub("~", text)


def secrets_in(value: Any, *, foreign: bool = False) -> Iterator[str]:
    """The secrets that stand under names which say so, or in addresses, anywhere in nested mappings and lists."""
    if isinstance(value, Mapping):
        for name, child in value.items():
            if is_secret_name(str(name), foreign=foreign):
                yield from _texts(child)
            yield from secrets_in(child, foreign=foreign or name in _FOREIGN)
    elif isinstance(value, list | tuple):
        for child in value:
            yield from secrets_in(child, foreign=foreign)
    elif isinstance(value, str):
        yield from (part for _, user in _USER_IN_URL.findall(value) for part in user.split(":", 1)[-1:])
        yield from (found for name, found in _QUERY.findall(value) if is_secret_name(name, foreign=True))


def to_look_for(*values: Any) -> tuple[str, ...]:
    """The secrets of `values` and of the environment that can be looked for in any text."""
    # PWD is no password, and a short value may be any word.
    named = {name: value for name, value in os.environ.items() if len(value) > 7 and not value.startswith("/")}
    found = {*secrets_in(list(values)), *secrets_in(named, foreign=True)}
    return tuple(secret for secret in found if len(secret) >= _SHORTEST and not secret.isdigit())


def published(value: Any, secrets: tuple[str, ...] = (), *, foreign: bool = False) -> Any:
    """Nested JSON values as they may be shown to anybody: without secrets, and without this machine's folders."""
    if isinstance(value, Mapping):
        return {
            name: _hidden(child)
            if is_secret_name(str(name), foreign=foreign)
            else published(child, secrets, foreign=foreign or name in _FOREIGN)
            for name, child in value.items()
        }
    if isinstance(value, list | tuple):
        return [published(child, secrets, foreign=foreign) for child in value]
    return scrub(without_paths(value), *secrets) if isinstance(value, str) else value


def _hidden(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _hidden(child) for name, child in value.items()}
    if isinstance(value, list | tuple):
        return [_hidden(child) for child in value]
    return value if value is None or isinstance(value, bool) else SECRET


def _texts(value: Any) -> Iterator[str]:
    children = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    for child in children:
        yield from _texts(child)
    if isinstance(value, str):
        yield value
