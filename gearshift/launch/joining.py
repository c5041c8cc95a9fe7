"""The start of a rank: it reads its config, meets the others, and goes on only if all can and are of one make."""

from __future__ import annotations

import base64
import json
import os
import socket
import sys
from collections import Counter
from pathlib import Path

from gearshift.engine.endings import follow_the_first, several_hosts
from gearshift.errors import SettingError, Told, UserError
from gearshift.launch.config import load
from gearshift.launch.installed import file_digest, file_digests, versions
from gearshift.launch.overrides import Arguments
from gearshift.launch.rows import readers
from gearshift.rlhf.data.sources import is_local
from gearshift.rlhf.differences import flat
from gearshift.rlhf.settings import Config, RunSettings

# Of a model's folder, what every rank reads: config and tokenizer. Rank 0 alone reads weights.
READ_BY_ALL = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.*",
    "merges.txt", "*.model", "chat_template.jinja",
)  # fmt: skip


def join(command: str, arguments: Arguments) -> Config:
    """The config of this rank, which has then met all others and is in their process group.

    Raises UserError for what is wrong with this rank, or Told for what another one says.
    """
    problem, config = "", None
    ranks = int(os.environ["WORLD_SIZE"])
    try:
        assert arguments.config is not None
        config = load(command, arguments.config, arguments.overrides, ranks=ranks)
    except UserError as error:
        if not several_hosts():
            raise  # the launcher ends the others
        problem = str(error)
    from gearshift.engine.distributed import init_distributed
    from gearshift.engine.meeting import Card, meet

    seconds = config.run.join_seconds if config else RunSettings.model_fields["join_seconds"].default
    shows = os.environ.get("LOCAL_RANK") == "0"
    facts = facts_of(config) | (contents_of(config) if config and several_hosts() else {}) if shows else {}
    card = Card(socket.gethostname(), problem, facts)
    met = meet(card, seconds, _hosts_of_launcher())
    assert config is not None
    tp_size = config.rollout.tp_size if hasattr(config, "rollout") else 1
    _tell_world(met.hosts, tp_size)
    if several_hosts() and config.saves:
        from gearshift.launch.shared_folder import require_shared

        require_shared(met.store, Path(config.run.folder), int(os.environ["RANK"]), met.hosts)
    name_interface()
    init_distributed(met.store)
    if several_hosts():
        follow_the_first()
    return config


def name_interface() -> None:
    """GLOO_SOCKET_IFNAME, where it is not set and there are several hosts: the card that leads to rank 0.

    gloo would take the one that the host's name stands for, on Debian the loopback.
    """
    from gearshift.engine.meeting import interface_towards

    if several_hosts() and "GLOO_SOCKET_IFNAME" not in os.environ:
        card_name = interface_towards(os.environ["MASTER_ADDR"])
        if card_name:
            os.environ["GLOO_SOCKET_IFNAME"] = card_name


def _tell_world(hosts: list[str], tp_size: int) -> None:
    from gearshift.launch.world_table import check_tensor_parallel, world_table

    is_main = os.environ["RANK"] == "0"
    try:
        warning = check_tensor_parallel(tp_size, Counter(hosts))
    except SettingError as error:
        raise (error if is_main else Told(str(error))) from None
    if is_main:
        for line in [*world_table(hosts, tp_size), *([f"warning      {warning}"] if warning else [])]:
            print(line, file=sys.stderr, flush=True)


def facts_of(config: Config | None) -> dict[str, str]:
    """What must be the same on every host: versions, every file of the package, every setting."""
    from gearshift.engine.meeting import CONFIG

    facts = versions() | {f"the SHA-256 of gearshift/{path}": digest for path, digest in file_digests().items()}
    settings = config.model_dump(mode="json") if config else {}
    return facts | {f"{CONFIG}{name}": json.dumps(value) for name, value in flat(settings).items()}


def contents_of(config: Config) -> dict[str, str]:
    """The digests of what every rank reads of the disk, data files and `READ_BY_ALL`, which must be the same too."""
    from gearshift.engine.meeting import CONFIG

    found = {
        f"{CONFIG}{field}: the SHA-256 of {source}": file_digest(Path(source).expanduser())
        for field, sources, _ in readers(config)
        for source in filter(is_local, sources)
    }
    for field, value in flat(config.model_dump(mode="json")).items():
        if field.rpartition(".")[2] in ("init", "tokenizer") and isinstance(value, str) and Path(value).is_dir():
            for path in sorted(path for pattern in READ_BY_ALL for path in Path(value).glob(pattern)):
                found[f"{CONFIG}{field}: the SHA-256 of {path}"] = file_digest(path)
    return found


def _hosts_of_launcher() -> dict[int, str]:
    """The host of each rank as DeepSpeed's launcher was told, which started this process; nothing with another one."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
        encoded = next(word.partition("=")[2] for word in words if word.startswith("--world_info="))
        slots: dict[str, list[int]] = json.loads(base64.urlsafe_b64decode(encoded))
    except (OSError, StopIteration, ValueError):
        return {}
    return dict(enumerate(host for host, numbers in slots.items() for _ in numbers))
