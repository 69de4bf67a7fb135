"""The one error class for what a user can get wrong."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input: a config value, a data row, a file, an environment.

    The message is one line that names the value and the fix. Commands print it as
    `polar: error: <message>` and exit with code 2; libraries that call us see a `ValueError`.
    """
