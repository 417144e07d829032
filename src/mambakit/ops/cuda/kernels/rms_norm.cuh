// What forward and backward of the norm share: how rows are spread over threads, and sums over a row.
//
// THREADS threads of a block of ROWS * THREADS share a row; a thread holds VECTORS times LANES neighbouring numbers.
//
// IO: type of x and y. RESIDUAL: of the residual stream. PARAMETER: of the weight. LANES divides the width and strides.
#pragma once
#include "vectors.cuh"

// 1 / sqrt(x), rounded as well as a division allows.
__device__ __forceinline__ float reciprocal_root(float x) { return 1.0f / sqrtf(x); }

// The sums of COUNT values over the threads of a row, in a fixed order; every thread gets them.
template <int COUNT> __device__ __forceinline__ void sum_over_row(float (&sums)[COUNT]) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
#pragma unroll
    for (int i = 0; i < COUNT; ++i) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], offset);
  if constexpr (THREADS > 32) {
    constexpr int WARPS = THREADS / 32;
    __shared__ float warps[ROWS][WARPS][COUNT];
    const int row = threadIdx.x / THREADS;
    __syncthreads();  // the sums of the row before have been read
    if (threadIdx.x % 32 == 0)
#pragma unroll
      for (int i = 0; i < COUNT; ++i) warps[row][threadIdx.x % THREADS / 32][i] = sums[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      sums[i] = 0.0f;
#pragma unroll
      for (int warp = 0; warp < WARPS; ++warp) sums[i] += warps[row][warp][i];
    }
  }
}
