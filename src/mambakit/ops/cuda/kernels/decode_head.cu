// logits = head(norm(residual)), (B, V). Constants as in matvec.cuh and decode_norm.cuh.
#include "decode_norm.cuh"
#include "matvec.cuh"

// weight: (V, M). scaled: (B, M). squares: (B, parts).
extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) decode_head(
    const IO* __restrict__ weight, const X* scaled, const float* squares, int64 parts, float eps, IO* logits,
    int64 batch, int64 vocab, int64 width) {
  const Place place(vocab, batch);
  BlockWeights weights = weights_of(weight, place, vocab, width);
  let_next_begin();
  await_previous();
  __shared__ float scales[BATCH];
  find_scales(scales, squares + place.first_batch * parts, parts, place.batch, width, eps);
  const float sum = product(weights, place, scaled, width);
  if (place.leads)
    logits[place.batch_row * vocab + place.row] = from_float<IO>(sum * scales[place.batch_row - place.first_batch]);
}
