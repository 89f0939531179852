"""The recorder of the parity table, and the option that writes it."""

import pytest

from tests.parity.table import Recorder, write


def pytest_addoption(parser):
    parser.addoption("--write-parity-table", action="store_true", help="write docs/parity.json and docs/parity.md")


@pytest.fixture(scope="session", name="parity")
def parity_recorder(request):
    recorder = Recorder()
    yield recorder
    if request.config.getoption("--write-parity-table", default=False):
        assert not request.session.testsfailed, "a table of failing tests is not written"
        assert not hasattr(request.config, "workerinput"), "with -n each process has only some of the rows"
        write(recorder.rows)
