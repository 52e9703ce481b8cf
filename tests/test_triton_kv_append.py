"""kv_append in Triton: the tests of the CUDA kernel."""

from __future__ import annotations

import pytest
from gpus import Gpu, triton_gpu
from test_cuda_kv_append import *  # noqa: F403


@pytest.fixture
def gpu() -> Gpu:
    return triton_gpu()
