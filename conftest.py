"""pytest --mine=FOLDER [--seed N]: a student's exercises in place of this project's tests (course/grading.py)."""
from pathlib import Path


def pytest_addoption(parser):
    group = parser.getgroup("student mode")
    group.addoption("--mine", metavar="FOLDER", help="check the exercises in this folder, and end with a score")
    group.addoption("--seed", type=int, default=0, help="of the numbers that they are checked with (default 0)")


def pytest_configure(config):
    if config.option.mine:
        config.args = [str(Path(__file__).with_name("course") / "grading.py")]


def pytest_terminal_summary(terminalreporter, config):
    if config.option.mine:
        passed, failed, skipped = (len(terminalreporter.stats.get(kind, [])) for kind in ("passed", "failed", "skipped"))
        total = passed + failed + skipped
        terminalreporter.write_line(f"score of {config.option.mine}: {passed} of {total} right "
                                    f"({passed / max(1, total):.0%}), {failed} wrong, {skipped} not begun")
