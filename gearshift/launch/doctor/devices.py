"""What torch computes on and talks through, and Gearshift's own compiled library."""

from __future__ import annotations

from collections.abc import Iterator

from gearshift.errors import one_line
from gearshift.launch.doctor.findings import Finding, note, ok, wrong
from gearshift.launch.doctor.machine import GIB


def findings(gpus: int) -> Iterator[Finding]:
    """`gpus`: those that a run would be started on (`launcher.visible_gpus`)."""
    try:
        import torch
    except Exception as error:  # a library that it needs, a file that is damaged
        yield wrong("torch", f"cannot be imported: {one_line(error)}", "install it again")
        return
    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    yield devices_finding(gpus, usable, torch.version.cuda or torch.version.hip)
    for number in range(usable):
        free, total = torch.cuda.mem_get_info(number)
        yield memory_finding(number, torch.cuda.get_device_name(number), free, total)
    if usable and not torch.cuda.is_bf16_supported():
        yield note("bf16", "these GPUs do not have it", "runs need run.dtype: fp32")
    yield from backend_findings(
        usable, torch.distributed.is_available(),
        torch.distributed.is_nccl_available(), torch.distributed.is_gloo_available(),
    )  # fmt: skip


def devices_finding(seen: int, usable: int, built_for: str | None) -> Finding:
    """GPUs that the driver shows, and those that torch, `built_for` a version of CUDA or ROCm, can use."""
    if not seen and not usable:
        return note("devices", "no GPU", "runs go over the CPU: fine for tests, far too slow for large models")
    if seen <= usable:
        return ok("devices", f"{usable} GPUs")
    if built_for is None:
        return wrong(
            "devices", f"{seen} GPUs, and a torch for CPUs alone", "install a torch for CUDA (see pytorch.org)"
        )
    why = f"install a driver for CUDA {built_for}, or a torch for the driver that is there"
    return wrong("devices", f"{seen} GPUs, of which torch can use {usable}", why)


def memory_finding(number: int, name: str, free: int, total: int) -> Finding:
    what, found = f"GPU {number}", f"{name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if free < 0.8 * total:
        return note(what, found, "something else is using it (nvidia-smi): end it, or plan for less")
    return ok(what, found)


def backend_findings(gpus: int, distributed: bool, nccl: bool, gloo: bool) -> Iterator[Finding]:
    """`distributed`: torch was built with it at all."""
    if not distributed:
        yield wrong("backends", "this torch has no torch.distributed", "install one that has")
        return
    needed, there = ("nccl", nccl) if gpus else ("gloo", gloo)
    found = " and ".join(name for name, has in (("nccl", nccl), ("gloo", gloo)) if has) or "none"
    yield ok("backends", found) if there else wrong("backends", found, f"a run needs {needed}: install a torch with it")


def library_finding() -> Finding:
    """The C library of `gearshift.kernels.native`."""
    from gearshift.kernels import native

    what = "C library"
    try:
        library = native.built()
    except OSError as error:
        return wrong(what, f"cannot be loaded: {one_line(error)}", "build it again: pip install -e .")
    if library is None:
        return note(what, "not built", "the CPU takes slower ways through torch: pip install -e . with a C compiler")
    return ok(what, str(library._name))
