"""httpx, under the name that the installed openai and huggingface_hub have brought it."""

from __future__ import annotations

try:
    import httpx2 as httpx
except ModuleNotFoundError:  # older releases of both
    import httpx  # type: ignore[no-redef, import-not-found, unused-ignore]

__all__ = ["httpx"]
