"""The operator library's file, and how Python finds and loads it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vivace import library

needs_readelf = pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")


def readelf(*arguments):
    return subprocess.run(["readelf", "-W", *arguments], check=True, capture_output=True, text=True).stdout


def run_python(code, **environment):
    # The package that this process uses: the installed one, or the source tree's.
    environment = {**os.environ, "PYTHONPATH": str(Path(library.__file__).parents[1]), **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


@needs_readelf
def test_the_library_has_no_python_symbol_and_exports_nothing(operator_library):
    undefined, defined = set(), set()
    for line in readelf("--dyn-syms", str(operator_library)).splitlines():
        fields = line.split()
        if len(fields) >= 8 and fields[0].endswith(":") and fields[0] != "Num:":
            (undefined if fields[6] == "UND" else defined).add(fields[7].split("@")[0])
    assert undefined, "readelf gave no symbols"
    assert not {name for name in undefined if name.startswith(("Py", "_Py"))}
    assert not defined - {"_init", "_fini"}, defined


@needs_readelf
def test_the_library_calls_torch_through_its_c_interface_alone(operator_library):
    torch_cpp = re.compile(r"_Z.*(2at|3c10|5torch|8caffe2)")
    symbols = readelf("--dyn-syms", str(operator_library))
    assert "aoti_torch_library_impl" in symbols or "torch_library_impl" in symbols
    assert not [line for line in symbols.splitlines() if " UND " in line and torch_cpp.search(line)]


@needs_readelf
def test_the_library_needs_neither_python_nor_a_cuda_runtime(operator_library):
    dynamic = readelf("-d", str(operator_library))
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert "libtorch.so" in needed
    assert not [
        name
        for name in needed
        if name.startswith(("libpython", "libcudart", "libtorch_cuda", "libc10_cuda", "libcuda."))
    ]
    assert re.findall(r"\(RUNPATH\).*\[(.*)\]", dynamic) == ["$ORIGIN/../../torch/lib"]


@needs_readelf
def test_cuda_symbols_of_torch_are_weak(operator_library):
    for line in readelf("--dyn-syms", str(operator_library)).splitlines():
        if " UND " in line and "cuda_stream" in line:
            assert " WEAK " in line


def test_the_file_says_what_it_was_built_for_without_being_loaded(operator_library):
    import vivace

    assert library.read_build_info(operator_library) == vivace.build_info()


def test_import_is_silent_and_brings_no_torch():
    run = run_python("import sys, vivace; assert 'torch' not in sys.modules; assert vivace.__version__")
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_import_of_the_operators_takes_less_than_a_second_beyond_torch():
    code = "import time, torch; t = time.process_time(); import vivace.ops; print(time.process_time() - t)"
    seconds = float(run_python(code).stdout)
    assert seconds < 1.0


def test_availability_never_raises_and_says_what_is_missing(tmp_path):
    missing = tmp_path / "nowhere.so"
    code = "import json, vivace; print(json.dumps([vivace.is_available(), vivace.unavailable_reason()]))"
    available, reason = json.loads(run_python(code, VIVACE_OPS_LIBRARY=str(missing)).stdout)
    assert not available
    assert str(missing) in reason and "VIVACE_OPS_LIBRARY" in reason
    available, reason = json.loads(run_python(code).stdout)
    assert available and reason is None


def test_a_library_that_does_not_load_is_reported_with_the_missing_symbol_and_both_versions(tmp_path):
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    source, broken = tmp_path / "broken.cpp", tmp_path / "broken.so"
    info = json.dumps({"torch_built": "9.9.9", "torch_target": "9.8"})
    source.write_text(
        'extern "C" void a_symbol_that_no_torch_has(); void* use = (void*)a_symbol_that_no_torch_has;\n'
        f'extern const char info[] = R"(VIVACE_BUILD_INFO={info})";\n'
    )
    subprocess.run([compiler, "-shared", "-fPIC", "-o", broken, source], check=True)
    run = run_python("import vivace; vivace.attention", VIVACE_OPS_LIBRARY=str(broken))
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert "a_symbol_that_no_torch_has" in last
    import torch

    assert "built with torch 9.9.9 for torch 9.8 or newer" in last and torch.__version__ in last


def test_force_arch_starts_as_the_environment_and_refuses_what_does_not_exist():
    code = "import vivace; print(vivace.force_arch(80), vivace.force_arch(0))"
    assert run_python(code, VIVACE_ARCH="generic").stdout.split() == ["-1", "80"]
    run = run_python("import vivace; vivace.force_arch(75)")
    assert "vivace.force_arch: arch is 75, expected 0 (automatic), 80, 90 or -1 (generic)" in run.stderr
    run = run_python(code, VIVACE_ARCH="volta")
    assert 'VIVACE_ARCH is "volta"' in run.stderr


def test_an_unknown_set_of_vector_instructions_is_an_error_with_those_there_are(operator_library):
    code = "import torch, vivace.ops; torch.ops.vivace.rms_norm(torch.ones(1, 8), torch.ones(8), 1e-5)"
    for name in ("baseline", ""):
        assert run_python(code, VIVACE_CPU=name).returncode == 0
    run = run_python(code, VIVACE_CPU="avx3")
    assert run.returncode != 0
    assert 'the environment\'s VIVACE_CPU is "avx3", expected one of baseline' in run.stderr
