"""The steps of .ci/gpu: each in its own process, time-limited; all run whatever fails; a table last."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = Path(os.environ.get("OUT") or ROOT / "docs/results")
STEPS = ("tests", "sanitize", "engine", "bench")
BENCHES = {
    "forward": ["--preset", "h200", "--op", "forward", "--arch", "auto,80", "--peers", "cudnn,fa2"],
    "decode": ["--preset", "h200", "--op", "decode,overhead"],
    "extra": ["--preset", "extra"],  # a step that runs only where it is named
}
PARALLEL = 6  # processes that share the GPU; benchmarks run alone
CHECK_SECONDS = 280  # tests and sanitizer together
BENCH_SECONDS = 80
ENGINE_SECONDS = 120
HANG_SECONDS = 100  # one test
FAILURES_SHOWN = 12  # of each step
LINE = 190


def run(name, command, seconds, **environment):
    """Runs one step; returns its record, with the whole output in ``log``."""
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as log_file:
        try:
            # A session of its own, so that a time-out ends compute-sanitizer's child too.
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=log_file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            code = process.wait(max(seconds, 1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = "timeout"
        except OSError as error:
            log_file.write(str(error))
            code = "not run"
        log_file.seek(0)
        log = log_file.read()
    return {"step": name, "code": code, "seconds": round(time.monotonic() - start, 1), "log": log}


def run_tests(path, deadline):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "--tb=short",
        "-rf",
        "-p",
        "no:cacheprovider",
        str(path),
    ]
    record = run(path.stem, command, deadline - time.monotonic(), VIVACE_TEST_TIMEOUT=str(HANG_SECONDS))
    lines = record["log"].splitlines()
    counts = re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1] if lines else "")
    record["counts"] = {kind: int(n) for n, kind in counts}
    ran = record["counts"].get("passed", 0) > 0  # skipped throughout is not a pass on a machine with a GPU
    record["result"] = "ok" if record["code"] == 0 and ran else "no tests" if record["code"] == 5 else "FAILED"
    record["detail"] = ", ".join(f"{n} {kind}" for n, kind in counts) or f"ended with {record['code']}"
    record["failures"] = [line for line in lines if line.startswith(("FAILED", "ERROR", "Timeout", "Fatal"))]
    if record["result"] == "FAILED" and not record["failures"]:
        record["failures"] = lines[-8:]
    return record


def run_sanitizer(tool, deadline):
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    brief = ["--brief"] if tool == "racecheck" else []
    command = [program, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
    command += [sys.executable, "tests/python/ops/sanitize.py", *brief]
    record = run(tool, command, deadline - time.monotonic(), PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    lines = record["log"].splitlines()
    summary = [line.strip("= ") for line in lines if "SUMMARY" in line]
    ran = [line for line in lines if "groups of calls ran" in line]
    record["result"] = "ok" if record["code"] == 0 and ran else "FAILED"
    record["detail"] = "; ".join([*ran, *summary]) or f"ended with {record['code']}"
    worth = re.compile(r"Invalid|Error|hazard|Race|at .*\(|Traceback|vivace\.")
    record["failures"] = [] if record["result"] == "ok" else [line for line in lines if worth.search(line)][:40]
    return record


def run_bench(what):
    path = OUT / f"bench-{what}.json"
    path.unlink(missing_ok=True)  # the file is written cell by cell: an old one is not to be taken for a new one
    command = [sys.executable, "-m", "vivace", "bench", "attention", *BENCHES[what], "--output", str(path)]
    record = run(f"bench {what}", command, BENCH_SECONDS)
    record["result"] = "ok" if record["code"] == 0 else "FAILED"
    record["detail"] = str(path) if record["result"] == "ok" else f"ended with {record['code']}"
    record["failures"] = []
    return record


def run_engine():
    if "VIVACE_EXECUTABLE" not in os.environ:
        return {
            "step": "engine",
            "result": "not run",
            "seconds": 0,
            "detail": "VIVACE_EXECUTABLE is not set",
            "failures": [],
            "log": "",
        }
    record = run("engine", [sys.executable, ".ci/gpu_engine.py"], ENGINE_SECONDS)
    record["result"] = "ok" if record["code"] == 0 else "FAILED"
    record["detail"] = f"ended with {record['code']}"
    record["failures"] = []
    return record


def show(record):
    print(f"\n== {record['step']}: {record['result']}, {record['detail']} ({record['seconds']} s)")
    for line in record["failures"][:FAILURES_SHOWN]:
        print("  " + line[:LINE])
    hidden = len(record["failures"]) - FAILURES_SHOWN
    if hidden > 0:
        print(f"  ... and {hidden} more, in {OUT / 'gpu.log'}")


def describe_machine():
    code = "import json, torch, vivace.ops; i = json.loads(torch.ops.vivace.build_info()); "
    code += "print(torch.cuda.get_device_name(), '| torch', torch.__version__, '|', json.dumps(i))"
    record = run("machine", [sys.executable, "-c", code], 120)
    print(record["log"].strip()[-1500:])
    return record


def main():
    steps = sys.argv[1:] or STEPS
    unknown = [step for step in steps if step not in (*STEPS, "extra")]
    if unknown:
        sys.exit(f".ci/gpu: unknown step {unknown[0]!r}, expected {', '.join(STEPS)} or extra")
    library = os.environ["VIVACE_OPS_LIBRARY"]
    if not Path(library).is_file():
        sys.exit(f".ci/gpu: there is no operator library at {library}; build it, or set VIVACE_OPS_LIBRARY")
    OUT.mkdir(parents=True, exist_ok=True)
    machine = describe_machine()
    if machine["code"] != 0:
        sys.exit(".ci/gpu: the operators do not load, or there is no GPU (above)")
    records = []
    deadline = time.monotonic() + CHECK_SECONDS
    with ThreadPoolExecutor(PARALLEL) as pool:
        jobs = []
        if "sanitize" in steps:  # first: they take longest
            jobs += [pool.submit(run_sanitizer, tool, deadline) for tool in ("memcheck", "racecheck")]
        if "tests" in steps:
            paths = sorted((ROOT / "tests/python/ops").glob("test_*.py"), key=lambda p: -p.stat().st_size)
            paths.append(ROOT / "tests/python/bench/test_cuda.py")
            jobs += [pool.submit(run_tests, path, deadline) for path in paths if path.stem != "test_reference"]
        for job in jobs:
            records.append(job.result())
            if records[-1]["result"] == "FAILED":
                show(records[-1])
    if "engine" in steps:
        records.append(run_engine())
        print(f"\n== engine\n{records[-1]['log'].strip()[-3000:]}")
    for what in (*(("forward", "decode") if "bench" in steps else ()), *(("extra",) if "extra" in steps else ())):
        records.append(run_bench(what))
        print(f"\n== bench {what}\n{records[-1]['log'].strip()[-7000:]}")
    with open(OUT / "gpu.log", "w", encoding="utf-8") as file:
        file.writelines(f"==== {r['step']}\n{r['log']}\n" for r in records)
    with open(OUT / "gpu.json", "w", encoding="utf-8") as file:
        summary = [{key: value for key, value in r.items() if key != "log"} for r in records]
        json.dump({"machine": machine["log"].strip(), "steps": summary}, file, indent=1)
    print(f"\n{'step':34} {'result':9} {'seconds':>8}  detail")
    for record in records:
        print(f"{record['step']:34} {record['result']:9} {record['seconds']:8}  {record['detail'][:110]}")
    sys.exit(any(r["result"] == "FAILED" for r in records))


if __name__ == "__main__":
    main()
