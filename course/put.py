"""Another function in the place of ours: in its own module and in every module that has imported it by name."""
import functools
import pkgutil
import sys

import model
from kernels import nf4


def put(places):
    """{place, such as dpo.dpo_loss or model.Cache.extend: what takes its place} -> a list, longer with every call."""
    calls = []
    for place, new in places.items():
        owner, _, name = place.rpartition(".")
        owner = pkgutil.resolve_name(owner)
        old = getattr(owner, name)
        new = counted(new, old, calls)
        setattr(owner, name, new)
        for module in list(sys.modules.values()):
            if getattr(module, "__name__", "course.").partition(".")[0] not in ("course", "__main__"):
                for alias in [alias for alias, value in list(vars(module).items()) if value is old]:
                    setattr(module, alias, new)
    return calls


def counted(new, old, calls):
    """new, with its calls counted. Within it `old` is called: a cross_entropy may be made of F.cross_entropy."""
    within = []

    @functools.wraps(old, updated=())
    def call(*args, **options):
        if within:
            return old(*args, **options)
        within.append(calls.append(1))
        try:
            return new(*args, **options)
        finally:
            within.pop()

    return call


def kernels_off():
    """The readable functions do all the work, so that whatever takes their place is called."""
    put({"kernels.nf4.quantizes": lambda *_: False, "kernels.nf4.dequantizes": lambda *_: False,
         "model.summed_logps": lambda network, ids, mask: model.token_logps(network, ids, mask).sum()})
    assert not nf4.quantizes(None, 0, 0)
