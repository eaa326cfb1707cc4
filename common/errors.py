"""A user's mistake ends in one sentence, never in a traceback."""
import os
import signal
import sys
from pathlib import Path


class UserError(SystemExit):
    """What went wrong, where, and how to mend it, in one sentence.

    A SystemExit, so that any script that lets it pass prints the sentence and stops with status 1, and no
    `except Exception` on the way swallows it. A traceback is for bugs.
    """


def no_command(doc):
    """What a file says that is run but only imported by others: its first sentence, and a command of its docstring."""
    first = " ".join(doc.strip().partition("\n\n")[0].split()).partition(". ")[0].rstrip(".")
    commands = [line.split("    ")[0].strip() for line in map(str.strip, doc.splitlines()) if line.startswith("python ")]
    print(f"{first}. This file has no command of its own: {commands[0] if commands else 'README.md lists the commands'}")


def end_politely():
    """Called where a script begins: Ctrl-C and a closed pipe (`| head`) end it without a traceback."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # of the imports, below
        signal.signal(signal.SIGINT, signal.default_int_handler)
    traceback = sys.excepthook

    def hook(kind, error, trace):
        if issubclass(kind, BrokenPipeError):  # nobody reads any more; what is still buffered goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        elif issubclass(kind, KeyboardInterrupt):
            print("stopped by Ctrl-C", file=sys.stderr)
        else:
            traceback(kind, error, trace)

    sys.excepthook = hook


# A script needs seconds for its imports, and nothing can be lost in them: Ctrl-C ends it at once. So a script imports
# this file before torch. Whoever else imports it is left alone.
_main = getattr(sys.modules["__main__"], "__file__", None)
if _main and Path(__file__).resolve().parents[1] in list(Path(_main).resolve().parents)[:2]:
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
