"""Everything about the package is in pyproject.toml; this file serves tools that still start from setup.py."""

from setuptools import setup

setup()
