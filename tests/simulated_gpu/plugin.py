"""pytest -p simulated_gpu.plugin: the tests have a GPU, which is simulated."""

import pytest

from . import device

device.install()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    with device.GPU:
        return (yield)
