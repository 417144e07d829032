// A few rows times a matrix of codes: y = x weight^T + bias. Memory bound by the codes while there are few rows.
//
// A warp computes OUTPUTS neighbouring outputs for up to ROWS rows of x. A lane reads sixteen bytes of codes of each
// output, and the numbers of x that belong to them, which the cache holds; it sums in float.
//
// X: type of x and y. BITS, GROUP: see quantised.cuh.
#include "quantised.cuh"

constexpr int WARPS = 4;
constexpr int ALONG = sizeof(X) == 2 ? 8 : 4;  // numbers of x in sixteen bytes

// Numbers of x from a column on; zeros from `columns` on, which eight divides.
__device__ __forceinline__ void read_run(float (&out)[RUN], const X* row, int64 column, int64 columns) {
#pragma unroll
  for (int first = 0; first < RUN; first += ALONG) {
    float part[ALONG] = {};
    if (column + first < columns) unpack(part, read<ALONG>(row + column + first));
#pragma unroll
    for (int i = 0; i < ALONG; ++i) out[first + i] = part[i];
  }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) quantised_linear_step(
    const X* __restrict__ x, int64 x_stride, const char* __restrict__ codes, int64 pieces,
    const bfloat16* __restrict__ scales, int64 groups, const float* __restrict__ bias, X* __restrict__ y, int64 rows,
    int64 outputs, int64 columns) {
  const int lane = threadIdx.x % 32;
  const int64 output = ((int64)blockIdx.x * WARPS + threadIdx.x / 32) * OUTPUTS;
  if (output >= outputs) return;
  float totals[OUTPUTS][ROWS] = {};

  for (int64 piece = lane; piece < pieces; piece += 32) {
    Piece held[OUTPUTS];
#pragma unroll
    for (int o = 0; o < OUTPUTS; ++o) held[o] = read_piece(codes, min(output + o, outputs - 1) * pieces + piece);
#pragma unroll
    for (int run = 0; run < RUNS; ++run) {
      const int64 column = column_of(piece, run);
      float numbers[OUTPUTS][RUN];
#pragma unroll
      for (int o = 0; o < OUTPUTS; ++o) {
        decode(numbers[o], held[o].words, run);
        const float scale = to_float(scales[min(output + o, outputs - 1) * groups + column / GROUP]);
#pragma unroll
        for (int i = 0; i < RUN; ++i) numbers[o][i] *= scale;
      }
#pragma unroll
      for (int row = 0; row < ROWS; ++row) {
        float factors[RUN];
        read_run(factors, x + min((int64)row, rows - 1) * x_stride, column, columns);
#pragma unroll
        for (int o = 0; o < OUTPUTS; ++o)
#pragma unroll
          for (int i = 0; i < RUN; ++i) totals[o][row] = fmaf(numbers[o][i], factors[i], totals[o][row]);
      }
    }
  }

#pragma unroll
  for (int o = 0; o < OUTPUTS; ++o)
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      float total = totals[o][row];
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(0xffffffffu, total, offset);
      if (lane == 0 && row < rows && output + o < outputs) {
        if (bias) total += bias[output + o];
        y[row * outputs + output + o] = from_float<X>(total);
      }
    }
}
