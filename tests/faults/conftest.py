"""One scene for all tests that break real runs."""

import pytest

from tests.faults.suite.scene import Scene
from tests.warm import warm_process


@pytest.fixture(scope="session")
def scene(tmp_path_factory):
    return Scene.build(warm_process(), tmp_path_factory.mktemp("faults"))
