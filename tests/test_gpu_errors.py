"""MLX's texts of a GPU that fails: what each means, and what is not one."""

from __future__ import annotations

import numpy as np
import pytest

from mlxtune.errors import GpuFailed, ModelError, OutOfMemory
from mlxtune.gpu_errors import as_user_error, fault_in, is_out_of_memory
from support import faults


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        (faults.MEMORY, OutOfMemory, "the GPU ran out of memory at step 3"),
        (faults.MALLOC, OutOfMemory, "there was no room for 2.15 GB more"),
        (faults.CUDA_MEMORY, OutOfMemory, "the GPU ran out of memory at step 3"),
        (faults.CUBLAS_MEMORY, OutOfMemory, "the GPU ran out of memory at step 3"),
        (faults.BUFFER, OutOfMemory, "an array of 20.40 GB at step 3, and allows one of 9.53 GB"),
        (faults.RESOURCES, OutOfMemory, "held 499,000 arrays at once at step 3"),
        (faults.WATCHDOG, GpuFailed, "macOS stopped the GPU at step 3"),
        (faults.TIMEOUT, GpuFailed, "the GPU was stopped at step 3"),
        (faults.PAGE_FAULT, GpuFailed, "the GPU failed at step 3"),
        (faults.CUDA_FAULT, GpuFailed, "the GPU failed at step 3"),
    ],
    ids=[
        *(
            "memory",
            "malloc",
            "CUDA memory",
            "cuBLAS memory",
            "buffer",
            "resources",
            "watchdog",
            "timeout",
        ),
        *("page fault", "CUDA fault"),
    ],
)
def test_each_text_is_told_by_what_it_means(text, kind, said):
    error = RuntimeError(text)
    told = as_user_error(error, doing="at step 3", where="runs/x")
    assert type(told) is kind and told.where == "runs/x" and told.remedy
    assert said in told.what
    assert is_out_of_memory(error) == is_out_of_memory(told) == (kind is OutOfMemory)
    assert text in "".join(told.__notes__)


@pytest.mark.parametrize(
    "text",
    [
        "[matmul] Last dimension of first input with shape (2,3) must match (4,5).",
        "[metal::Device] Unable to load kernel gemm",
        "cudaMemcpyAsync(dst, src, size) failed: invalid argument",
        "cublasLtMatmul(handle_) failed with code: 15.",
        "workers are out of step: their messages differ in size",
        "",
    ],
)
def test_other_texts_stay_what_they_are(text):
    assert fault_in(text) is None
    assert as_user_error(RuntimeError(text)) is None
    assert not is_out_of_memory(RuntimeError(text))


def test_only_what_mlx_raises_is_looked_at():
    assert as_user_error(ValueError(faults.MEMORY)) is None
    assert as_user_error(ModelError(faults.MEMORY)) is None


def test_numpy_without_memory_is_out_of_memory():
    with pytest.raises(MemoryError) as caught:
        np.empty((1 << 40, 1 << 20), np.uint8)
    told = as_user_error(caught.value)
    assert type(told) is OutOfMemory and "this machine ran out of memory" in told.what
    assert is_out_of_memory(caught.value)


def test_an_error_raised_for_another_is_out_of_memory_too():
    """What a caller has made of it: blocks are checkpointed by that."""
    try:
        try:
            raise RuntimeError(faults.MALLOC)
        except RuntimeError as error:
            raise ModelError("its memory cannot be measured block by block") from error
    except ModelError as error:
        assert is_out_of_memory(error)
    assert not is_out_of_memory(ModelError("its memory cannot be measured block by block"))
