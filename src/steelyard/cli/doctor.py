"""`steelyard doctor`: what this machine has, what is missing, and how to get it."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import typer

from steelyard.cli.options import AsJSON
from steelyard.cli.output import print_json, print_table

_NEEDED_FOR = {
    "numpy": ("core", "everything"),
    "scipy": ("core", "bounds"),
    "securesystemslib": ("core", "signatures"),
    "model_signing": ("core", "the OpenSSF model signature"),
    "sqlalchemy": ("core", "the ledger"),
    "torch": ("models", "importing, generating, scoring, replay"),
    "tokenizers": ("models", "importing, generating, the gate"),
    "jinja2": ("models", "chat templates, the gate"),
    "transformers": ("models", "loading bundles as other tools do"),
    "gguf": ("models", "importing GGUF files"),
    "httpx": ("models", "remote endpoints"),
    "huggingface_hub": ("models", "importing from a model hub"),
    "llama_cpp": ("oracle", "comparing with llama.cpp (tests)"),
}


def doctor(as_json: AsJSON = False) -> None:
    """Tell what is installed, cores, memory, disk and GPU; exit 1 where the core itself is incomplete."""
    parts: list[dict[str, Any]] = []
    for module, (extra, use) in _NEEDED_FOR.items():
        installed = find_spec(module) is not None
        version = _version(module) if installed else None
        remedy = (
            None if installed else f"pip install 'steelyard[{extra}]'" if extra != "core" else "pip install steelyard"
        )
        parts.append({"part": module, "version": version, "needed_for": use, "extra": extra, "remedy": remedy})
    facts = {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "disk_free_gib": round(shutil.disk_usage(".").free / 2**30, 1),
        # Checks our statements as well; nothing here needs it.
        "cosign": shutil.which("cosign") or "not installed (only to check statements with another tool)",
        **_accelerator(),
    }
    if as_json:
        print_json({"facts": facts, "parts": parts})
    else:
        print_table("Machine", ("fact", "value"), [(name, str(value)) for name, value in facts.items()])
        rows = [(p["part"], p["version"] or "missing", p["needed_for"], p["remedy"] or "") for p in parts]
        print_table("Parts", ("part", "version", "needed for", "how to get it"), rows)
    if any(part["version"] is None and part["extra"] == "core" for part in parts):
        raise typer.Exit(1)


def _version(module: str) -> str:
    name = {"llama_cpp": "llama-cpp-python"}.get(module, module)
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"


def _accelerator() -> dict[str, str]:
    if find_spec("torch") is None:
        return {"gpu": "unknown (torch is not installed)"}
    import torch

    from steelyard.inference.kernels import describe

    cpu = torch.backends.cpu.get_cpu_capability()
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    return {"gpu": gpu, "cpu_capability": cpu, "cpu_kernels": describe()}
