"""The steps of .ci/gpu: each in its own process, time-limited; all run whatever fails; a table last."""

import contextlib
import importlib.util
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
STEPS = ("tests", "sanitize", "engine", "chatterbox", "bench")
STEP = ["step", "-r", "9", "--arch", "auto,80", "--tokens"]
ATTENTION = ["attention", "--arch", "auto,80", "--preset"]
#: Name -> (file in $OUT, `vivace bench`'s arguments, seconds it may take); a run that is cut off keeps what it has, and
#: runs of one file add to it. Those with slow peers come last.
BENCHES = {
    "forward": ("attention-h200", [*ATTENTION, "h200", "--op", "forward", "--peers", "cudnn,fa2", "-r", "9"], 60),
    "extra": ("attention-extra-h200", [*ATTENTION, "extra", "--peers", "cudnn,fa2", "-r", "7"], 80),
    "decode": (
        "decode-h200",
        ["attention", "--preset", "h200", "--op", "decode,overhead", "--peers", "cudnn,fa2", "-r", "9"],
        60,
    ),
    "step-lengths": ("step-h200", [*STEP, "1000,3000", "--rows", "2,128", "--peers", "eager"], 60),
    "cards": ("cards-h200", ["generate", "--vram", "8,12,16,24", "--peers", "none", "-r", "1"], 80),
    # Prompt and tokens together: 1,000 positions.
    "memory": (
        "memory-h200",
        ["generate", "--batch", "1,20,64", "--max-tokens", "852", "--peers", "none", "-r", "1"],
        50,
    ),
    "step": ("step-h200", [*STEP, "300", "--rows", "1,2,40,128", "--peers", "compile,eager"], 200),
    "generate": ("generate-h200", ["generate", "--peers", "eager,sdpa,compiled", "--peer-repetitions", "1"], 200),
}
#: compute-sanitizer's tools, what each leaves out, and what tests/python/ops/sanitize.py, which says why, is told.
SANITIZERS = {
    "memcheck": ([], []),
    "racecheck": ([], ["--brief", "--every-lane"]),
    "initcheck": ([], ["--brief", "--whole-rows"]),
    "synccheck": (["--kernel-name-exclude", "kernel_substring=persistent_kernel"], ["--brief", "--one-place"]),
}
#: Package -> tests that need it.
INTEGRATIONS = {
    "transformers": tuple(
        f"integrations/test_{name}.py" for name in ("models", "flash_attn", "torch_sdpa", "shim", "enable")
    ),
    "chatterbox": ("chatterbox/test_on_cuda.py",),
}
PARALLEL = 6  # processes that share the GPU; benchmarks run alone
CHECK_SECONDS = 280  # tests and sanitizer together
ENGINE_SECONDS = 120
CHATTERBOX_SECONDS = 100
HANG_SECONDS = 100  # one test
GRACE_SECONDS = 4  # after a step's time is over
FAILURES_SHOWN = 12  # of each step
LINE = 190


def start(command, log, **options):
    """In a session of its own, so that a time-out ends its children too."""
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, **options)


def run(name, command, seconds, **environment):
    """Runs one step; returns its record, with the whole output in ``log``."""
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        try:
            process = start(command, log, env={**os.environ, **environment})
        except OSError as error:
            return {"step": name, "code": "not run", "seconds": 0, "log": str(error)}
        return finish(name, process, log, seconds)


def finish(name, process, log, seconds):
    """Waits for a process; returns the step's record."""
    begin = time.monotonic()
    try:
        code = process.wait(max(seconds, 1))
    except subprocess.TimeoutExpired:
        end(process)
        code = "timeout"
    except KeyboardInterrupt:
        end(process)
        code = "interrupted"
    log.seek(0)
    return {"step": name, "code": code, "seconds": round(time.monotonic() - begin, 1), "log": log.read()}


def end(process):
    """As Ctrl-C does, so that a benchmark prints what it has and ends its own processes; then for good."""
    for number in (signal.SIGINT, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)


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
    left_out, told = SANITIZERS[tool]
    command = [program, "--tool", tool, *left_out, "--error-exitcode", "9", "--print-limit", "20"]
    command += [sys.executable, "tests/python/ops/sanitize.py", *told]
    record = run(tool, command, deadline - time.monotonic(), PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    lines = record["log"].splitlines()
    summary = [line.strip("= ") for line in lines if "SUMMARY" in line]
    ran = [line for line in lines if "groups of calls ran" in line]
    record["result"] = "ok" if record["code"] == 0 and ran else "FAILED"
    record["detail"] = "; ".join([*ran, *summary]) or f"ended with {record['code']}"
    worth = re.compile(r"Invalid|Error|hazard|Race|at .*\(|Traceback|vivace\.")
    record["failures"] = [] if record["result"] == "ok" else [line for line in lines if worth.search(line)][:40]
    return record


@contextlib.contextmanager
def prepared(names):
    """Name -> (process, log) of these benchmarks, all started side by side: each does its imports, then waits."""
    found, ready = {}, []
    with contextlib.ExitStack() as stack:
        for name in names:
            file, arguments, _ = BENCHES[name]
            log = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
            reading, writing = os.pipe()
            command = [sys.executable, ".ci/gpu_bench.py", str(writing), *arguments]
            command += ["--resume", str(OUT / f"{file}.json")]
            found[name] = start(command, log, stdin=subprocess.PIPE, pass_fds=(writing,)), log
            stack.callback(end, found[name][0])
            os.close(writing)
            ready.append(stack.enter_context(os.fdopen(reading)))
        for pipe in ready:
            pipe.read()  # it ends when the process has done its imports, or has ended
        yield found


def run_bench(what, process, log):
    file, arguments, seconds = BENCHES[what]
    if arguments[0] == "generate" and "VIVACE_EXECUTABLE" not in os.environ:
        return not_run(f"bench {what}", "VIVACE_EXECUTABLE is not set")
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(b"go\n")
        process.stdin.close()
    record = finish(f"bench {what}", process, log, seconds)
    record["result"] = "ok" if record["code"] == 0 else "FAILED"
    record["detail"] = str(OUT / f"{file}.json") if record["result"] == "ok" else f"ended with {record['code']}"
    record["failures"] = []
    return record


def run_report(files):
    """The page and the figures of what this round measured; of two runs of one batch it takes the first one's."""
    first = OUT / f"{BENCHES['generate'][0]}.json"
    runs = [str(path) for path in sorted(files, key=lambda path: path != first) if path.is_file()]
    command = [sys.executable, "-m", "vivace", "report", *runs, "-o", str(OUT / "report.html")]
    record = run("report", [*command, "--figures", str(OUT / "figures")], 60)
    record["result"] = "ok" if record["code"] == 0 else "FAILED"
    record["detail"] = str(OUT / "report.html")
    record["failures"] = [] if record["code"] == 0 else record["log"].splitlines()[-4:]
    return record


def not_run(step, why):
    return {"step": step, "result": "not run", "seconds": 0, "detail": why, "failures": [], "log": ""}


def run_engine():
    if "VIVACE_EXECUTABLE" not in os.environ:
        return not_run("engine", "VIVACE_EXECUTABLE is not set")
    record = run("engine", [sys.executable, ".ci/gpu_engine.py"], ENGINE_SECONDS)
    record["result"] = "ok" if record["code"] == 0 else "FAILED"
    record["detail"] = f"ended with {record['code']}"
    record["failures"] = []
    return record


def run_chatterbox():
    """Chatterbox's own T3, where it is installed, as it is and accelerated."""
    command = [sys.executable, "-W", "ignore", ".ci/gpu_chatterbox.py", "--json", str(OUT / "chatterbox-h200.json")]
    record = run("chatterbox", command, CHATTERBOX_SECONDS)
    if record["code"] == 0 and "skipped" in record["log"]:
        return not_run("chatterbox", record["log"].strip().splitlines()[-1])
    record["result"] = "ok" if record["code"] == 0 else "FAILED"
    record["detail"] = f"ended with {record['code']}"
    record["failures"] = [line for line in record["log"].splitlines() if line.startswith("FAILED")]
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
    resumed = "--resume" in sys.argv
    steps = [step for step in sys.argv[1:] if step != "--resume"] or STEPS
    unknown = [step for step in steps if step not in (*STEPS, *BENCHES)]
    if unknown:
        sys.exit(
            f".ci/gpu: unknown step {unknown[0]!r}, expected {', '.join(STEPS)}, or one of bench: {', '.join(BENCHES)}"
        )
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
            jobs += [pool.submit(run_sanitizer, tool, deadline) for tool in SANITIZERS]
        if "tests" in steps:
            paths = sorted((ROOT / "tests/python/ops").glob("test_*.py"), key=lambda p: -p.stat().st_size)
            paths.append(ROOT / "tests/python/bench/test_cuda.py")
            for package, tests in INTEGRATIONS.items():
                paths += [ROOT / "tests/python" / name for name in tests if importlib.util.find_spec(package)]
            jobs += [pool.submit(run_tests, path, deadline) for path in paths if path.stem != "test_reference"]
        for job in jobs:
            records.append(job.result())
            if records[-1]["result"] == "FAILED":
                show(records[-1])
    if "engine" in steps:
        records.append(run_engine())
        print(f"\n== engine\n{records[-1]['log'].strip()[-3000:]}")
    if "chatterbox" in steps:
        records.append(run_chatterbox())
        print(f"\n== chatterbox\n{records[-1]['log'].strip()[-3000:]}")
    wanted = [what for what in BENCHES if what in steps or "bench" in steps]
    files = list(dict.fromkeys(OUT / f"{BENCHES[what][0]}.json" for what in wanted))
    for path in files if not resumed else ():
        path.unlink(missing_ok=True)  # written case by case: an old one is not to be taken for a new one
    with prepared(wanted) as ready:
        for what in wanted:
            records.append(run_bench(what, *ready[what]))
            print(f"\n== bench {what}\n{records[-1]['log'].strip()[-7000:]}", flush=True)
            if records[-1].get("code") == "interrupted":
                break
    if any(path.is_file() for path in files):
        records.append(run_report(files))
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
