import pytest
from sam_cases import build_smallest, needs_sam2


@pytest.fixture(
    scope="session", params=["segment_anything", pytest.param("sam2", marks=needs_sam2)]
)
def backend(request):
    """Each backend around a small model with random weights."""
    return build_smallest(request.param)
