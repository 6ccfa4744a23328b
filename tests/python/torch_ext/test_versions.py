"""One libvivace_ops.so runs with every torch from 2.10 on, from Python and from C++.

$VIVACE_TORCH_ENVS: virtual environments with other versions of torch, separated by colons.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PROGRAMS = ROOT / "tests" / "torch_ext"
OTHERS = [Path(p) for p in os.environ.get("VIVACE_TORCH_ENVS", "").split(":") if p]


@pytest.fixture(
    params=[
        pytest.param(Path(sys.prefix), id="this-torch"),
        *(pytest.param(path, id=path.name) for path in OTHERS),
        *(
            []
            if OTHERS
            else [
                pytest.param(
                    None,
                    id="other-torches",
                    marks=pytest.mark.skip(reason="VIVACE_TORCH_ENVS names no environments with other torch versions"),
                )
            ]
        ),
    ],
    scope="module",
)
def python(request):
    executable = request.param / "bin" / "python"
    assert executable.exists(), f"VIVACE_TORCH_ENVS: there is no {executable}"
    return executable


@pytest.fixture(scope="module")
def module(python, operator_library, tmp_path_factory):
    """What use_operators.py says under that torch, and the TorchScript module that it saved."""
    path = tmp_path_factory.mktemp("module") / "attention.pt"
    environment = {**os.environ, "VIVACE_OPS_LIBRARY": str(operator_library)}
    run = subprocess.run(
        [python, PROGRAMS / "use_operators.py", ROOT / "python", path], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1]), path


def test_python_gets_the_same_results_with_every_torch(module):
    report, _ = module
    # float32: some rounding; 16 bits: half a unit of the output's last place at a magnitude of 4
    for dtype, bound in (("torch.float32", 1e-5), ("torch.bfloat16", 2.0**-7), ("torch.float16", 2.0**-10)):
        assert report["worst"][dtype] < bound, report
    assert report["appended"] and report["gradient"] and report["compiles"], report


@pytest.fixture(scope="module")
def program(python, tmp_path_factory):
    """load_operators.cpp, built with that torch's headers and libraries."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    code = "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
    torch_dir = Path(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip())
    executable = tmp_path_factory.mktemp("program") / "load_operators"
    include, lib, objects = torch_dir / "include", torch_dir / "lib", executable.with_suffix(".o")
    launcher = [ccache] if (ccache := shutil.which("ccache")) else []
    compile_command = [*launcher, compiler, "-std=c++20", "-O0", "-c", PROGRAMS / "load_operators.cpp", "-o", objects]
    compile_command += ["-isystem", include, "-isystem", include / "torch" / "csrc" / "api" / "include"]
    subprocess.run(compile_command, check=True)
    link_command = [
        compiler,
        objects,
        "-o",
        executable,
        f"-L{lib}",
        f"-Wl,-rpath,{lib}",
        "-Wl,--no-as-needed",
        "-ltorch",
    ]
    subprocess.run([*link_command, "-ltorch_cpu", "-lc10", "-ldl", "-Wl,--allow-shlib-undefined"], check=True)
    return executable


def test_cpp_runs_a_torchscript_module_with_every_torch(program, module, operator_library):
    run = subprocess.run([program, operator_library, module[1]], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_library_loads_where_torch_has_no_cuda(program, module, operator_library, tmp_path):
    # libtorch.so is empty and depends on torch's parts; one that depends on nothing leaves the CUDA part out.
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    source = tmp_path / "empty.cpp"
    source.write_text("")
    stub = tmp_path / "libtorch.so"
    subprocess.run([compiler, "-shared", "-Wl,-soname,libtorch.so", "-o", stub, source], check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    run = subprocess.run([program, operator_library, module[1]], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "without torch CUDA" in run.stdout
