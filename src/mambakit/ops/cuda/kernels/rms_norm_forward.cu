// y = r * weight / sqrt(mean(r^2) + eps), where r is x, or with ADD the sum x + residual, which is an output too.
// A row stays in registers between its sum and its output: every number is read once and written once.
#include "rms_norm.cuh"

extern "C" __global__ void __launch_bounds__(ROWS * THREADS) rms_norm_forward(
    const IO* __restrict__ x, int64 x_row, const RESIDUAL* __restrict__ residual, int64 residual_row,
    const PARAMETER* __restrict__ weight, float eps, IO* __restrict__ y, RESIDUAL* __restrict__ total, int64 rows,
    int64 width) {
  const int64 row = (int64)blockIdx.x * ROWS + threadIdx.x / THREADS;
  const int first = threadIdx.x % THREADS * LANES, vectors = row < rows ? VECTORS : 0;
  x += row * x_row;
  residual += row * residual_row;

  Vector<IO, LANES> x_in[VECTORS];
  Vector<RESIDUAL, LANES> residual_in[VECTORS];
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    const int column = first + v * THREADS * LANES;
    if (v >= vectors || column >= width) continue;
    x_in[v] = read<LANES>(x + column);
    if (ADD) residual_in[v] = read<LANES>(residual + column);
  }

  float r[VECTORS][LANES], square[1] = {};
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    const int column = first + v * THREADS * LANES;
    if (v >= vectors || column >= width) continue;
    unpack(r[v], x_in[v]);
    if (ADD) {
      float old[LANES];
      unpack(old, residual_in[v]);
#pragma unroll
      for (int i = 0; i < LANES; ++i) r[v][i] += old[i];
      write(total + row * width + column, r[v]);
    }
#pragma unroll
    for (int i = 0; i < LANES; ++i) square[0] = fmaf(r[v][i], r[v][i], square[0]);
  }
  sum_over_row(square);
  const float scale = reciprocal_root(square[0] / width + eps);

#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    const int column = first + v * THREADS * LANES;
    if (v >= vectors || column >= width) continue;
    float w[LANES];
    unpack(w, read<LANES>(weight + column));
#pragma unroll
    for (int i = 0; i < LANES; ++i) r[v][i] = r[v][i] * scale * w[i];
    write(y + row * width + column, r[v]);
  }
}
