"""The memory of a process as it is watched from outside."""

import subprocess
import sys

import pytest

from vivace.bench import memory


def test_the_gpus_memory_is_counted_from_before_the_process_started():
    readings = iter([1000, 1000, *[1000 + 3 * memory.GIB] * 2, *[1000 + 2 * memory.GIB] * 20])
    watch = memory.Watch(lambda: next(readings, 1000 + 2 * memory.GIB))
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.6)"])
    watch.start(process.pid)
    process.wait()
    found = watch.stop()
    assert found["vram_peak_gib"] == 3.0 and found["vram_steady_gib"] == 2.0


def test_the_resident_size_is_that_of_the_process():
    script = "import sys; kept = bytearray(b'x' * 2**27); print('ready', flush=True); sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    assert 2**27 < memory.resident(process.pid) < 2**29
    process.communicate()
    assert memory.resident(process.pid) == 0


def test_without_a_gpu_there_is_only_the_resident_size():
    assert memory.gpu_memory("cpu") is None
    watch = memory.Watch(None)
    watch.start(1)
    assert watch.stop().keys() == {"rss_peak_gib"}


@pytest.mark.gpu
def test_nvml_sees_what_torch_allocates():
    import torch

    torch.zeros(1, device="cuda")
    used = memory.gpu_memory("cuda")
    before = used()
    block = torch.zeros(2**30, dtype=torch.uint8, device="cuda")
    assert 0.9 * 2**30 < used() - before < 1.3 * 2**30
    del block
