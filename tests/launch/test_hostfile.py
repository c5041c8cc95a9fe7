"""A hostfile, what is left of it by --include and --exclude, and how its ranks lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from gearshift.errors import SettingError, UserError
from gearshift.launch.hostfile import read_hostfile, selected
from gearshift.launch.overrides import parse_arguments
from gearshift.launch.world_table import check_tensor_parallel, world_table

HOSTS = {"a": 4, "b": 2}


def test_hostfile(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("# two machines\nworker-0 slots=8\n\nworker-1 slots=4  # half\n")
    assert read_hostfile(str(hosts)) == {"worker-0": 8, "worker-1": 4}
    for second, problem in {
        "worker-1": "hosts:2: should read HOST slots=N, not 'worker-1'",
        "worker-1 slots=0": "hosts:2: should read HOST slots=N",
        "worker-0 slots=4": "hosts:2: names worker-0 a second time",
    }.items():
        hosts.write_text(f"worker-0 slots=8\n{second}\n")
        with pytest.raises(UserError, match=problem):
            read_hostfile(str(hosts))


@pytest.mark.parametrize(
    ("include", "exclude"), [("", ""), ("b", ""), ("b@a:0,2", ""), ("a:1@a:0", ""), ("", "a"), ("", "a:1,2@b:0")]
)
def test_what_is_selected_is_what_deepspeed_selects(include: str, exclude: str) -> None:
    runner = pytest.importorskip("deepspeed.launcher.runner")
    theirs = runner.parse_inclusion_exclusion(dict(HOSTS), include, exclude)
    found = selected(HOSTS, include, exclude)
    assert list(found.items()) == list(theirs.items())


@pytest.mark.parametrize(
    ("include", "exclude", "problem"),
    [
        ("c", "", "--include: c is not in the hostfile: use some of a, b"),
        ("", "b:2", "--exclude: b has slots 0 to 1, not 2"),
        ("a:x", "", "--include: 'a:x' should read HOST or HOST:0,1"),
        ("", "a@b", "--exclude a@b: leaves no slot of the hostfile"),
    ],
)
def test_a_selection_that_cannot_be(include: str, exclude: str, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        selected(HOSTS, include, exclude)
    assert str(caught.value) == problem


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--include", "a"], "--include is for several hosts"),
        (["--hostfile", "h", "--include", "a", "--exclude", "b"], "give one of them"),
        (["--master_port", "0"], "should be a port"),
    ],
)
def test_options_of_the_launcher_that_do_not_go_together(words: list[str], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        parse_arguments(["c.yaml", *words])


def test_groups_stay_inside_a_host() -> None:
    assert check_tensor_parallel(2, {"a": 4, "b": 2}) == ""
    assert check_tensor_parallel(3, {"a": 4}) == ""  # the rank count as a whole is checked elsewhere
    with pytest.raises(SettingError, match=r"rollout.tp_size: 2 does not divide the 3 ranks of b: a group would lie"):
        check_tensor_parallel(2, {"a": 4, "b": 3})
    assert "more than the 2 ranks of b: groups lie across hosts" in check_tensor_parallel(4, {"a": 4, "b": 2})


def test_the_world_as_a_table() -> None:
    assert world_table(["a"] * 4, 2) == []
    assert world_table(["gear-a"] * 4 + ["b"] * 2, 2) == [
        "world        host    ranks   TP groups of 2  ZeRO-3 group",
        "             gear-a  0 to 3  0 to 1          0 to 5 (all)",
        "             b       4 to 5  2               0 to 5 (all)",
    ]


def test_a_long_table_is_cut_in_the_middle() -> None:
    table = world_table([f"n{i // 8}" for i in range(8 * 128)], 8)
    assert len(table) == 9
    assert table[-2].split() == ["...", "121", "more"]
    assert table[-1].split() == ["n127", "1016", "to", "1023", "127", "0", "to", "1023", "(all)"]
