"""A page as a headless browser shows it, where one is installed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def look(page: Path, script: str, width: int = 390, dark: bool = False) -> dict[str, Any]:
    """What the JavaScript expression `script` gives in a browser, for the page in a frame `width` pixels wide.

    In the expression `page` is the frame's window and `root` its <html>. With it comes `console`, the messages that the
    page left there. Skips the test where there is no browser.
    """
    browser = next((path for name in NAMES if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no headless browser is installed (chromium)")
    # A window can't be narrower than 500 pixels; a frame can.
    wrapper = page.with_name("frame.html")
    wrapper.write_text(
        f'<iframe id="f" src="{page.name}" style="width:{width}px;height:3000px;border:0"></iframe><pre id="o"></pre>'
        "<script>f.onload = () => { const page = f.contentWindow, root = page.document.documentElement;"
        f"o.textContent = 'result:' + JSON.stringify({script}) }}</script>"
    )
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={page.with_name('browser')}", "--enable-logging=stderr", "--dump-dom"]
    command += ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = subprocess.run([*command, wrapper.as_uri()], capture_output=True, text=True, timeout=120, env=os.environ)
    found = re.search(r"result:(.*?)</pre>", done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return {**json.loads(unescape(found[1])), "console": console}
