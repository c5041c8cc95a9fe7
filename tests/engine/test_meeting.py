"""Ranks that meet: all go on, or all end with the one line of what is wrong."""

from __future__ import annotations

import os
import socket
import time
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

from gearshift.engine import World, endings, meeting
from gearshift.engine.endings import code_before, code_of_the_first, is_lost_connection, own_store
from gearshift.engine.meeting import CONFIG, Card, Meeting, interface_towards, meet, what_is_wrong
from gearshift.errors import Told, UserError
from gearshift.launch.processes import free_port
from tests.worker_group import WorkerGroup

KEPT: list[Meeting] = []
MAKE = {"torch": "2.13", "the SHA-256 of gearshift/a.py": "aa"}


def cards(*facts: dict[str, str], problems: tuple[str, ...] = ("",) * 6) -> dict[int, Card]:
    """Two ranks on each host, the first of which shows the host's facts."""
    return {
        rank: Card(f"h{rank // 2}", problems[rank], facts[rank // 2] if rank % 2 == 0 else {})
        for rank in range(2 * len(facts))
    }


def test_hosts_that_are_alike() -> None:
    assert what_is_wrong(cards(MAKE, dict(MAKE))) == ""


def test_hosts_that_differ() -> None:
    other = {"torch": "2.12", "the SHA-256 of gearshift/b.py": "bb"}
    assert what_is_wrong(cards(MAKE, MAKE, other)) == (
        "h0 and h2 differ: torch is 2.13 on h0, 2.12 on h2; the SHA-256 of gearshift/a.py is aa on h0, missing on h2; "
        "the SHA-256 of gearshift/b.py is missing on h0, bb on h2: install and give the same on every host"
    )
    many = {f"p{i}": "1" for i in range(9)}
    assert "(and 8 more)" in what_is_wrong(cards(MAKE, many))


def test_a_problem_of_some_ranks_names_host_and_ranks() -> None:
    lacks = ("", "", "data.train: there is no file", "data.train: there is no file")
    assert what_is_wrong(cards(MAKE, MAKE, problems=lacks)) == "on h1 (ranks 2 to 3): data.train: there is no file"
    assert what_is_wrong(cards(MAKE, MAKE, problems=("bad",) * 4)) == "bad"


def test_a_config_is_compared_where_all_have_one() -> None:
    one, other = {**MAKE, f"{CONFIG}ppo.clip": "0.2"}, {**MAKE, f"{CONFIG}ppo.clip": "0.1"}
    assert "config ppo.clip is 0.2 on h0, 0.1 on h1" in what_is_wrong(cards(one, other))
    # Who could not read it has none to show.
    assert what_is_wrong(cards(one, MAKE, problems=("", "", "x", "x"))) == "on h1 (ranks 2 to 3): x"


def met(world: World, port: int, facts: list[dict[str, str]], comes: bool, seconds: float) -> Any:
    """Each of the two ranks as if alone on a host; with `comes` False rank 1 stays away."""
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(port)
    if world.rank == 1 and not comes:
        return None
    started = time.monotonic()
    try:
        meeting = meet(Card(f"h{world.rank}", facts=facts[world.rank]), seconds, {0: "h0", 1: "far"})
        KEPT.append(meeting)  # rank 0's store would end before the other has read it
        return meeting.hosts
    except UserError as error:
        return type(error), str(error), time.monotonic() - started


def test_ranks_meet(two_ranks: WorkerGroup) -> None:
    assert two_ranks.run(met, free_port(), [MAKE, MAKE], True, 20.0) == [["h0", "h1"]] * 2


def test_rank_0_says_what_differs(two_ranks: WorkerGroup) -> None:
    (kind, said, _), (other, told, _) = two_ranks.run(met, free_port(), [MAKE, {"torch": "1"}], True, 20.0)
    assert (kind, other) == (UserError, Told)
    assert said == told
    assert said.startswith("h0 and h1 differ: torch is 2.13 on h0, 1 on h1")


def test_a_rank_that_does_not_come(two_ranks: WorkerGroup) -> None:
    (_, said, seconds), _ = two_ranks.run(met, free_port(), [MAKE, MAKE], False, 1.0)
    assert said.startswith("rank 1 of 2 of far did not come within 1 s (run.join_seconds): ")
    assert 1 <= seconds < 10


def alone_at_a_silent_port(world: World) -> Any:
    """Rank 1 calls at a port whose owner takes the connection and says nothing; rank 0 finds it in use."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(server.getsockname()[1])
        try:
            meet(Card(f"h{world.rank}"), 1.0)
        except UserError as error:
            return str(error)


def test_a_port_of_another_program(two_ranks: WorkerGroup) -> None:
    server, client = two_ranks.run(alone_at_a_silent_port)
    assert server.startswith("port ")
    assert "of h0 is in use by another program" in server
    assert client.startswith("rank 1 on h1 got no answer from rank 0 at 127.0.0.1:")


def speak(world: World) -> tuple[int | None, int | None]:
    return code_before(40 + world.rank), code_of_the_first(own_store("ending"))


def test_one_rank_says_why_the_run_ends(two_ranks: WorkerGroup) -> None:
    answers = two_ranks.run(speak)
    speaker = [before for before, _ in answers].index(None)
    assert answers[speaker] == (None, None)  # it has more to say
    assert answers[1 - speaker] == (40 + speaker, 40 + speaker)


def wait_for_a_word(world: World) -> tuple[int | None, bool]:
    """Rank 1 speaks at once; rank 0 would only after a minute."""
    dist.distributed_c10d._get_default_store().delete_key("gearshift/ending/first")
    dist.barrier()
    start = time.monotonic()
    return code_before(40 + world.rank, wait=60.0 * (world.rank == 0)), time.monotonic() - start < 30.0


def test_who_waits_sees_that_another_has_spoken(two_ranks: WorkerGroup) -> None:
    assert two_ranks.run(wait_for_a_word) == [(41, True), (None, True)]


def order_of_asking(world: World) -> tuple[int | None, list[str]]:
    """What a rank does that waits to end, where another has spoken."""
    done = list[str]()

    def ask(store: object) -> int:
        done.append("asks")
        return 9

    with (
        patch.object(endings.time, "sleep", lambda seconds: done.append(f"sleeps {seconds:g}")),
        patch.object(endings, "code_of_the_first", ask),
    ):
        return code_before(1, wait=6.0), done


def test_the_store_is_asked_after_a_quiet_second(two_ranks: WorkerGroup) -> None:
    """Where it is gone, torch would fill the screen before a watchdog or a launcher has ended the rank."""
    assert two_ranks.run(order_of_asking) == [(9, ["sleeps 1", "asks"])] * 2


def without_a_store(world: World) -> list[int | None]:
    """On one host, and over several: as if connections to it broke."""
    found = list[int | None]()
    for local_size in ("2", "1"):
        with (
            patch.dict(os.environ, LOCAL_SIZE=local_size),
            patch.object(dist.PrefixStore, "compare_set", side_effect=dist.DistNetworkError("Connection reset")),
        ):
            found.append(code_before(40 + world.rank))
    return found


def test_without_a_store_nothing_is_lost(two_ranks: WorkerGroup) -> None:
    """Over several hosts rank 0, whose store it was, has spoken; on one it may have been killed."""
    assert two_ranks.run(without_a_store) == [[None, None], [None, 41]]


def test_a_rank_that_is_alone_says_why(one_rank: WorkerGroup) -> None:
    assert one_rank.run(code_before_1) == [None]


def code_before_1(world: World) -> int | None:
    with patch.object(dist.PrefixStore, "compare_set", side_effect=AssertionError):
        return code_before(1)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.1]:34144"), True),
        (ConnectionResetError("Connection reset by peer"), True),
        (ConnectionError("rank 1 has ended, this one waits for it"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("connection"), False),
    ],
)
def test_lost_connections(error: Exception, lost: bool) -> None:
    assert is_lost_connection(error) is lost


def test_no_card_leads_to_the_loopback() -> None:
    assert interface_towards("127.0.0.1") is None


def test_the_card_that_has_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else the card has: an address of IPv6, its own number."""
    import psutil

    class Probe(socket.socket):
        def connect(self, address: object) -> None: ...

        def getsockname(self) -> Any:
            return ("10.0.0.2", 1)

    def card(*addresses: str) -> list[Any]:
        return [SimpleNamespace(address=address) for address in addresses]

    cards = {"lo": card("127.0.0.1"), "eth0": card("10.0.0.1"), "eth1": card("10.0.0.2", "fe80::1")}
    monkeypatch.setattr(socket, "socket", Probe)
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: cards)
    assert interface_towards("10.0.0.9") == "eth1"


@pytest.mark.parametrize(("local_rank", "kind"), [("0", UserError), ("1", Told)])
def test_one_rank_of_a_host_tells_that_rank_0_is_silent(
    monkeypatch: pytest.MonkeyPatch, local_rank: str, kind: type[UserError]
) -> None:
    for name, value in {"LOCAL_RANK": local_rank, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert type(meeting._no_answer(3, "b", 1.0)) is kind


@pytest.mark.parametrize(
    ("rank", "local_size", "longer_than"),
    [
        ("0", "1", 2 * endings.FOLLOW_SECONDS),
        ("1", "1", None),
        ("0", "2", endings.QUIET_SECONDS + endings.POLL_SECONDS),
    ],
)
def test_rank_0_stays_until_others_know(
    monkeypatch: pytest.MonkeyPatch, rank: str, local_size: str, longer_than: float | None
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    for name, value in {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_SIZE": local_size}.items():
        monkeypatch.setenv(name, value)
    endings.linger()
    assert [seconds > (longer_than or 0) for seconds in waited] == [True] * (longer_than is not None)
