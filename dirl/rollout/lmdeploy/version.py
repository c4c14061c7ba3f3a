"""The one release of LMDeploy whose private classes the engine extends; checked before anything of it is imported."""

from __future__ import annotations

from dirl.errors import UserError

SUPPORTED_VERSION = "0.18.0"


def check_version(installed: str) -> None:
    """Raise ValueError for any other release."""
    if installed != SUPPORTED_VERSION:
        raise UserError(
            f"rollout.engine=lmdeploy: lmdeploy {installed} is installed, and {SUPPORTED_VERSION} is supported; "
            f"pip install lmdeploy=={SUPPORTED_VERSION}, or set rollout.engine=torch"
        )
