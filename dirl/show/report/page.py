"""Data -> one HTML page that holds its own style and script and may load nothing.

Whatever a run brought in stands in a JSON block that no text can end, and reaches the page as text nodes only. A
content security policy names the one script by its hash and forbids every connection, so that even a mistake here
could neither run a completion nor fetch anything.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

_SCRIPTS = ("charts.js", "player.js", "page.js")
_ESCAPES = {character: f"\\u{ord(character):04x}" for character in "<>&"}


def report_page(title: str, subtitle: str, runs: Sequence[Mapping[str, Any]], differences: Sequence[Any]) -> str:
    """The report of one run, or of several side by side."""
    return build_page(title, {"title": title, "subtitle": subtitle, "runs": runs, "differences": differences})


def player_page(samples: Sequence[Mapping[str, Any]]) -> str:
    """Only the player: what a notebook shows in a frame."""
    return build_page("completions", {"samples": samples})


def build_page(title: str, data: Mapping[str, Any]) -> str:
    """The page with its data filled in."""
    script = "\n" + "\n".join(_asset(name) for name in _SCRIPTS) + "\n"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        "title": html.escape(title),
        "style": _asset("page.css"),
        "script_hash": f"sha256-{digest}",
        "data": embed_json(data),
        "script": script.strip("\n"),
    }
    # One pass: a part that holds another's placeholder is not looked at again.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _asset("page.html"))


def embed_json(data: Any) -> str:
    """JSON that no text of it can end the script element, or open a comment, with; never NaN.

    ASCII throughout, so that lone surrogates and line separators are harmless too.
    """
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return re.sub(r"[<>&]", lambda match: _ESCAPES[match[0]], text)


@cache
def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8").strip("\n")
