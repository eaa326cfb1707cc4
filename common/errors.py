"""A user's mistake ends in one sentence, never in a traceback."""
import contextlib
import os
import sys


class UserError(SystemExit):
    """What went wrong, where, and how to mend it, in one sentence.

    A SystemExit, so that any script that lets it pass prints the sentence and stops with status 1, and no
    `except Exception` on the way swallows it. A traceback is for bugs.
    """


@contextlib.contextmanager
def reading(path, cure="copy or download it again"):
    """Around code that reads a file of somebody else's: whatever is wrong with that ends in one sentence."""
    try:
        yield
    except (SystemExit, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        raise UserError(f"{path} is damaged ({' '.join(repr(error).split())[:200]}): {cure}") from None


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
