"""`gearshift doctor [--hostfile HOSTS]`: would a run start here, and what is missing if not."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from gearshift.launch.arguments import Parser
from gearshift.launch.doctor.findings import NOTE, WRONG, Finding, note
from gearshift.launch.overrides import LAUNCHER, Arguments, check_launcher


def main(argv: Sequence[str] | None = None) -> int:
    """Prints one line for each check; returns 1 when something would break a run, else 0. Raises UserError."""
    parser = Parser(prog="gearshift doctor", description=(__doc__ or "").split(": ", 1)[1])
    parser.add_argument("--hostfile", help="the hosts of a run, as the launcher takes them: HOST slots=N a line")
    parser.add_argument("--run-folder", type=Path, default=Path("runs"), help="where runs are written (default: runs)")
    parser.add_argument("--quick", action="store_true", help="start no processes: no all-reduce")
    for name in LAUNCHER:
        parser.add_argument(f"--{name}", help="as for a run: goes on to DeepSpeed's launcher")
    options = parser.parse_args(argv)
    launcher = {name: value for name in LAUNCHER if (value := getattr(options, name)) is not None}
    arguments = Arguments(config="none", hostfile=options.hostfile, launcher=launcher)
    check_launcher(arguments)
    found = []
    for finding in checks(arguments, options.run_folder, options.quick):
        print(finding.line(), flush=True)
        found.append(finding)
    broken, notes = (sum(finding.level == level for finding in found) for level in (WRONG, NOTE))
    print(f"{broken} would break a run, {notes} to know, {len(found) - broken - notes} ok")
    return 1 if broken else 0


def checks(arguments: Arguments, run_folder: Path, quick: bool) -> Iterator[Finding]:
    """All that can be checked here, and over the hosts of the hostfile. Raises UserError for one that is none.

    What could only fail again for what was found WRONG before is left out.
    """
    from gearshift.launch.devices import visible_gpus
    from gearshift.launch.doctor import devices, hosts, machine, software
    from gearshift.launch.launcher import chosen_hosts

    chosen = chosen_hosts(arguments) if arguments.hostfile else {}
    asked = {host: len(slots) for host, slots in chosen.items()}
    gpus = visible_gpus()
    ranks = max(asked.values(), default=len(gpus) or 2)
    broken = False

    def noted(findings: Iterable[Finding]) -> Iterator[Finding]:
        nonlocal broken
        for finding in findings:
            broken |= finding.level == WRONG
            yield finding

    yield from noted([software.python_finding(sys.version_info[:3], sys.executable)])
    yield from noted(software.package_findings())
    yield from noted(software.compiler_findings(bool(gpus)))
    yield from noted(devices.findings(len(gpus)))
    if not broken:
        yield from noted([devices.library_finding()])
        yield from noted(software.lock_findings())
    yield from noted(machine.findings(run_folder, ranks, bool(gpus)))
    if asked:
        yield from noted(hosts.findings(asked, run_folder, arguments.launcher.get("ssh_port")))
    if broken:
        yield note("all-reduce", "not tried", "mend what is WRONG first")
    elif not quick:
        from gearshift.launch.doctor import all_reduce

        yield all_reduce.finding(arguments, list(asked), sum(asked.values()) or ranks, gpus)
