"""What pytest --mine FOLDER runs: a test for each exercise, passed, failed with the sentence that names the mistake, or
skipped where it is not begun."""
import pytest

from course.check import check, file_of
from course.exercises import EXERCISES


@pytest.mark.parametrize("name", EXERCISES)
def test_exercise(name, pytestconfig):
    folder = pytestconfig.invocation_params.dir / pytestconfig.option.mine
    if not file_of(name, folder).is_file():
        pytest.skip("not begun")
    verdict = check(name, folder, pytestconfig.option.seed)
    if not verdict.passed:
        pytest.fail(f"{name}: {verdict.sentence}", pytrace=False)
