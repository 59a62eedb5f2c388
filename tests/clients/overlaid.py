"""A plugin of pytest: the tests of another package run on our transforms. `pytest -p tests.clients.overlaid ...`."""

from functorch_lite import overlay
from tests.clients.support import calls_of_ours

counting = calls_of_ours()
calls = counting.__enter__()
overlay.install()


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"calls of ours: {sum(calls.values())}")
