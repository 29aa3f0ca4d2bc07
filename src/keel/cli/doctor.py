"""What this machine has and can do."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import time
from typing import Any

CORE = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "safetensors",
    "reasoning-gym",
    "math-verify",
    "pydantic",
    "typer",
    "rich",
    "plotly",
    "jaxtyping",
    "scipy",
)
EXTRAS = ("trl", "vllm", "ray", "tensorboard", "wandb", "mlflow", "trackio")


def examine() -> dict[str, Any]:
    """Device, memory, packages, speed of a matrix product, cache, and what is wrong."""
    import torch

    from keel import __version__
    from keel.models.load import best_device
    from keel.train.base import cache_directory

    device = best_device()
    cache = cache_directory()
    place = cache if cache.exists() else cache.parent if cache.parent.exists() else cache.home()
    findings: dict[str, Any] = {
        "keel": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(device),
        "accelerator": torch.cuda.get_device_name(0) if device.type == "cuda" else None,
        "bf16": _supports_bf16(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(_memory() / 2**30, 1),
        "gflops_fp32": round(_gflops(device), 1),
        "cache": str(cache),
        "cache_free_gib": round(shutil.disk_usage(place).free / 2**30, 1),
        "packages": {name: _version(name) for name in CORE},
        "extras": {name: _version(name) for name in EXTRAS},
    }
    findings["problems"] = _problems(findings)
    return findings


def print_findings(findings: dict[str, Any]) -> None:
    """One line each; problems last, with what to do."""
    for key, value in findings.items():
        if key in ("packages", "extras"):
            there = ", ".join(f"{name} {version}" for name, version in value.items() if version)
            print(f"{key:<16} {there or 'none'}")
        elif key != "problems":
            print(f"{key:<16} {value}")
    print(f"{'problems':<16} {'none' if not findings['problems'] else ''}")
    for problem in findings["problems"]:
        print(f"  - {problem}")


def _problems(findings: dict[str, Any]) -> list[str]:
    out = [
        f"{name} is missing: pip install keel-rl" for name, version in findings["packages"].items() if version is None
    ]
    if findings["cache_free_gib"] < 1:
        out.append(f"less than 1 GiB is free at {findings['cache']}: free some, or set KEEL_CACHE")
    return out


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _supports_bf16(device: Any) -> bool:
    import torch

    return torch.cuda.is_bf16_supported() if device.type == "cuda" else True


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


def _gflops(device: Any, size: int = 1024, repeats: int = 5) -> float:
    """Best of a few fp32 matrix products."""
    import torch

    a = torch.ones(size, size, device=device)
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        float((a @ a)[0, 0])
        times.append(time.perf_counter() - begun)
    return 2 * size**3 / min(times) / 1e9
