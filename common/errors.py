"""A user's mistake ends in one sentence, never in a traceback."""
import os
import sys


class UserError(SystemExit):
    """What went wrong, where, and how to mend it, in one sentence.

    A SystemExit, so that any script that lets it pass prints the sentence and stops with status 1, and no
    `except Exception` on the way swallows it. A traceback is for bugs.
    """


def end_politely():
    """Called where a script begins: Ctrl-C and a closed pipe (`| head`) end it without a traceback."""
    traceback = sys.excepthook

    def hook(kind, error, trace):
        if issubclass(kind, BrokenPipeError):  # nobody reads any more; what is still buffered goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        elif issubclass(kind, KeyboardInterrupt):
            print("stopped by Ctrl-C", file=sys.stderr)
        else:
            traceback(kind, error, trace)

    sys.excepthook = hook
