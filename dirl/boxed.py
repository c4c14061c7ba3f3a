r"""Texts -> what they put into \boxed{}: answers of completions, golds of worked solutions."""

from __future__ import annotations

import re
from typing import NamedTuple

# `\\` before `boxed` is a doubled escape, not a line break: data sets hold `\\boxed{7}` that went through JSON twice.
_BRACE = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\\\(?!boxed|fbox)|\\[{}]|(?P<open>\{)|(?P<close>\})")
_BARE_BOX = re.compile(r"\\boxed\s+(?P<content>[^{}$\s][^$\n]*)")  # MATH has `$\boxed 5$`
# Between boxes that belong together: punctuation, or a few words that join, and none that takes the first one back.
_JOINT = re.compile(r"(?:[\s,;.$]|\\[,;()\[\]]|\\q?quad)*|(?=.*\b(?:and|or)\b)(?!.*\b(?:but|thus|so|then|not)\b).{,40}")
_FINAL = "####"  # GSM8K's mark before the answer
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


class _Box(NamedTuple):
    start: int
    content: str
    end: int


def _find_boxes(text: str) -> list[_Box]:
    r"""Every closed \boxed{...} or \fbox{...} that stands in no other, in order."""
    opened: list[tuple[bool, int, int]] = []  # (is a box, where it starts, where its content starts)
    boxes: list[_Box] = []
    for token in _BRACE.finditer(text):
        if token.lastgroup == "close":
            if not opened:
                continue
            is_box, start, content = opened.pop()
            if is_box:
                while boxes and boxes[-1].start > start:
                    boxes.pop()
                boxes.append(_Box(start, text[content : token.start()], token.end()))
        elif token.lastgroup:
            opened.append((token.lastgroup == "box", token.start(), token.end()))
    return boxes


def extract_boxed(text: str) -> str | None:
    r"""Content of the last closed \boxed{...} or \fbox{...} (the outermost, when nested); None without one."""
    boxes = _find_boxes(text)
    return boxes[-1].content if boxes else None


def _extract_last_boxes(text: str) -> str | None:
    r"""As `extract_boxed`, with the boxes before it that only commas or a few words such as `and` part from it."""
    boxes = _find_boxes(text)
    found = boxes[-1:]
    for box in reversed(boxes[:-1]):
        if not _JOINT.fullmatch(text, box.end, found[0].start):
            break
        found.insert(0, box)
    return ", ".join(box.content for box in found) if found else None


def read_gold(text: str) -> str:
    """The gold in a text that may hold a worked solution: after the last `####`, or in the last box, or all of it."""
    if _FINAL in text:
        final = text.rpartition(_FINAL)[2].strip()
        return _THOUSANDS.sub("", final.splitlines()[0]) if final else text
    boxed = _extract_last_boxes(text)
    if boxed is None and (bare := _BARE_BOX.search(text, max(0, text.rfind("\\boxed")))):
        boxed = bare["content"]
    return (boxed or "").strip(" .") or text
