"""Compiles forms of the Triton kernels for GPUs that are not here, and looks at what came out.

Run as a program, in a process in which Triton does not interpret: `python -m tests.kernels.compiling 90 100` prints a
JSON object: form -> architecture -> what `examine` finds.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from typing import Any

MODULES = ("linear_logprob", "linear_kl", "ppo_targets", "losses", "decode_attention", "rms_norm", "rotary")
MULTIPLES = ("hidden_size", "stride", "key_size", "value_size", "features")
SHARED_MEMORY = {"90": 232_448, "100": 232_448}  # bytes that one block can have
TENSOR_CORES = {"90": r"\bHGMMA\b", "100": r"\bUTC[A-Z]*MMA\b"}
NARROW = r"\bHMMA\b"  # the instruction of a warp, of which few rows make use
TF32 = r"\.TF32\b"


def forms() -> list[Any]:
    """Of every kernel there is."""
    found = []
    for name in MODULES:
        found += importlib.import_module(f"gearshift.kernels.{name}_triton").forms()
    return found


def compile_form(form: Any, architecture: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = form.launch.kernel
    constants = {**form.options, **form.launch.blocks}
    signature = {name: form.types.get(name, "constexpr") for name in function.arg_names}
    missing = [name for name, kind in signature.items() if kind == "constexpr" and name not in constants]
    assert not missing, f"{form.name}: no type for {missing}"
    # A launch passes a Python float as fp32 but where the kernel names another type.
    launched = {p.name: p.annotation_type or "fp32" for p in function.params if signature[p.name].startswith("fp")}
    assert launched == {name: signature[name] for name in launched}, form.name
    # As the launcher finds them at run time: PyTorch's tensors start on 16 bytes, most sizes are multiples of 16.
    aligned = [name for name, kind in signature.items() if kind.startswith("*") or name in MULTIPLES]
    attributes = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    options = {
        "num_warps": form.launch.num_warps,
        "num_stages": form.launch.num_stages,
        "enable_fp_fusion": form.launch.fuses,
    }
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def examine(form: Any, architecture: int) -> dict[str, Any]:
    """Registers, bytes of stack and shared memory, spills, and whether products went through tensor cores."""
    import triton

    compiled = compile_form(form, architecture)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def disassemble(option: str) -> str:
            tool = triton.knobs.nvidia.cuobjdump.path
            return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout

        usage = re.search(r"REG:(\d+) STACK:(\d+)", disassemble("-res-usage"))
        code = disassemble("-sass")
    assert usage is not None
    return {
        "registers": int(usage[1]),
        "stack": int(usage[2]),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "shared": compiled.metadata.shared,
        "tensor_cores": len(re.findall(NARROW if form.product == "narrow" else TENSOR_CORES[str(architecture)], code)),
        "tf32": len(re.findall(TF32, code)) + compiled.asm["ptx"].count(".tf32"),
        "product": form.product,
    }


if __name__ == "__main__":
    architectures = [int(word) for word in sys.argv[1:]]
    print(json.dumps({form.name: {str(a): examine(form, a) for a in architectures} for form in forms()}))
