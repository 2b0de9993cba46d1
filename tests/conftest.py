"""One thread for the matrix library: on arrays this small, several threads only wait for each other."""

import faulthandler
import os

import pytest
from threadpoolctl import threadpool_limits

threadpool_limits(1)


@pytest.fixture(scope="session")
def real_stderr(request):
    """The terminal's, whatever pytest captures meanwhile."""
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        return os.fdopen(os.dup(2), "w")


@pytest.fixture
def no_hang(real_stderr):
    """Threads that wait for each other for ever end the whole run, with a traceback: nothing gentler reaches them."""
    faulthandler.dump_traceback_later(300, exit=True, file=real_stderr)
    yield
    faulthandler.cancel_dump_traceback_later()
