"""Builds the library of C kernels, where a compiler is at hand; all else about the package is in pyproject.toml."""

from glob import glob

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "gearshift.kernels.native._library",  # no module of Python: loaded through ctypes
            sorted(glob("gearshift/kernels/native/*.c")),
            depends=["gearshift/kernels/native/native.h"],
            extra_compile_args=["-O3", "-fvisibility=hidden"],
            libraries=["m"],
            optional=True,  # without a compiler the operations go through torch
        )
    ]
)
