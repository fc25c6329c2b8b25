"""Chat templates that write the day's date (Llama 3.2's, gpt-oss's): here it is the same on every day.

Rows that are trained, and problems that are asked, would else be others tomorrow. transformers offers templates the
clock as a function `strftime_now`; a macro of that name stands in for it.
"""

from __future__ import annotations

from datetime import datetime

DATE = datetime(2024, 7, 26)
"""What Llama's own template writes where there is no clock."""
_CLOCK = "strftime_now"
_CODES = "aAbBcdDeFgGhHIjmMnpPrRsSTtuUVwWxXyYzZ"
_PERCENT = "\ufdd3"  # no text holds it


def reads_clock(template: str) -> bool:
    """Whether the template may write the day's date."""
    return _CLOCK in template


def with_fixed_date(template: str) -> str:
    """The template, with `DATE` where it asks for the day's; on one line with its first, so that lines keep their
    numbers."""
    if not reads_clock(template):
        return template
    codes = [f"%{mark}{code}" for mark in ("-", "") for code in _CODES]
    pairs = [("%%", _PERCENT), *((code, DATE.strftime(code)) for code in codes), (_PERCENT, "%")]
    filled = "".join(f"|replace({code!r},{text!r})" for code, text in pairs)
    return f"{{% macro {_CLOCK}(format) %}}{{{{ format{filled} }}}}{{% endmacro %}}{template}"
