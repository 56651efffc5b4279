import jax
import pytest


@pytest.fixture(scope="session")
def triton():
    """The Triton kernels: compiled where there is a GPU, interpreted elsewhere."""
    return {"implementation": "triton", "interpret": jax.default_backend() != "gpu"}
