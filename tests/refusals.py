"""A pytest plugin: a test that ends with a VersionError was refused, which is no failure; `-p refusals`."""

import pytest

from restrain.errors import VersionError


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
    return report
