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

// 1 / sqrt(mean + eps) of `batch` rows, whose squares are in `parts` parts; to shared memory, for after the next barrier.
__device__ __forceinline__ void find_scales(float* scales, const float* squares, int parts, int batch, int width, float eps) {
  const int lane = threadIdx.x % 32;
  for (int b = threadIdx.x / 32; b < batch; b += blockDim.x / 32) {
    float sum = 0.0f;
    for (int part = lane; part < parts; part += 32) sum += squares[b * parts + part];
    sum = sum_of_all_lanes(sum);
    if (lane == 0) scales[b] = 1.0f / sqrtf(sum / width + eps);
  }
}
