"""Write the embedded default model, untrained: python scripts/make_tiny_model.py DIR [SEED]."""

from __future__ import annotations

import sys

from dirl.model.tiny import save_tiny_model


def main(arguments: list[str]) -> int:
    """Write the model; 2 where no directory is named."""
    if not arguments or arguments[0].startswith("-") or not all(argument.isdigit() for argument in arguments[1:2]):
        print(__doc__, file=sys.stderr)
        return 2
    save_tiny_model(arguments[0], seed=int(arguments[1]) if len(arguments) > 1 else 0)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
