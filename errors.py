"""One idea: a user's mistake ends in one sentence, never in a traceback."""


class UserError(SystemExit):
    """What went wrong, where, and how to mend it, in one sentence.

    A SystemExit, so that any script that lets it pass prints the sentence and stops with status 1, and no
    `except Exception` on the way swallows it. A traceback is for bugs.
    """
