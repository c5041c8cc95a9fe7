"""Everything that a GPU is needed for, on a machine that has one and no network, in one go or in a few.

    python benchmarks/gpu.py wheels DIR                   here: the packages that such a machine is likely to lack
    python benchmarks/gpu.py run OUT --wheels DIR         there: tests of the kernels, all benchmarks, steps of PPO
    python benchmarks/gpu.py run OUT linear_kl rollout    there: some parts only
    python benchmarks/gpu.py run OUT --within 570         there: no longer than so many seconds

The other machine needs a checkout of this repository and a Python with torch for its GPU, triton, transformers,
accelerate, matplotlib and pytest. `run` installs the wheels in a folder of its own, which goes when it ends.

Each part has a time limit and a log; one that fails is reported, and the next goes on. Results are in OUT, their names
after the GPU's: NAME-PART.log, .json, .png (ppo: .jsonl). `--archive`: as one .tar.gz instead, written anew after every
part. `--dry-run` prints the commands. `--tiny` rehearses with toy sizes, on a CPU too.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if sys.path[0] == str(ROOT / "benchmarks"):
    sys.path[0] = str(ROOT)  # `kernels` of this folder would hide Hugging Face's package of that name from transformers

# --- wheels ----------------------------------------------------------------------------------------------------------

# What deepspeed and the configs need beyond torch and transformers, in the versions that are installed here. All go
# without their own dependencies: torch above all must stay the other machine's.
NEEDED = ["hjson", "py-cpuinfo", "ninja", "msgpack", "einops", "psutil", "tqdm"]
NEEDED += ["pydantic", "pydantic_core", "annotated-types", "typing-inspection", "typing_extensions"]
PEERS = ["liger-kernel==0.8.5"]  # pure Python; needs no more than torch and triton
PYTHON = "3.12"
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (28, 27, 17, 12, 5)] + ["manylinux2014_x86_64", "manylinux2010_x86_64"]


def wheel_commands(folder: Path) -> list[list[str]]:
    """deepspeed is published as source only; built without its operators it is pure Python, for any machine."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    only = ["--no-deps", "--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp"]
    for platform in PLATFORMS:
        only += ["--platform", platform]
    pinned = [f"{name}=={importlib.metadata.version(name)}" for name in NEEDED]
    return [
        [*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), constraint("deepspeed")],
        [*pip, "download", *only, "--dest", str(folder), *pinned, *PEERS],
    ]


def constraint(name: str) -> str:
    """`name==version` of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith(f"{name}=="))


def wheels(options: argparse.Namespace) -> int:
    for command in wheel_commands(options.folder):
        print(shlex.join(command), flush=True)
        if not options.dry_run:
            subprocess.run(command, check=True, env={**os.environ, "DS_BUILD_OPS": "0"})
    return 0


def install_command(folder: Path, site: Path) -> list[str]:
    found = sorted(map(str, folder.glob("*.whl")))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    return [*pip, "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--target", str(site), *found]


# --- parts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Commands that run one after the other until one fails, and the files that they leave: result -> its suffix."""

    name: str
    limit: float  # seconds
    commands: list[list[str]]
    results: dict[Path, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """What the parts' commands depend on."""

    work: Path  # a folder for files that are not results
    gpus: int  # 0: none, a rehearsal
    tiny: bool
    compile_limit: float = 60  # seconds for torch.compile, one of the peers; 0: without it

    @property
    def ranks(self) -> int:
        return max(1, self.gpus)


def tests(setting: Setting) -> Part:
    """Of the kernels and of captured decoding; not the check that kernels compile for other GPUs, which needs none.

    Compiling takes most of it: several processes, where pytest-xdist is there.
    """
    # Of the functions for processors, whose tests fail without them; the kernels' do not.
    build = ["sh", "-c", f"{shlex.quote(sys.executable)} setup.py --quiet build_ext --inplace || echo not built"]
    command = [sys.executable, "-m", "pytest", "tests/kernels", "tests/engine/test_decoder.py"]
    command += ["-q", "-p", "no:cacheprovider", "--ignore=tests/kernels/test_compiled.py"]
    cores = os.cpu_count() or 1
    if importlib.util.find_spec("xdist") and cores > 4:
        command += ["-n", str(min(12, cores - 2))]
    if setting.tiny:
        command += ["-k", "value_loss"]
    # The interpreter serves CPU tensors; without a GPU it stays on.
    environment = {"OMP_NUM_THREADS": "1"} | ({"TRITON_INTERPRET": "0"} if setting.gpus else {})
    return Part("tests", 300, [build, command], environment=environment)


def kernel(name: str, limit: float) -> Callable[[Setting], Part]:
    def part(setting: Setting) -> Part:
        out = setting.work / f"{name}.json"
        command = [sys.executable, "-m", f"benchmarks.kernels.{name}", "--out", str(out)]
        command += ["--compile-limit", str(setting.compile_limit)] if not setting.tiny else []
        if setting.tiny:
            command += ["--tokens", "64", "--hidden", "32", "--vocabularies", "512", "--sequences", "8"]
            command += ["--lengths", "32", "--repeats", "2", "--compile-limit", "0"]
        return Part(name, limit, [command], {out: ".json", out.with_suffix(".png"): ".png"})

    return part


def launched(setting: Setting, script: str, sizes: dict[str, int], out: Path) -> list[str]:
    """A benchmark under DeepSpeed's launcher, a rank for each GPU."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", os.devnull]
    launcher += ["--num_gpus" if setting.gpus else "--num_accelerators", str(setting.ranks)]
    return [*launcher, str(ROOT / "benchmarks" / script), *words(setting, sizes), "--out", str(out)]


def words(setting: Setting, sizes: dict[str, int]) -> list[str]:
    named = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    return [*named, "--dtype", "bf16" if setting.gpus else "fp32"]


def decode(setting: Setting) -> Part:
    """On one GPU: a Llama of 1.1 billion parameters, decoded with and without CUDA graphs and flash-attn."""
    out = setting.work / "decode.json"
    sizes = {"kv-heads": 8, "repeats": 3}
    if setting.tiny:
        sizes = {"hidden": 48, "layers": 2, "heads": 2, "vocabulary": 512, "prompt-tokens": 8, "new-tokens": 8}
        sizes |= {"repeats": 1, "rows": 2}
    command = [sys.executable, str(ROOT / "benchmarks/decode.py"), *words(setting, sizes), "--out", str(out)]
    return Part("decode", 420, [command], {out: ".json"})


def shift(setting: Setting) -> Part:
    """A Llama of 1.1 billion parameters, into one replica over all GPUs."""
    out = setting.work / "shift.json"
    sizes = {"hidden": 1536, "layers": 36, "heads": 12, "vocabulary": 32000, "repeats": 5}
    if setting.tiny:
        sizes = {"hidden": 48, "layers": 2, "heads": 2, "vocabulary": 512, "repeats": 1}
    command = launched(setting, "shift.py", sizes, out)
    return Part("shift", 300, [command], {out: ".json", out.with_suffix(".png"): ".png"})


def rollout(setting: Setting) -> Part:
    """A Llama of 1.1 billion parameters; its 12 heads divide by 1, 2, 3 and 4 GPUs."""
    out = setting.work / "rollout.json"
    sizes = {
        "hidden": 1536, "layers": 36, "heads": 12, "vocabulary": 32000, "prompts": 64, "prompt-tokens": 256,
        "new-tokens": 128, "repeats": 2,
    }  # fmt: skip
    if setting.tiny:
        sizes |= {"hidden": 48, "layers": 2, "vocabulary": 512, "prompts": 4, "prompt-tokens": 8, "new-tokens": 8}
        sizes |= {"repeats": 1}
    return Part("rollout", 420, [launched(setting, "rollout.py", sizes, out)], {out: ".json"})


def ppo(setting: Setting) -> Part:
    """Three iterations, since the first one also compiles; on a policy and a reward model with random weights."""
    models, config, run = (setting.work / name for name in ("models", "models/ppo.yaml", "ppo"))
    make = [sys.executable, str(ROOT / "benchmarks/gpu_models.py"), str(models), "--ranks", str(setting.ranks)]
    make += ["--tiny"] if setting.tiny else []
    train = [sys.executable, "-m", "gearshift.launch", "ppo", str(config), "--run.folder", str(run)]
    return Part("ppo", 540, [make, train], {run / "metrics.jsonl": ".jsonl", run / "config.yaml": ".yaml"})


WORTHWHILE = 60  # seconds under which no part is started
PARTS: dict[str, Callable[[Setting], Part]] = {
    "tests": tests,
    "linear_logprob": kernel("linear_logprob", 480),
    "linear_kl": kernel("linear_kl", 420),
    "ppo": ppo,
    "decode": decode,
    "rollout": rollout,
    "ppo_targets": kernel("ppo_targets", 240),
    "policy_loss": kernel("policy_loss", 120),
    "value_loss": kernel("value_loss", 120),
    "shift": shift,
}
KERNELS = ("linear_logprob", "linear_kl", "ppo_targets", "policy_loss", "value_loss")


def chosen(names: Sequence[str]) -> list[str]:
    """In the order of PARTS; "kernels" stands for the five benchmarks of operations."""
    wanted = {part for name in names for part in (KERNELS if name == "kernels" else (name,))} or set(PARTS)
    return [name for name in PARTS if name in wanted]


# --- run -------------------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    started = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="gearshift-gpu-"))
    try:
        gpu, count = find_gpus()
        if not (count or options.tiny or options.dry_run):
            print("no GPU was found (--tiny rehearses without one)", file=sys.stderr)
            return 2
        print(f"{gpu}, {count} of them; parts: {', '.join(chosen(options.parts))}", flush=True)
        environment = environment_of(options, work)
        setting = Setting(work, count, options.tiny, options.compile_limit)
        out = work / "results" if options.archive else options.out
        told = []
        for name in chosen(options.parts):
            part = PARTS[name](setting)
            if options.dry_run:
                tell(part)
                continue
            left = options.within - (time.monotonic() - started) if options.within else part.limit
            prefix = f"{slug(gpu)}-{name}"
            told.append(run_part(part, left, out, prefix, environment))
            if options.archive:
                pack(out, options.out / f"{slug(gpu)}.tar.gz")
        print("\n" + "\n".join(told) if told else "", flush=True)
        return 0 if all(": done" in line for line in told) else 1
    finally:
        shutil.rmtree(work, ignore_errors=True)


def find_gpus() -> tuple[str, int]:
    """Name and number of GPUs, as torch finds them: in a process of its own, which gives the GPU back."""
    code = "import torch; n = torch.cuda.device_count(); print(n, torch.cuda.get_device_name() if n else 'no GPU')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, _, name = done.stdout.strip().splitlines()[-1].partition(" ")
    return name, int(count)


def environment_of(options: argparse.Namespace, work: Path) -> dict[str, str]:
    """The wheels and this repository can be imported; nothing is looked up on a network."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    if options.wheels:
        site = work / "site"
        command = install_command(options.wheels, site)
        print(shlex.join(command), flush=True)
        if not options.dry_run:
            subprocess.run(command, check=True)
        paths.insert(0, str(site))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return environment | {
        "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip


def run_part(part: Part, left: float, out: Path, prefix: str, environment: dict[str, str]) -> str:
    """One line that says how it went. `left`: seconds that this whole call still has."""
    limit = min(part.limit, left)
    if limit < WORTHWHILE:
        return f"{part.name}: not run, {max(0, limit):.0f} s were left"
    out.mkdir(parents=True, exist_ok=True)
    log = out / f"{prefix}.log"
    start, end = time.monotonic(), time.monotonic() + limit
    problem = None
    tell(part)
    with log.open("w", encoding="utf-8") as file:
        for command in part.commands:
            file.write(f"$ {shlex.join(command)}\n")
            file.flush()
            problem = run_command(command, file, end, {**environment, **part.environment})
            if problem:
                break
    print(tail(log), flush=True)
    for result, suffix in part.results.items():
        if result.exists():
            shutil.copyfile(result, out / f"{prefix}{suffix}")
        else:
            problem = problem or f"left no {result.name}"
    return f"{part.name}: {problem or 'done'}, {time.monotonic() - start:.0f} s"


def tell(part: Part) -> None:
    for command in part.commands:
        words = [f"{name}={value}" for name, value in part.environment.items()] + command
        print(f"[{part.name}, at most {part.limit:.0f} s] {shlex.join(words)}", flush=True)


def run_command(command: list[str], log: Any, end: float, environment: dict[str, str]) -> str | None:
    """What went wrong, or None. A command that runs over ends with all that it started."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        code = process.wait(timeout=max(1.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        end_group(process)
        return "STOPPED at its time limit"
    except BaseException:  # Ctrl-C
        end_group(process)
        raise
    return f"FAILED with exit code {code}" if code else None


def end_group(process: subprocess.Popen[bytes]) -> None:
    """DeepSpeed's launcher needs a moment to end its ranks."""
    for number, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=patience)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    process.poll()


def tail(log: Path, lines: int = 40) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def pack(folder: Path, archive: Path) -> None:
    if not folder.exists():
        return
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz") as file:
        for path in sorted(folder.iterdir()):
            file.add(path, path.name)


def slug(name: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


# --- command line ----------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = arguments.add_subparsers(dest="command", required=True)
    fetch = commands.add_parser("wheels", help="collect wheels for the other machine")
    fetch.add_argument("folder", type=Path, metavar="DIR")
    fetch.add_argument("--dry-run", action="store_true", help="print the commands only")
    start = commands.add_parser("run", help="run the parts on a machine with a GPU")
    start.add_argument("out", type=Path, metavar="OUT")
    start.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}, kernels (five); none: all")
    start.add_argument("--wheels", type=Path, metavar="DIR", help="what `wheels` has collected, installed first")
    start.add_argument("--within", type=float, help="seconds that the whole call may take")
    start.add_argument("--compile-limit", type=float, default=60, help="seconds for torch.compile; 0: without it")
    start.add_argument("--archive", action="store_true", help="results as one .tar.gz")
    start.add_argument("--tiny", action="store_true", help="toy sizes")
    start.add_argument("--dry-run", action="store_true", help="print the commands only")
    return arguments


def main() -> int:
    arguments = parser()
    options = arguments.parse_args()
    if options.command == "run":
        unknown = [name for name in options.parts if name not in (*PARTS, "kernels")]
        if unknown:
            arguments.error(f"no such part: {unknown[0]}; there are {', '.join(PARTS)} and kernels")
        if options.wheels and not list(options.wheels.glob("*.whl")):
            arguments.error(f"--wheels: there are no wheels in {options.wheels}")
    return {"wheels": wheels, "run": run}[options.command](options)


if __name__ == "__main__":
    sys.exit(main())
