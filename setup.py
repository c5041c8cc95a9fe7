"""Builds the library of C kernels, where a compiler is at hand; all else about the package is in pyproject.toml."""

from glob import glob

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "gearshift.kernels.native._library",  # no module of Python: loaded through ctypes
            sorted(glob("gearshift/kernels/native/*.c")),
            depends=sorted(glob("gearshift/kernels/native/*.h")),
            extra_compile_args=["-O3", "-fvisibility=hidden", "-pthread"],
            extra_link_args=["-pthread"],
            libraries=["m"],
            optional=True,  # without a compiler the operations go through torch
        )
    ]
)
