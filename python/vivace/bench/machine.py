"""Facts of the machine: what it is, what it can do at most, and how its clocks were during a run."""

import contextlib
import datetime
import hashlib
import os
import platform
import statistics
import subprocess
from pathlib import Path

import torch

from vivace import __version__
from vivace.bench import timing
from vivace.bench.figures import significant

FACTS = {"driver": "driver_version", "power_limit_w": "power.limit", "clock_max_mhz": "clocks.max.sm"}
WATCHED = ("clocks.sm", "power.draw", "temperature.gpu", "clocks_event_reasons.active")

#: Bits of nvidia-smi's clocks_event_reasons.active that hold the clocks down.
THROTTLES = {
    0x04: "power limit",
    0x08: "hardware slowdown",
    0x20: "heat",
    0x40: "heat (hardware)",
    0x80: "power brake",
}
IDLE = 0x01


def facts(device: str) -> dict:
    """Name, versions and limits of the machine; on a GPU from nvidia-smi as far as it answers."""
    found = {"device": device}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = properties.name
        found["memory_gib"] = round(properties.total_memory / 2**30, 1)
        if unit := getattr(properties, "uuid", None):  # which of several equal ones, without naming it
            found["unit"] = hashlib.sha256(str(unit).encode()).hexdigest()[:8]
        values = smi_query(FACTS.values())
        found |= {name: value for name, value in zip(FACTS, values, strict=True) if value} if values else {}
        for name in ("power_limit_w", "clock_max_mhz"):
            if name in found:
                with contextlib.suppress(ValueError):
                    found[name] = float(found[name])
        found |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    else:
        found |= {"cpu": cpu_name(), "threads": torch.get_num_threads()}
    found |= {"torch": str(torch.__version__), "python": platform.python_version(), "vivace": __version__}
    if commit := current_commit():
        found["commit"] = commit
    found["date"] = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ")
    return found


def current_commit() -> str:
    """$VIVACE_COMMIT, else that of the checkout that this package lies in (with a + where files differ); else ""."""
    if chosen := os.environ.get("VIVACE_COMMIT"):
        return chosen
    folder = Path(__file__).resolve().parent
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        git = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--exclude=*"]
        tracked = subprocess.run(
            ["git", "-C", str(folder), "ls-files", "--error-unmatch", Path(__file__).name],
            capture_output=True,
            timeout=20,
        )
        if tracked.returncode == 0:
            return subprocess.run(git, capture_output=True, text=True, timeout=20).stdout.strip()
    return ""


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def smi_command(fields) -> list[str]:
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    if torch.cuda.device_count() == 1 and "CUDA_VISIBLE_DEVICES" not in os.environ:
        return command
    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)
    return command if uuid is None else [*command, "-i", f"GPU-{uuid}"]


def smi_query(fields) -> list[str] | None:
    """The values of the first GPU, or None where nvidia-smi is missing or does not know them."""
    fields = list(fields)
    try:
        run = subprocess.run(smi_command(fields), capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in run.stdout.split("\n")[0].split(",")]
    return values if run.returncode == 0 and len(values) == len(fields) else None


def ceilings(device: str, dtype: torch.dtype, repetitions: int = 10) -> dict:
    """matmul_tflops of a square product, copy_gb_s (read and write) and read_gb_s of a large array, by torch.

    The best of the samples: a ceiling is what the machine can do.
    """
    size, count = (8192, 2**29) if device == "cuda" else (1024, 2**24)
    if device == "cuda" and dtype == torch.float32:
        size = 4096
    a, b, product = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(3))
    source = torch.ones(count, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    target = torch.empty_like(source)
    a.normal_()
    b.normal_()
    calls = {
        "matmul": timing.Call(lambda: torch.mm(a, b, out=product)),
        "copy": timing.Call(lambda: target.copy_(source)),
        "read": timing.Call(lambda: source.sum()),
    }
    make_sampler = timing.event_sampler if device == "cuda" else timing.host_sampler
    samples, _ = timing.take_turns(calls, make_sampler, repetitions, 3)
    size_bytes = source.numel() * source.element_size()
    work = {"matmul": 2 * size**3 / 1e12, "copy": 2 * size_bytes / 1e9, "read": size_bytes / 1e9}
    units = {"matmul": "matmul_tflops", "copy": "copy_gb_s", "read": "read_gb_s"}
    return {units[name]: significant(work[name] / min(times)) for name, times in samples.items()}


class ClockWatch:
    """nvidia-smi beside a run, once a second: clocks and what held them down. On a CPU it does nothing."""

    def __init__(self, device: str):
        self.process = None
        if device == "cuda":
            with contextlib.suppress(OSError):
                self.process = subprocess.Popen(
                    [*smi_command(WATCHED), "--loop-ms=1000"],
                    stdout=subprocess.PIPE,  # holds the lines of about half an hour; after that nvidia-smi waits
                    stderr=subprocess.DEVNULL,
                    text=True,
                    start_new_session=True,  # Ctrl-C is for the run alone
                )

    def stop(self) -> dict:
        """clock_mhz_min and clock_mhz_median while the GPU was busy, and `throttled` where something held them down."""
        if self.process is None:
            return {}
        self.process.terminate()
        text, _ = self.process.communicate()
        self.process = None
        return clock_facts(text)


def clock_facts(text: str) -> dict:
    """`ClockWatch.stop`'s answer, from nvidia-smi's lines of the WATCHED fields."""
    clocks, reasons = [], []
    for line in text.splitlines():
        values = [value.strip() for value in line.split(",")]
        try:
            clock, reason = float(values[0]), int(values[3], 16)
        except (ValueError, IndexError):
            continue
        if not reason & IDLE:
            clocks.append(clock)
            reasons.append(reason)
    if not clocks:
        return {}
    found = {"clock_mhz_min": min(clocks), "clock_mhz_median": statistics.median(clocks)}
    counts = {name: sum(1 for reason in reasons if reason & bit) for bit, name in THROTTLES.items()}
    held = [f"{name} in {count} of {len(reasons)} seconds" for name, count in counts.items() if count]
    return found | ({"throttled": ", ".join(held)} if held else {})
