import pytest
from sam_cases import build_smallest, needs_sam2, needs_transformers


@pytest.fixture(
    scope="session",
    params=[
        "segment_anything",
        pytest.param("sam2", marks=needs_sam2),
        pytest.param("transformers sam_hq", marks=needs_transformers),
        pytest.param("transformers sam2", marks=needs_transformers),
    ],
)
def backend(request):
    """Each backend around a small model with random weights."""
    return build_smallest(request.param)
