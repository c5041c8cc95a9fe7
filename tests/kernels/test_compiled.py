"""Every form of every Triton kernel compiles for sm_90 and sm_100, without a GPU, into what it is meant to be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.kernels.compiling import SHARED_MEMORY, forms

ARCHITECTURES = ("90", "100")


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compiling", *ARCHITECTURES]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("form", [form.name for form in forms()])
def test_a_form_keeps_to_its_registers_and_its_tensor_cores(
    compiled: dict[str, Any], form: str, architecture: str
) -> None:
    found = compiled[form][architecture]
    assert found["stack"] == 0, found
    assert found["spills"] == 0, found
    assert found["shared"] <= SHARED_MEMORY[architecture], found
    assert found["tf32"] == 0, found
    if found["product"] in ("half", "narrow"):
        assert found["tensor_cores"] > 0, found
