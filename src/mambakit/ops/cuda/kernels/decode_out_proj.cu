// residual += out_proj(y), in place, and with it the first half of the next norm. Constants as in matvec.cuh.
#include "decode_norm.cuh"
#include "matvec.cuh"

// weight: (M, D). y: (B, D). residual, scaled: (B, M). squares: (B, blocks in x).
extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) decode_out_proj(
    const IO* __restrict__ weight, const IO* __restrict__ norm, const X* y, float* residual, SCALED* scaled,
    float* squares, int64 batch, int64 width, int64 columns) {
  const Place place(width, batch);
  BlockWeights weights = weights_of(weight, place, width, columns);
  const float norm_weight = to_float(norm[min(place.row, width - 1)]);
  let_next_begin();
  await_previous();

  const int64 at = place.batch_row * width + place.row;
  const float before = place.exists ? residual[at] : 0.0f;
  const float r = product(weights, place, y, columns) + before;
  if (place.leads) {
    residual[at] = r;
    scaled[at] = from_float<SCALED>(r * norm_weight);
  }

  // Over the rows of the warp, then over the groups of the block: pairs of neighbours, then pairs of these, and so on, so
  // that it makes no difference how many rows a warp has.
  float square = place.exists ? __fmul_rn(r, r) : 0.0f;  // not to be joined with an addition for some ROWS only
#pragma unroll
  for (int offset = 32 / ROWS; offset < 32; offset *= 2) square += __shfl_xor_sync(0xffffffffu, square, offset);
  __shared__ float groups[GROUPS][BATCH];
  if (place.piece == 0 && threadIdx.x % 32 < 32 / ROWS && threadIdx.x % EACH == 0)
    groups[place.group][threadIdx.x % 32 / EACH] = square;
  __syncthreads();
  if (threadIdx.x >= place.batch) return;
  float sums[GROUPS];
#pragma unroll
  for (int group = 0; group < GROUPS; ++group) sums[group] = groups[group][threadIdx.x];
#pragma unroll
  for (int half = GROUPS / 2; half > 0; half /= 2)
#pragma unroll
    for (int pair = 0; pair < half; ++pair) sums[pair] = sums[2 * pair] + sums[2 * pair + 1];
  squares[(place.first_batch + threadIdx.x) * gridDim.x + blockIdx.x] = sums[0];
}
