"""The one exception type that is meant for the person at the keyboard."""


class UserError(Exception):
    """Something in a config, a file or the machine is wrong.

    The message is one line: what is wrong, where (field, file and line), and what would be right.
    Commands print it without a stack trace and exit with code 2.
    """
