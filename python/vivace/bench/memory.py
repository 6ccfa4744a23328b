"""Memory of another process while it runs: what its GPU has in use, and its resident size."""

import contextlib
import ctypes
import statistics
import threading
import time
from pathlib import Path

PERIOD = 0.01  # seconds between looks
GIB = 2**30


class NvmlMemory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class Nvml:
    """The driver's management library, for the memory in use on the first GPU, by all processes.

    Raises:
        OSError: it is not there or does not answer.
    """

    def __init__(self, bus_id: str | None = None):
        self.library = ctypes.CDLL("libnvidia-ml.so.1")
        self.handle = ctypes.c_void_p()
        self.call("nvmlInit_v2")
        if bus_id is None:
            self.call("nvmlDeviceGetHandleByIndex_v2", 0, ctypes.byref(self.handle))
        else:
            self.call("nvmlDeviceGetHandleByPciBusId_v2", bus_id.encode(), ctypes.byref(self.handle))

    def call(self, name: str, *arguments) -> None:
        code = getattr(self.library, name)(*arguments)
        if code != 0:
            raise OSError(f"{name} returned {code}")

    def used(self) -> int:
        memory = NvmlMemory()
        self.call("nvmlDeviceGetMemoryInfo", self.handle, ctypes.byref(memory))
        return memory.used


def gpu_memory(device: str):
    """A function that gives the bytes in use on torch's current GPU, or None where it cannot be told."""
    if device != "cuda":
        return None
    import torch

    properties = torch.cuda.get_device_properties(0)
    bus = [getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    try:
        return Nvml(None if None in bus else "{:08x}:{:02x}:{:02x}.0".format(*bus)).used
    except (OSError, AttributeError):
        return None


def resident(pid: int) -> int:
    """Bytes of the process that are in RAM now; 0 when it has gone."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return 0


class Watch:
    """Looks at the memory of one process from beginning to end.

    The GPU's figure is what is in use above what was before the process started: its context and kernels too. Other
    processes that start or end meanwhile are in it.
    """

    def __init__(self, used):
        self.used = used
        self.before = used() if used else 0
        self.gpu: list[int] = []
        self.ram: list[int] = []
        self.ended = threading.Event()
        self.thread: threading.Thread | None = None

    def start(self, pid: int) -> None:
        def look():
            while True:  # once in any case, however short the process
                self.ram.append(resident(pid))
                if self.used:
                    with contextlib.suppress(OSError):
                        self.gpu.append(self.used() - self.before)
                if self.ended.wait(PERIOD):
                    break

        self.thread = threading.Thread(target=look, daemon=True)
        self.thread.start()

    def stop(self) -> dict:
        """vram_peak_gib, vram_steady_gib (the median while more than half of the peak was in use), rss_peak_gib."""
        self.ended.set()
        if self.thread is not None:
            self.thread.join()
        found = {"rss_peak_gib": round(max(self.ram, default=0) / GIB, 3)}
        if self.gpu:
            peak = max(self.gpu)
            found["vram_peak_gib"] = round(peak / GIB, 3)
            found["vram_steady_gib"] = round(statistics.median(used for used in self.gpu if used >= peak / 2) / GIB, 3)
        return found


def wait_until_settled(used, seconds: float = 3.0) -> None:
    """Until the memory in use stays: a process that ended gives its own back a little later."""
    deadline = time.monotonic() + seconds
    last = None
    while used and time.monotonic() < deadline and last != (last := used()):
        time.sleep(0.1)
