// Gradients of rms_norm_forward. With s = 1 / sqrt(mean(r^2) + eps) and g = dy * weight:
//
//     dr = s (g - r s^2 mean(g r)) + dtotal      dweight = sum over rows of dy r s
//
// dr is the gradient of x and of the residual. The blocks walk all rows and keep their part of dweight in registers;
// rms_norm_add_parts adds the parts. r is x where FROM is 0, the sum that the forward wrote where it is 1 (then in
// `residual`), x + residual where it is 2.
#include "rms_norm.cuh"

extern "C" __global__ void __launch_bounds__(ROWS * THREADS, BLOCKS) rms_norm_backward(
    const IO* __restrict__ x, int64 x_row, const RESIDUAL* __restrict__ residual, int64 residual_row,
    const PARAMETER* __restrict__ weight, float eps, const IO* __restrict__ dy, int64 dy_row,
    const RESIDUAL* __restrict__ dtotal, int64 dtotal_row, IO* __restrict__ dx, RESIDUAL* __restrict__ dresidual,
    float* __restrict__ dweight, int64 rows, int64 width) {
  const int first = threadIdx.x % THREADS * LANES, stride = THREADS * LANES;
  float w[VECTORS][LANES] = {}, dw[VECTORS][LANES] = {};
#pragma unroll
  for (int v = 0; v < VECTORS; ++v)
    if (first + v * stride < width) unpack(w[v], read<LANES>(weight + first + v * stride));

  // All threads of a block walk equally far, because they meet in sum_over_row.
  for (int64 base = (int64)blockIdx.x * ROWS; base < rows; base += (int64)gridDim.x * ROWS) {
    const int64 row = base + threadIdx.x / THREADS;
    const int64 end = row < rows ? width : 0;
    float r[VECTORS][LANES], g[VECTORS][LANES], sums[2] = {};  // of r^2 and g r
    Vector<RESIDUAL, LANES> along[VECTORS];                    // dtotal
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      const int64 column = first + v * stride;
      if (column >= end) continue;
      if (FROM == 1) {
        unpack(r[v], read<LANES>(residual + row * residual_row + column));
      } else {
        unpack(r[v], read<LANES>(x + row * x_row + column));
        if (FROM == 2) {
          float old[LANES];
          unpack(old, read<LANES>(residual + row * residual_row + column));
#pragma unroll
          for (int i = 0; i < LANES; ++i) r[v][i] += old[i];
        }
      }
      unpack(g[v], read<LANES>(dy + row * dy_row + column));
      if (dtotal) along[v] = read<LANES>(dtotal + row * dtotal_row + column);
    }
#pragma unroll
    for (int v = 0; v < VECTORS; ++v)
      if (first + v * stride < end)
#pragma unroll
        for (int i = 0; i < LANES; ++i) {
          sums[0] = fmaf(r[v][i], r[v][i], sums[0]);
          sums[1] = fmaf(g[v][i] * w[v][i], r[v][i], sums[1]);
        }
    sum_over_row(sums);
    const float scale = reciprocal_root(sums[0] / width + eps), pull = scale * scale * (sums[1] / width);

#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      const int64 column = first + v * stride;
      if (column >= end) continue;
      float dr[LANES];
      if (dtotal) unpack(dr, along[v]);
#pragma unroll
      for (int i = 0; i < LANES; ++i) {
        dw[v][i] = fmaf(g[v][i], r[v][i] * scale, dw[v][i]);
        dr[i] = fmaf(scale, fmaf(-r[v][i], pull, g[v][i] * w[v][i]), dtotal ? dr[i] : 0.0f);
      }
      write(dx + row * width + column, dr);
      if (dresidual) write(dresidual + row * width + column, dr);
    }
  }

  // The rows of a block in a fixed order.
  __shared__ float block[ROWS][THREADS * LANES];
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < LANES; ++i) block[threadIdx.x / THREADS][first + i] = dw[v][i];
    __syncthreads();
    for (int at = threadIdx.x; at < stride && at + v * stride < width; at += ROWS * THREADS) {
      float sum = 0.0f;
#pragma unroll
      for (int other = 0; other < ROWS; ++other) sum += block[other][at];
      dweight[blockIdx.x * width + at + v * stride] = sum;
    }
  }
}

// dweight, (width): the sums of what the blocks left, (parts, width), in a fixed order. A block has 32 columns, a warp every
// ADDERS-th part.
constexpr int ADDERS = 8;
extern "C" __global__ void __launch_bounds__(32 * ADDERS) rms_norm_add_parts(
    const float* __restrict__ found, PARAMETER* __restrict__ dweight, int64 parts, int64 width) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64 column = (int64)blockIdx.x * 32 + lane;
  __shared__ float sums[ADDERS][32];
  float sum = 0.0f;
#pragma unroll 8
  for (int64 part = warp; part < (column < width ? parts : 0); part += ADDERS) sum += found[part * width + column];
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || column >= width) return;
#pragma unroll
  for (int other = 1; other < ADDERS; ++other) sum += sums[other][lane];
  dweight[column] = from_float<PARAMETER>(sum);
}
