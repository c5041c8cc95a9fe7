"""What a person types: every mistake is one line on stderr and exit code 2, and help needs nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gearshift.errors import UserError
from gearshift.launch.cli import COMMANDS, main
from gearshift.launch.config import CONFIGS
from gearshift.launch.overrides import parse_arguments

from .conftest import example, write


def mistake(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err.strip()


def test_unknown_command_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert mistake(capsys, "pppo") == (
        "gearshift: pppo is not a command; did you mean ppo? Commands: " + ", ".join(COMMANDS)
    )


def test_no_command_shows_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.count("usage: gearshift COMMAND") == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "a config file is missing: gearshift ppo CONFIG.yaml"),
        (["none.yaml"], "none.yaml: there is no such config file"),
        (["config.yaml", "other.yaml"], "two config files, config.yaml and other.yaml"),
        (["config.yaml", "--ppo.clip"], "--ppo.clip needs a value: --ppo.clip VALUE"),
        (["config.yaml", "--ppo.clip", "--ppo.gamma", "1"], "--ppo.clip needs a value"),
        (["config.yaml", "--clip", "1"], "--clip is not an option: settings are --section.field value"),
        (["config.yaml", "--ppo.clip=wide"], "command line: ppo.clip: should be a valid number, not 'wide'"),
        (
            ["config.yaml", "--ppo.batch-size", "4"],
            "command line: ppo.batch-size: unknown setting; did you mean ppo.batch_",
        ),
        (["config.yaml", "--run.ranks", "3"], "config.yaml:11: rollout.tp_size: 2 does not divide the 3 ranks"),
        (
            ["config.yaml", "--train.epochs", "3"],
            "command line: train: a section of pretrain, sft, reward, not of this command, whose sections are run",
        ),
        (["config.yaml", "--hostfile", "none"], "--hostfile: there is no file none"),
    ],
)
def test_mistakes(here: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str) -> None:
    values = example("ppo")
    values["ppo"]["batch_size"] = values["ppo"]["episodes"] = 24  # fits 3 ranks too
    write(values)
    assert mistake(capsys, "ppo", *words).startswith(f"gearshift ppo: {says}")


def test_a_mistake_in_a_real_shell_is_one_line_before_any_process(here: Path) -> None:
    Path("ragged.jsonl").write_text('{"prompt": "2 + 2 =", "completion": "4"}\n{"prompt": "3 + 3 ="}\n')
    mistakes = {
        "ppo": ({"rollout": {"tp_size": 3}}, "rollout.tp_size: 3 does not divide the 2 ranks (run.ranks): use 1 or 2"),
        "sft": (
            {"data": {"train": "ragged.jsonl"}},
            "data.train: ragged.jsonl:2: no field 'completion'; the row has: prompt",
        ),
        "pretrain": (
            {"policy": {"init": "config", "config": {"model_type": "llama", "hidden_act": "grelu"}}},
            "policy.config: no llama can be built from it: KeyError: ",
        ),
    }
    for command, (section, says) in mistakes.items():
        write({**example(command), **section})
        words = [sys.executable, "-m", "gearshift.launch", command, "config.yaml"]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        where, told = done.stderr.removeprefix(f"gearshift {command}: ").split(": ", 1)
        assert where.startswith("config.yaml:")
        assert told.startswith(says)
        assert told.index("\n") == len(told) - 1
        assert not Path("runs").exists()


@pytest.mark.parametrize("words", [["--help"], *([command, "--help"] for command in COMMANDS)])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    """It is to be there in half a second."""
    code = (
        "import sys, contextlib; from gearshift.launch.cli import main\n"
        "with contextlib.suppress(SystemExit): assert main(sys.argv[1:]) == 0\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'accelerate', 'datasets', 'matplotlib', 'numpy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, *words], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("command", [name for name in CONFIGS if name != "pretrain"])
def test_a_config_is_checked_without_anything_heavy(here: Path, command: str) -> None:
    """A mistake is told at once; only the config of a new model needs `transformers`, which takes seconds."""
    code = (
        "import sys; from gearshift.launch.config import load; load(sys.argv[1], sys.argv[2], ranks=2); "
        "heavy = {'torch', 'transformers', 'deepspeed', 'accelerate', 'datasets', 'matplotlib'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, command, write(example(command))], check=True)


def test_help_into_a_closed_pipe_is_no_error() -> None:
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{sys.executable} -m gearshift.launch ppo --help | head -1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_arguments() -> None:
    words = ["--local_rank=1", "c.yaml", "--ppo.clip", "-1", "--run.folder=a=b", "--data.prompt_template", "{prompt}\n"]
    arguments = parse_arguments([*words, "--hostfile", "hosts"])
    assert arguments.config == "c.yaml"
    assert arguments.hostfile == "hosts"
    assert arguments.overrides == [
        ("ppo.clip", "-1"),
        ("run.folder", "a=b"),
        ("data.prompt_template", "{prompt}\n"),
    ]
    assert parse_arguments(["--config", "c.yaml"]).config == "c.yaml"
    assert parse_arguments(["--local_rank", "1"]).config is None
    with pytest.raises(UserError):
        parse_arguments(["--config"])
    profile = ("run.profile.iterations", "1")
    assert parse_arguments(["--profile", "c.yaml", "--ppo.clip", "1"]).overrides == [profile, ("ppo.clip", "1")]
    assert parse_arguments(["--max-restarts", "3"]).max_restarts == 3
    with pytest.raises(UserError, match=r"--max-restarts: should be a number of restarts, 0 or more, not 'many'"):
        parse_arguments(["--max-restarts", "many"])


@pytest.mark.parametrize("words", [["export", "RUN"], ["verify"], ["report", "RUN", "--wide"], ["doctor", "--x"]])
def test_arguments_that_do_not_fit_are_told_in_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.startswith(f"gearshift {words[0]}: ")
    assert told.endswith(f"(what there is: gearshift {words[0]} --help)\n")
