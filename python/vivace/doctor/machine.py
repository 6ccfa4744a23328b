"""The machine: system, NVIDIA driver, GPUs as torch sees them."""

import ctypes
import platform
import re
import sys
from pathlib import Path
from typing import Any

from vivace.doctor.attempt import attempt


def machine() -> dict[str, Any]:
    return {
        "system": platform.platform(),
        "architecture": platform.machine(),
        "python": sys.version.split()[0],
        "driver": attempt(driver),
        "gpus": attempt(gpus),
    }


def driver() -> dict[str, Any]:
    """The NVIDIA driver, without torch: its version, the newest CUDA it runs, its devices."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        cuda = ctypes.CDLL(name)
    except OSError as error:
        return {"installed": False, "reason": f"{name} does not load: {error}"}
    found: dict[str, Any] = {"installed": True, "version": driver_version()}
    value = ctypes.c_int()
    if cuda.cuDriverGetVersion(ctypes.byref(value)) == 0:
        found["cuda"] = f"{value.value // 1000}.{value.value % 1000 // 10}"
    status = cuda.cuInit(0)
    if status != 0:
        found["reason"] = f"cuInit returned {status}"
    elif cuda.cuDeviceGetCount(ctypes.byref(value)) == 0:
        found["devices"] = value.value
    return found


def driver_version() -> str | None:
    """As the kernel module says; None where it does not (Windows, containers)."""
    path = Path("/proc/driver/nvidia/version")
    if not path.is_file():
        return None
    match = re.search(r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)", path.read_text())
    return match.group(1) if match else None


def gpus() -> list[dict[str, Any]]:
    """The devices that torch sees."""
    import torch

    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(total / 2**30, 1),
                "free_gib": round(free / 2**30, 1),
            }
        )
    mps = getattr(torch.backends, "mps", None)
    if mps is not None and mps.is_available():
        found.append({"device": "mps", "name": "Apple GPU"})
    return found
