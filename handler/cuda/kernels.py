"""Kernels that decide on the GPU which rows leave, and move the rows that stay.

They are compiled when a model is loaded.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

MAX_ROWS = 1024
"""The largest number of rows of a batch: one block of threads makes a decision, with one thread for each row."""

N, NEXT, N_MOVED, N_HITS, THROUGH, LEFT, ROWS, MOVED, HITS, HIT_ROWS = (
    *range(4), *range(4, 4 + 6 * MAX_ROWS, MAX_ROWS))
"""The offsets of the fields of `struct Batch`, in integers."""
LENGTH = 4 + 7 * MAX_ROWS
"""The number of integers in `struct Batch`."""

_SOURCE = r"""
extern "C" __device__ __cudart_builtin__ void cudaGraphSetConditional(cudaGraphConditionalHandle handle,
                                                                       unsigned int value);

struct Batch {
    int n;                   // number of rows still in the batch
    int next;                // index of the graph size for n; beyond the last index if n is 0
    int n_moved;             // number of rows to copy to the input of the next stage; 0 if they are there already
    int n_hits;              // number of rows that the latest exit answered
    int through[MAX_ROWS];   // by row: whether it runs to the end whatever the exits decide
    int left[MAX_ROWS];      // by row: the stage after which it was answered
    int rows[MAX_ROWS];      // by place: the row at this place
    int moved[MAX_ROWS];     // places of the rows that stay
    int hits[MAX_ROWS];      // places of the rows that the latest exit answered
    int hit_rows[MAX_ROWS];  // numbers of these rows
    int waits[MAX_ROWS];     // by row: whether it has no answer yet
};

// Returns, for each thread, how many chosen threads come before it; *total is the number of all chosen threads.
__device__ int count_before(bool chosen, int* total) {
    __shared__ int of_warp[32];
    unsigned votes = __ballot_sync(0xffffffffu, chosen);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (lane == 0) of_warp[warp] = __popc(votes);
    __syncthreads();
    int before = 0, all = 0;
    for (int other = 0; other < blockDim.x / 32; ++other) {
        if (other < warp) before += of_warp[other];
        all += of_warp[other];
    }
    __syncthreads();
    *total = all;
    return before + __popc(votes & ((1u << lane) - 1));
}

extern "C" __global__ void begin(Batch* batch, const int* size_of) {
    int row = threadIdx.x;
    if (row < batch->n) {
        batch->rows[row] = row;
        batch->waits[row] = 1;
    }
    if (row == 0) batch->next = size_of[batch->n];
}

// sure: by place, or null if all rows are sure. size_of: by number of rows, the index of the size that holds them.
extern "C" __global__ void decide(Batch* batch, const bool* sure, int stage, int shrink_from, const int* size_of) {
    int place = threadIdx.x, n = batch->n, row = place < n ? batch->rows[place] : 0;
    bool hit = place < n && batch->waits[row] && (!sure || sure[place]);
    if (hit) {
        batch->waits[row] = 0;
        batch->left[row] = stage;
    }
    bool stays = place < n && (batch->waits[row] || batch->through[row]);
    int n_hits, n_stay;
    int nth_hit = count_before(hit, &n_hits), nth_stay = count_before(stays, &n_stay);
    bool shrinks = n - n_stay >= shrink_from && size_of[n_stay] != size_of[n];
    if (hit) {
        batch->hits[nth_hit] = place;
        batch->hit_rows[nth_hit] = row;
    }
    if (stays && shrinks) {
        batch->moved[nth_stay] = place;
        batch->rows[nth_stay] = row;
    }
    if (place == 0) {
        batch->n_hits = n_hits;
        batch->n_moved = shrinks ? n_stay : 0;
        if (shrinks || n_stay == 0) {
            batch->n = n_stay;
            batch->next = size_of[n_stay];
        }
    }
}

// Copies `count` rows to the memory at the address targets[*which]. from, to: places; null means 0, 1, 2, ...
#define MOVE(name, Unit)                                                                                        \
    extern "C" __global__ void name(const Unit* source, const int* from, const long long* targets,              \
                                    const int* which, const int* to, const int* count, int units) {             \
        int number = blockIdx.y;                                                                                \
        if (number >= *count) return;                                                                           \
        const Unit* begin = source + (long long)units * (from ? from[number] : number);                         \
        Unit* end = (Unit*)targets[which ? *which : 0] + (long long)units * (to ? to[number] : number);         \
        for (int unit = blockIdx.x * blockDim.x + threadIdx.x; unit < units; unit += gridDim.x * blockDim.x)    \
            end[unit] = begin[unit];                                                                            \
    }
MOVE(move16, uint4)
MOVE(move4, unsigned int)
MOVE(move2, unsigned short)
MOVE(move1, unsigned char)

extern "C" __global__ void choose(cudaGraphConditionalHandle handle, const int* value) {
    cudaGraphSetConditional(handle, *value);
}
"""


def launch(name: str, blocks: tuple[int, int], threads: int, *arguments: Tensor | int | None) -> None:
    """Launch a kernel on the current stream; tensors are passed as their addresses, and numbers as ints.

    Raises:
        RuntimeError: CUDA refuses the launch.
    """
    from cuda.bindings import driver

    values = tuple(value.data_ptr() if isinstance(value, Tensor) else value or 0 for value in arguments)
    types = tuple(ctypes.c_int if isinstance(value, int) else ctypes.c_void_p for value in arguments)
    checked(driver.cuLaunchKernel(function(name), *blocks, 1, threads, 1, 1, 0,
                                  torch.cuda.current_stream().cuda_stream, (values, types), 0))


def move(source: Tensor, from_: Tensor | None, targets: Tensor, which: Tensor | None, to: Tensor | None,
         count: Tensor) -> None:
    """Copy rows of a tensor.

    Args:
        source: (B, ...) tensor. Its rows follow each other in memory without gaps, like those of the targets, and all
            of these addresses are multiples of 16 bytes.
        from_: int32 numbers of the rows to copy; None means 0, 1, 2, ...
        targets: (T,) int64 addresses of memory with rows of the same layout.
        which: () int32 index of the target; None means the first one.
        to: int32 numbers of the places in the target; None means 0, 1, 2, ...
        count: () int32 number of rows to copy.
    """
    n_bytes = source[0].numel() * source.element_size()
    width = next(width for width in (16, 4, 2, 1) if n_bytes % width == 0)
    units = n_bytes // width
    launch(f"move{width}", (min(64, -(-units // 1024)), len(source)), 256, source, from_, targets, which, to, count,
           units)


def compiled(architecture: str) -> bytes:
    """Return the machine code of all kernels for a GPU's architecture, such as sm_90.

    Raises:
        RuntimeError: the compiler does not know the architecture.
    """
    from cuda.bindings import nvrtc

    program = checked(nvrtc.nvrtcCreateProgram(_SOURCE.encode(), b"early_exit.cu", 0, [], []))
    options = [f"--gpu-architecture={architecture}".encode(), f"--define-macro=MAX_ROWS={MAX_ROWS}".encode()]
    checked(nvrtc.nvrtcCompileProgram(program, len(options), options))
    binary = bytes(checked(nvrtc.nvrtcGetCUBINSize(program)))
    checked(nvrtc.nvrtcGetCUBIN(program, binary))
    return binary


def function(name: str) -> Any:
    """Return one of the kernels on torch's current device, for the driver's bindings."""
    return _function(name, torch.cuda.current_device())


@cache
def _function(name: str, device: int) -> Any:
    from cuda.bindings import driver

    return checked(driver.cuModuleGetFunction(_module(device), name.encode()))


@cache
def _module(device: int) -> Any:
    from cuda.bindings import driver

    return checked(driver.cuModuleLoadData(compiled("sm_{}{}".format(*torch.cuda.get_device_capability(device)))))


def checked(answer: tuple[Any, ...]) -> Any:
    """Return the results of a call of CUDA's bindings, without its status.

    Raises:
        RuntimeError: the status is not success.
    """
    status, *values = answer
    if int(status) != 0:
        raise RuntimeError(f"CUDA: {status.name}")
    return values[0] if len(values) == 1 else values
