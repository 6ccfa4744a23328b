"""The compiler launcher that fails a build where ptxas spills, on made-up reports."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "cmake/ptxas_check.py"
ENTRY = "ptxas info    : Compiling entry function '{}' for 'sm_90a'\n"
SPILLS = "    8 bytes stack frame, {} bytes spill stores, {} bytes spill loads\n"


@pytest.fixture(scope="module")
def faults():
    spec = importlib.util.spec_from_file_location("ptxas_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda report, *patterns: list(module.faults(report, [re.compile(p) for p in patterns]))


def test_only_listed_kernels_must_not_spill(faults):
    report = ENTRY.format("_Zfast_kernel") + SPILLS.format(4, 8) + ENTRY.format("_Zother") + SPILLS.format(300, 300)
    assert faults(report) == []
    (fault,) = faults(report, "fast")
    assert "_Zfast_kernel" in fault and "sm_90a" in fault and "4 bytes stored" in fault
    assert faults(ENTRY.format("_Zfast_kernel") + SPILLS.format(0, 0), "fast") == []


def test_device_functions_after_a_kernel_are_not_its_own(faults):
    assert faults(ENTRY.format("_Zfast") + SPILLS.format(0, 0) + SPILLS.format(16, 16), "fast") == []


def test_serialised_products_are_a_fault_of_any_kernel(faults):
    line = "ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due to x\n"
    assert len(faults(line)) == 1
    assert faults("ptxas info    : (C7519) warpgroup.arrive is injected in around line 3\n") == []


@pytest.mark.parametrize("stored, code, status", [(0, 0, 0), (12, 0, 1), (0, 3, 3)])
def test_the_compiler_runs_and_its_report_is_kept(tmp_path, stored, code, status):
    listed = tmp_path / "list.txt"
    listed.write_text("# a comment\nfast\n")
    report = ENTRY.format("_Zfast") + SPILLS.format(stored, stored)
    compiler = f"import sys; sys.stderr.write({report!r} + 'a warning\\n'); sys.exit({code})"
    output = tmp_path / "x.o"
    command = [sys.executable, str(SCRIPT), str(listed), sys.executable, "-c", compiler, "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status
    assert "a warning" in done.stderr and "ptxas info" not in done.stderr
    assert ("spills" in done.stderr) == (stored > 0)
    assert "_Zfast" in output.with_name("x.o.ptxas").read_text()
