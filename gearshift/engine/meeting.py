"""Ranks find each other in bounded time, and are found to be alike, before they start to work together.

Each rank leaves a card in the process group's store, which rank 0 keeps. Rank 0 reads them all and answers: all is
well, or what is wrong in one line. A rank waits for the answer to its own card, so that one that came to the store of
another run (a port used twice) is not let in.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from gearshift.engine.placement import named
from gearshift.errors import Told, UserError, one_line

# Compared only where no rank has a problem of its own: who could not read its config has nothing to show of it.
CONFIG = "config "


@dataclass(frozen=True)
class Card:
    """What a rank shows the others. `facts`: what must be the same on every host, shown by one rank of each."""

    host: str
    problem: str = ""  # why this rank cannot go on
    facts: Mapping[str, str] = field(default_factory=dict)
    token: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True)
class Meeting:
    """Where the ranks met: the store, for the process group to be built on, and the host of every rank."""

    store: Any
    hosts: list[str]


def meet(card: Card, seconds: float, expected: Mapping[int, str] | None = None) -> Meeting:
    """Waits for all ranks that the environment tells of (`RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`).

    Raises UserError on rank 0, and Told on the others, when a rank has a problem, hosts differ in their facts, or some
    rank has not come within `seconds`; `expected`: the host of a rank, where that is known beforehand.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = _open_store(rank, size, card.host, seconds)
    own = dist.PrefixStore("gearshift/meeting", store)
    if rank != 0:
        own.set(f"card/{rank}", json.dumps(asdict(card)))
        answer = json.loads(_wait(own, f"answer/{rank}/{card.token}", rank, card.host, seconds))
        with suppress(RuntimeError):  # rank 0 may end on seeing this, before it says so
            own.add("read", 1)
        if answer["problem"]:
            raise Told(answer["problem"])
        return Meeting(store, answer["hosts"])
    cards = _collect(own, size, seconds) | {0: card}
    problem = _absent(cards, size, seconds, expected or {}) or what_is_wrong(cards)
    hosts = [cards[r].host for r in range(size)] if not problem else []
    told = json.dumps({"problem": problem, "hosts": hosts})
    for other in sorted(cards)[1:]:
        own.set(f"answer/{other}/{cards[other].token}", told)
    if problem:
        _linger(own, len(cards) - 1)
        raise UserError(problem)
    return Meeting(store, hosts)


def what_is_wrong(cards: Mapping[int, Card]) -> str:
    """One line about the cards, by rank, or nothing. Code that differs may be the cause of the other problems."""
    problems = {rank: card.problem for rank, card in cards.items() if card.problem}
    difference = _difference(cards, with_config=not problems)
    if difference or not problems:
        return difference
    first = problems[min(problems)]
    ranks = [rank for rank, problem in problems.items() if problem == first]
    if len(ranks) == len(cards):
        return first
    hosts = dict.fromkeys(cards[rank].host for rank in ranks)
    return f"on {', '.join(hosts)} ({named(ranks)}): {first}"


def _difference(cards: Mapping[int, Card], with_config: bool, most: int = 3) -> str:
    showing = [card for _, card in sorted(cards.items()) if card.facts]
    for other in showing[1:]:
        first = showing[0]
        names = [name for name in dict.fromkeys([*first.facts, *other.facts]) if with_config or CONFIG not in name]
        differing = [name for name in names if first.facts.get(name) != other.facts.get(name)]
        if differing:
            each = "; ".join(
                f"{name} is {first.facts.get(name, 'missing')} on {first.host}, "
                f"{other.facts.get(name, 'missing')} on {other.host}"
                for name in differing[:most]
            )
            more = f" (and {len(differing) - most} more)" if len(differing) > most else ""
            return f"{first.host} and {other.host} differ: {each}{more}: install and give the same on every host"
    return ""


def _open_store(rank: int, size: int, host: str, seconds: float) -> Any:
    """The store that a launcher's agent keeps (torchrun), or else rank 0's own. Raises UserError."""
    store: Any
    timeout = timedelta(seconds=seconds)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store, *_ = next(dist.rendezvous("env://", rank, size, timeout=timeout))
        return store
    if rank != 0:
        store = _within(seconds, lambda: _store_at_address(rank, size, timeout))
        if store is None:
            raise _no_answer(rank, host, seconds)
        return store
    try:
        return _store_at_address(rank, size, timeout)
    except RuntimeError as error:
        port = os.environ["MASTER_PORT"]
        if f"code: -{errno.EADDRINUSE}" in str(error):
            problem = f"port {port} of {host} is in use by another program: give another one (--master_port N)"
        else:
            problem = f"{host} cannot listen on port {port}: {one_line(error)}"
        raise UserError(problem) from None


def _store_at_address(rank: int, size: int, timeout: timedelta) -> Any:
    # A rank that gives up says so before torch does, at length.
    patience = timeout if rank == 0 else timeout + timedelta(seconds=60)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, size, rank == 0, patience, wait_for_workers=False)


def _within(seconds: float, make: Callable[[], Any]) -> Any:
    """`make()`, or None after `seconds`: torch waits for ever for a server that takes the connection and is silent."""
    made: list[Any] = []

    def work() -> None:
        with suppress(RuntimeError):
            made.append(make())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return made[0] if made else None


def _no_answer(rank: int, host: str, seconds: float) -> UserError:
    # Its neighbours on this host find the same.
    kind = UserError if os.environ.get("LOCAL_RANK", "0") == "0" else Told
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    return kind(
        f"rank {rank} on {host} got no answer from rank 0 at {where} within {seconds:g} s: it has ended, or a firewall "
        "or a wrong --master_addr is between them"
    )


def _wait(store: Any, key: str, rank: int, host: str, seconds: float) -> str:
    """The value that rank 0 sets, which itself waits for all ranks for as long."""
    try:
        store.wait([key], timedelta(seconds=seconds + 5))
        return str(store.get(key).decode())
    except RuntimeError:
        raise _no_answer(rank, host, seconds) from None


def _collect(store: Any, size: int, seconds: float) -> dict[int, Card]:
    """The cards of the other ranks that come within `seconds`."""
    cards: dict[int, Card] = {}
    deadline = time.monotonic() + seconds
    while True:
        for rank in range(1, size):
            if rank not in cards and store.check([f"card/{rank}"]):
                cards[rank] = Card(**json.loads(store.get(f"card/{rank}")))
        if len(cards) == size - 1 or time.monotonic() > deadline:
            return cards
        time.sleep(0.05)


def _absent(cards: Mapping[int, Card], size: int, seconds: float, expected: Mapping[int, str]) -> str:
    absent = [rank for rank in range(size) if rank not in cards]
    if not absent:
        return ""
    hosts = list(dict.fromkeys(expected[rank] for rank in absent if rank in expected))
    where = f" of {', '.join(hosts[:4])}{' ...' if len(hosts) > 4 else ''}" if hosts else ""
    return (
        f"{named(absent)} of {size}{where} did not come within {seconds:g} s (run.join_seconds): "
        "is every host up, and does it reach this one's port?"
    )


def _linger(store: Any, others: int, seconds: float = 5.0) -> None:
    """The store ends with this rank: the others must have read the answer."""
    deadline = time.monotonic() + seconds
    while store.add("read", 0) < others and time.monotonic() < deadline:
        time.sleep(0.05)


def interface_towards(address: str) -> str | None:
    """The network card by which this host reaches `address`, or has it; None for the loopback, or where unknown."""
    import psutil

    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # nothing is sent
            own = probe.getsockname()[0]
    except OSError:
        return None
    if own.startswith("127."):
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == own for a in addresses):
            return name
    return None
