"""A user's mistake ends in one sentence, never in a traceback."""
import contextlib
import errno
import os
import re
import signal
import sys
from pathlib import Path


# Control characters, but for tab and newline, and marks that turn text around: a terminal obeys them
COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def visible(text):
    """Text that is not ours (a model's, a file's, a server's), as it is shown: what would command the terminal is spelled."""
    return COMMANDS.sub(lambda found: repr(found[0])[1:-1], str(text))


class UserError(SystemExit):
    """What went wrong, where, and how to mend it, in one sentence.

    A SystemExit, so that any script that lets it pass prints the sentence and stops with status 1, and no
    `except Exception` on the way swallows it. A traceback is for bugs.
    """

    def __init__(self, sentence):
        super().__init__(visible(sentence))


@contextlib.contextmanager
def reading(path, cure="copy or download it again"):
    """Around code that reads a file of somebody else's: whatever is wrong with that ends in one sentence."""
    try:
        yield
    except (SystemExit, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        raise UserError(f"{path} is damaged ({' '.join(repr(error).split())[:200]}): {cure}") from None


def nothing_of_ours(error):
    """A sentence about what is no bug wherever it happens: a name that no disk takes, and memory; "" for the rest."""
    said = str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return f"{str(error.filename)[:60]}... cannot be the name of a file ({error.strerror}): choose another one"
    if isinstance(error, RuntimeError) and "home directory" in said:  # of Path.expanduser
        return f"a name that begins with ~ and no user of this machine ({said}): write the whole path"
    if isinstance(error, MemoryError) or isinstance(error, RuntimeError) and (
            "not enough memory" in said or "can't allocate memory" in said or "out of memory" in said):
        return (f"the memory is full ({' '.join((said or 'MemoryError').split())[:120]}): close other programs, or take a smaller "
                "model, --micro-tokens or --batch-size, or --lora-r with --nf4")
    return ""


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
        elif sentence := nothing_of_ours(error):
            print(sentence, file=sys.stderr)
        else:
            traceback(kind, error, trace)

    sys.excepthook = hook


def uninstalled(kind, error, trace):
    """The hook while imports run: what is required and missing is one sentence."""
    if kind is ModuleNotFoundError and error.name in ("torch", "numpy", "tiktoken", "tqdm", "safetensors"):
        print(f"{error.name} is not installed: pip install -r requirements.txt", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


# A script needs seconds for its imports, and nothing can be lost in them: Ctrl-C ends it at once. So a script imports
# this file before torch. Whoever else imports it is left alone.
_main = getattr(sys.modules["__main__"], "__file__", None)
if _main and Path(__file__).resolve().parents[1] in list(Path(_main).resolve().parents)[:2]:
    sys.excepthook = uninstalled
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
