// dt at low rank, B and C of a step: x_proj(x), (B, R + 2 N), in float32. Constants as in matvec.cuh.
#include "matvec.cuh"

// weight: (R + 2 N, D). x: (B, D).
extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) decode_x_proj(
    const IO* __restrict__ weight, const X* x, float* steering, int64 batch, int64 rows, int64 columns) {
  const Place place(rows, batch);
  BlockWeights weights = weights_of(weight, place, rows, columns);
  let_next_begin();
  await_previous();
  const float sum = product(weights, place, x, columns);
  if (place.leads) steering[place.batch_row * rows + place.row] = sum;
}
