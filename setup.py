"""Builds the library of C kernels, where a compiler is at hand; all else about the package is in pyproject.toml."""

import platform
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# One library for each kind of processor, of which the first that the machine can run is loaded
# (gearshift/kernels/native/__init__.py has the same names).
KINDS = {"plain": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    avx2 = ["-mavx2", "-mfma"]
    KINDS |= {"avx2": avx2, "avx512": [*avx2, "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq"]}


class OneByOne(build_ext):
    """Their object files have the same names."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = None


setup(
    cmdclass={"build_ext": OneByOne},
    ext_modules=[
        Extension(
            f"gearshift.kernels.native._{kind}",  # no module of Python: loaded through ctypes
            sorted(glob("gearshift/kernels/native/*.c")),
            depends=sorted(glob("gearshift/kernels/native/*.h")),
            extra_compile_args=["-O3", "-fvisibility=hidden", "-pthread", *flags],
            extra_link_args=["-pthread"],
            libraries=["m"],
            optional=True,  # without a compiler the operations go through torch
        )
        for kind, flags in KINDS.items()
    ],
)
