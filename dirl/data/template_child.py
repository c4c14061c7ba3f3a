"""What runs in the process that a chat template is tried in: limits, then the template over conversations.

The request comes as a line of JSON on standard input; a word about the template goes to standard output. The
environment is built as transformers builds its own, as far as time and memory go. It imports nothing of this package,
which it would have to find first.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, ext, nodes, parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Generation(ext.Extension):
    """Marks what the assistant says; it changes nothing in the text."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: parser.Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def compiled(template: str) -> Template:
    """The template; its errors are raised as it is rendered."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **how: json.dumps(value, **{"ensure_ascii": False, **how})
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["raise_exception"] = refuse
    return environment.from_string(template)


def refuse(message: str) -> None:
    raise TemplateError(message)


def verdict(request: dict[str, Any]) -> str:
    """ok, memory, or length; what a template refuses it may refuse."""
    template = None
    for probe in request["probes"]:
        try:
            template = template or compiled(request["template"])
            text = template.render(**request["variables"], **probe["variables"])
        except MemoryError:
            return "memory"
        except Exception:  # whatever it is, it is heard where a real conversation meets it
            continue
        if len(text) > probe["most"]:
            return "length"
    return "ok"


def main() -> None:
    request = json.loads(sys.stdin.readline())
    limits = {resource.RLIMIT_CPU: request["seconds"], resource.RLIMIT_AS: request["bytes"], resource.RLIMIT_CORE: 0}
    for kind, limit in limits.items():
        with contextlib.suppress(ValueError, OSError):  # not on this system
            resource.setrlimit(kind, (limit, resource.getrlimit(kind)[1]))
    print(verdict(request))


if __name__ == "__main__":
    main()
