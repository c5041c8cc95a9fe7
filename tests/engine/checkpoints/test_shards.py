"""What may be in a checkpoint's file: tensors and plain values. Whatever else is refused by name, and not run."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler

from gearshift.engine.checkpoints import files
from gearshift.engine.checkpoints.random_states import random_states, set_random_states
from gearshift.engine.checkpoints.shards import HostCopies, Shards, load
from gearshift.errors import UserError


class Malicious:
    """Unpickling it writes a file."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self.trace)!r}, 'w')",)


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("form", ["torch", "old torch", "pickle", "script"])
def test_a_malicious_file_is_refused_and_not_run(tmp_path: Path, form: str, mmap: bool) -> None:
    trace, path = tmp_path / "trace", tmp_path / "a.pt"
    if form == "pickle":
        path.write_bytes(pickle.dumps(Malicious(trace)))
    elif form == "script":
        torch.jit.script(torch.nn.Linear(1, 1)).save(str(path))
    else:
        torch.save({"state": Malicious(trace)}, path, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(UserError, match=r"a\.pt: refused, nothing of it was run"):
        load(path, mmap)
    assert not trace.exists()


def test_the_name_in_a_refused_file_is_told(tmp_path: Path) -> None:
    torch.save(Malicious(tmp_path / "trace"), tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"it names exec"):
        load(tmp_path / "a.pt")


def test_what_is_written_is_what_the_manifest_says_and_reads_back(tmp_path: Path) -> None:
    shards = Shards(tmp_path)
    state = {"a": torch.randn(300_000), "b": [1, None, "x"], "c": (torch.float32, torch.Size([2]))}
    shards.save(state, str(tmp_path / "a.pt"))
    assert shards.written == {}
    shards.finish()
    read = shards.load(str(tmp_path / "a.pt"))
    assert torch.equal(read["a"], state["a"])
    assert (read["b"], read["c"]) == (state["b"], state["c"])
    from gearshift.engine.checkpoints.files import digest

    assert shards.written["a.pt"] == {
        "size": (tmp_path / "a.pt").stat().st_size,
        "sha256": digest(tmp_path / "a.pt"),
    }
    assert shards.bytes_needed == 4 * 300_000


def test_an_error_of_the_disk_is_kept_and_the_rest_counted(tmp_path: Path) -> None:
    shards = Shards(tmp_path)
    for name in ("missing/a.pt", "b.pt"):
        shards.save(torch.zeros(10), str(tmp_path / name))
    shards.finish()
    assert shards.error == f"{tmp_path}/missing/a.pt: cannot be written: No such file or directory"
    assert shards.bytes_needed == 80
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_disk_names_the_file() -> None:
    """Those of an open file do not by themselves."""
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        files.write_text(Path("/dev/full"), "x" * 10)


def test_a_copy_is_what_the_state_was(tmp_path: Path) -> None:
    """Also the next one, which lies where the first did; and one of another shape, which does not fit there."""
    weights, counts, scaler = torch.arange(6.0).view(2, 3).t(), {"step": 1}, LossScaler(1.0)
    state = OrderedDict(weights=weights, more=[counts, (weights, torch.Size([2])), scaler])
    copies = HostCopies()
    for number, rows in enumerate((3, 3, 2)):
        state["weights"] = weights[:rows]
        now, later = Shards(tmp_path / f"now-{number}"), Shards(tmp_path / f"later-{number}", copies)
        for shards in (now, later):
            shards.root.mkdir()
            shards.save(state, str(shards.root / "a.pt"))
        assert list(later.root.iterdir()) == []
        weights += 1
        counts["step"] += 1
        scaler.cur_scale += 1
        for shards in (now, later):
            shards.finish()
        one, other = (load(shards.root / "a.pt") for shards in (now, later))
        assert str(one) == str(other)
        assert f"'step': {number + 1}" in str(other)
        assert other["more"][2].cur_scale == number + 1
        assert [set(shards.written) for shards in (now, later)] == [{"a.pt"}] * 2


def test_host_memory_is_used_again() -> None:
    copies, state = HostCopies(), {"a": torch.zeros(5)}
    first, second = copies.of("x", state), copies.of("x", state)
    assert first["a"].data_ptr() == second["a"].data_ptr() != state["a"].data_ptr()
    assert copies.of("y", state)["a"].data_ptr() != first["a"].data_ptr()


def test_whatever_stops_what_was_put_off_is_an_error(tmp_path: Path) -> None:
    shards = Shards(tmp_path, HostCopies())
    shards.write(tmp_path / "a", lambda file: [][0], 1)
    shards.save(torch.zeros(3), str(tmp_path / "b.pt"))
    shards.finish()
    assert shards.error == f"{tmp_path}: cannot be written: IndexError: list index out of range"
    assert shards.written == {}


def test_random_states_come_back(tmp_path: Path) -> None:
    import random

    import numpy

    torch.save(random_states(), tmp_path / "a.pt")

    def draw() -> list[float]:
        return [random.random(), float(numpy.random.rand()), float(torch.rand(1)), float(numpy.random.randn())]

    first = draw()
    assert draw() != first
    set_random_states(load(tmp_path / "a.pt"))
    assert draw() == first
