"""Waits are told: which stages a command runs, how long each takes on this machine, and a bar wherever nothing else moves.

A script says what its own run on the island costs, COSTS = (seconds of a step, steps, seconds of the rest), measured on one
idle core. The first steps that are measured here say how much faster or slower this machine is, for the stages to come too.
"""
import contextlib
import os
import sys
import time

from tqdm import tqdm

QUIET = 2 if sys.stderr.isatty() else 15  # seconds that pass without a word; a file gets fewer lines than a terminal
BUSY = 0.7  # a share of a core below which other programs are noticed


def bar(rows, words, total=None):
    """Passes the rows on, under a bar that comes when they take long and goes when they end."""
    return tqdm(rows, f"   {words}", total, leave=False, delay=QUIET, mininterval=min(QUIET, 0.5), dynamic_ncols=True,
                bar_format="{desc} {percentage:3.0f}% |{bar}| {remaining} left", disable=os.environ.get("RANK", "0") != "0")


def words(seconds):
    """A length of time as people say it."""
    if seconds < 90:
        return f"{max(1, round(seconds, -1 if seconds > 20 else 0)):.0f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min".replace(".0", "") if minutes < 5 else f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


class Plan:
    """The stages of the command that is running, {folder: its COSTS, or None where nobody has measured any}, in order."""

    def __init__(self, stages=()):
        self.stages, self.began, self.depth = dict(stages), time.monotonic(), 0

    def begin(self, stages):
        self.__init__(stages)

    @contextlib.contextmanager
    def within(self):
        """Around a stage that another one runs: it is part of the plan and makes none of its own."""
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    def place(self, folder):
        """ "stage 2 of 4, ", or nothing where a command is its own only stage."""
        names = list(self.stages)
        return f"stage {names.index(folder) + 1} of {len(names)}, " if folder in names and len(names) > 1 else ""

    def seconds(self, folders, speed=1.0):
        return sum(speed * (step * steps + rest) for step, steps, rest in filter(None, map(self.stages.get, folders)))

    def estimate(self, folder, step, steps):
        """A measured step's seconds and how many are to come -> "stage 2 of 4, out/sft: about 40 s, 3 min in all"."""
        names, costs = list(self.stages), self.stages.get(folder)
        own, all_of_it = step * steps, ""
        if costs:
            speed = step / costs[0]
            own += costs[2] * speed
            if len(names) > 1:
                after = self.seconds(names[names.index(folder) + 1:], speed)
                all_of_it = f", {words(time.monotonic() - self.began + own + after)} in all"
        return f"{self.place(folder)}{folder}: about {words(own)}{all_of_it}"


PLAN = Plan()


class Stopwatch:
    """Measures the first steps of a loop, and how much of a core they were given."""

    def __init__(self):
        self.began, self.used, self.steps, self.told = time.perf_counter(), time.thread_time(), 0, False

    def step(self):
        """Called after each step -> (seconds of a step, share of a core), once, when that can be told; else None."""
        self.steps += 1
        seconds = time.perf_counter() - self.began
        if self.told or not (self.steps >= 20 or self.steps >= 2 and seconds > 2 or seconds > 10):
            return None
        self.told = True
        return seconds / self.steps, (time.thread_time() - self.used) / max(seconds, 1e-9)


def busy(share):
    """A remark where this process gets too little of its core."""
    if share >= BUSY:
        return ""
    return f" (the machine is busy with other programs: this run gets {share:.0%} of a core, alone it would take less)"
