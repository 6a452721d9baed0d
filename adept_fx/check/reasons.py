"""Reasons, shortened to what is wrong and to what that is called for any model."""

import re

_WAY_OUT = " Way out: "
_OF_ONE_MODEL = re.compile(
    r"""'[^']*'|"[^"]*"|`[^`]*`         # quoted
      | \b\w*[A-Z]\w*[a-z]\w*[A-Z]\w*    # a class: GemmaModel
      | \b\w*[A-Z]\w*[A-Z]\w*[a-z]\w*    # a class: GPTModel
      | \b[\w.]*\d[\w.]*\w\b|\b\d+\b     # a number, layers.3.mlp, add_12
    """,
    re.VERBOSE,
)
_ASIDE = re.compile(r" \([^()]*\)")
_LIST = re.compile(r"…(?:(?:,| and|, and) …)+")


def without_way_out(reason: str) -> str:
    """The reason without the advice that an ``AdeptError`` ends with."""
    return reason.partition(_WAY_OUT)[0]


def reason_group(reason: str) -> str:
    """The reason without what differs from model to model.

    Class names, numbers, whatever has a number in it, and quoted text become an ellipsis; the way
    out, what stands in parentheses, and what follows a colon are left out.
    """
    message = _ASIDE.sub("", without_way_out(reason)).partition(": ")[0]
    return _LIST.sub("…", _OF_ONE_MODEL.sub("…", message)).strip()
