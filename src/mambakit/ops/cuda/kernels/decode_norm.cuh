// The norm of a decoding step, in two halves. Who writes the residual stream r also writes r * weight, and sums of squares of
// parts of a row; who needs the norm multiplies the former, and scales the result by what the latter give:
//
//     W (r weight / sqrt(mean(r^2) + eps)) = (W (r weight)) / sqrt(mean(r^2) + eps)
#pragma once
#include "numbers.cuh"

__device__ __forceinline__ float sum_of_all_lanes(float sum) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  return sum;
}

// 1 / sqrt(mean + eps) of `batch` rows of at most MOST, whose squares are in `parts` parts; to shared memory, for after the
// next barrier. A warp takes a row, or eight of many.
template <int MOST>
__device__ __forceinline__ void find_scales(float* scales, const float* squares, int parts, int batch, int width, float eps) {
  constexpr int LANES_A_ROW = MOST > 8 ? 4 : 32;
  const int lane = threadIdx.x % LANES_A_ROW;
  for (int first = 0; first < batch; first += blockDim.x / LANES_A_ROW) {
    const int b = first + threadIdx.x / LANES_A_ROW;
    float sum = 0.0f;
    if (b < batch)
#pragma unroll 4
      for (int part = lane; part < parts; part += LANES_A_ROW) sum += squares[b * parts + part];
#pragma unroll
    for (int offset = LANES_A_ROW / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (lane == 0 && b < batch) scales[b] = 1.0f / sqrtf(sum / width + eps);
  }
}
