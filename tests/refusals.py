"""A pytest plugin for `test_torch_private.py`: a test that ends with a VersionError was refused, and didn't fail."""

import pytest

from restrain.errors import VersionError

COUNTS = {"passed": 0, "failed": 0, "refused": 0}


def refused(error):
    """Whether an error is a VersionError, or came of one."""
    while error is not None and not isinstance(error, VersionError):
        error = error.__cause__ or error.__context__
    return error is not None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed and refused(call.excinfo.value):
        report.outcome, report.longrepr = "skipped", (str(item.path), 0, f"refused: {call.excinfo.value}")
        COUNTS["refused"] += 1
    elif report.failed or (report.passed and report.when == "call"):
        COUNTS[report.outcome] += 1
    return report


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line("REFUSALS {passed} {failed} {refused}".format(**COUNTS))
