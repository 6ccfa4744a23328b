"""Runs a CUDA compilation and fails it where ptxas did to a listed kernel what must not happen.

    python3 ptxas_check.py LIST nvcc -Xptxas=-v ...

As a compiler launcher. A kernel whose mangled name a regular expression of the file LIST matches must not spill to
local memory; no kernel may have its wgmma instructions serialised (ptxas C7510 to C7520 say "serialized"). ptxas'
report goes to <object>.ptxas.
"""

import re
import subprocess
import sys
from pathlib import Path

ENTRY = re.compile(r"ptxas info\s+: Compiling entry function '(\S+)' for '(\w+)'")
SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REPORT = re.compile(r"ptxas info|\s+\d+ bytes stack frame|ptxas .*Function properties|\s*$")


def faults(report, patterns):
    """What is wrong, a line each. patterns: of kernels that must not spill."""
    kernel = arch = None
    for line in report.splitlines():
        if entry := ENTRY.match(line):
            kernel, arch = entry.groups()
        elif "serialized" in line and "wgmma" in line:
            yield line.strip()
        elif (spill := SPILL.search(line)) and kernel:
            stores, loads = map(int, spill.groups()[1:])
            if (stores or loads) and any(pattern.search(kernel) for pattern in patterns):
                yield f"{kernel} spills on {arch}: {stores} bytes stored, {loads} loaded"
            kernel = None  # what follows are device functions


def main():
    lines = Path(sys.argv[1]).read_text().splitlines()
    patterns = [re.compile(line) for line in lines if line and not line.startswith("#")]
    command = sys.argv[2:]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
    lines = done.stderr.splitlines()
    if "-o" in command:
        report = "\n".join(line for line in lines if REPORT.match(line))
        Path(command[command.index("-o") + 1] + ".ptxas").write_text(report + "\n")
    for line in lines:
        if not REPORT.match(line):
            print(line, file=sys.stderr)
    wrong = list(faults(done.stderr, patterns))
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    sys.exit(done.returncode or (1 if wrong else 0))


if __name__ == "__main__":
    main()
