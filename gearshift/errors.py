"""The exception types that are meant for the person at the keyboard."""


class UserError(Exception):
    """Something in a config, a file or the machine is wrong.

    The message is one line: what is wrong, where (field, file and line), and what would be right.
    Commands print it without a stack trace and exit with code 2.
    """


class SettingError(UserError):
    """`field` ("ppo.batch_size") cannot be what it is; `problem` says why and what would be right."""

    def __init__(self, field: str, problem: str):
        super().__init__(f"{field}: {problem}")
        self.field, self.problem = field, problem


class EveryRank(UserError):
    """Raised on every rank alike, so that what takes all of them can still be done."""


class Told(UserError):
    """A mistake that another rank says aloud: this one ends without a word."""


class NotFinite(UserError):
    """A loss, score, value or gradient is NaN or infinite. Raised on every rank, before any weight changes."""


class Paused(Exception):
    """A signal asked the run to stop, and it was saved. Raised on every rank."""


def one_line(error: BaseException, longest: int = 300) -> str:
    """What a library's exception says, for the end of a line of ours: its message, or its type when it has none."""
    text = " ".join(str(error).split())
    if not isinstance(error, ValueError | OSError | RuntimeError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    text = text or type(error).__name__
    return text if len(text) <= longest else text[: longest - 4] + " ..."
