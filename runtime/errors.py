"""What a user can mend, as exceptions: each message is one line, each has an exit code."""

from __future__ import annotations


class UserError(Exception):
    """Something that the user can mend: the message says what, where and what to do; `exit_code` is the script's."""

    exit_code = 2


class ConfigError(UserError):
    """The configuration, or what was typed on the command line, cannot be used."""
