"""The one error that users see without a traceback; every layer may raise it."""


class UserError(ValueError):
    """A mistake that the user can mend: one line that names the field, the value and what is allowed.

    The command line prints it without a traceback and exits with status 2.
    """
