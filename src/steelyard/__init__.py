"""Steelyard: build, test and release open-weight language models of the LLaMA family.

The nouns of the command line are the nouns here; each is imported only when first used, so `import steelyard` is light
and verifying needs no torch:

    >>> import steelyard
    >>> verdict = steelyard.verify_bundle("releases/smollm2", keys=["me.pub.pem"])
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_NOUNS = {
    "Battery": "steelyard.safety.battery",
    "load_battery": "steelyard.safety.battery",
    "Policy": "steelyard.safety.policy",
    "load_policy": "steelyard.safety.policy",
    "Ledger": "steelyard.ledger.ledger",
    "Subject": "steelyard.model.identity",
    "subject_of": "steelyard.model.identity",
    "LocalEndpoint": "steelyard.inference.local",
    "OpenAIEndpoint": "steelyard.inference.openai",
    "run_battery": "steelyard.safety.run",
    "compute_report": "steelyard.safety.report",
    "decide": "steelyard.release.gate",
    "verify_bundle": "steelyard.release.verify",
    "write_bundle": "steelyard.release.bundle",
}

__all__ = ["__version__", *_NOUNS]


def __getattr__(name: str) -> Any:
    if name in _NOUNS:
        return getattr(import_module(_NOUNS[name]), name)
    raise AttributeError(f"module 'steelyard' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
