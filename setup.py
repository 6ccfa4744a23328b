"""Builds the wheel: a thin layer over CMakeLists.txt.

VIVACE_CUDA=auto|on|off, VIVACE_CUDA_ARCHITECTURES="80-real;90a-real", VIVACE_BUILD_DIR and CMAKE_ARGS in the
environment are passed on; MAX_JOBS limits the parallel compilations.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class CMakeExtension(Extension):
    def __init__(self):
        super().__init__("vivace._C", sources=[])


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        # In a wheel: <build_lib>/vivace; with `pip install -e .`: python/vivace.
        prefix = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build_dir = Path(
            os.environ.get("VIVACE_BUILD_DIR", ROOT / "build" / f"wheel-{sys.version_info[0]}{sys.version_info[1]}")
        )
        options = [
            f"-DPython3_EXECUTABLE={sys.executable}",
            f"-DPython_EXECUTABLE={sys.executable}",
            "-DVIVACE_BUILD_PYTHON=ON",
            "-DVIVACE_BUILD_HOST=ON",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
        ]
        for name in ("VIVACE_CUDA", "VIVACE_CUDA_ARCHITECTURES"):
            if os.environ.get(name):
                options.append(f"-D{name}={os.environ[name]}")
        options += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run(["cmake", "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja", *options], check=True)
        subprocess.run(["cmake", "--build", str(build_dir), "-j", jobs], check=True)
        subprocess.run(["cmake", "--install", str(build_dir), "--prefix", str(prefix), "--strip"], check=True)


class BuildPackage(build_py):
    """Puts vivace.pth beside the package: where Python starts with VIVACE_ENABLE set, it runs vivace.startup."""

    def run(self):
        super().run()
        if not self.editable_mode:
            self.copy_file(str(ROOT / "python" / "vivace.pth"), str(Path(self.build_lib) / "vivace.pth"))

    def get_outputs(self, include_bytecode=True):
        return [*super().get_outputs(include_bytecode), str(Path(self.build_lib) / "vivace.pth")]


setup(ext_modules=[CMakeExtension()], cmdclass={"build_ext": CMakeBuild, "build_py": BuildPackage})
