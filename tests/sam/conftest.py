import pytest
from sam_cases import BACKENDS, build_small


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request):
    """Each backend around a small model with random weights."""
    return build_small(request.param)
