// The residual stream before the first layer, (B, M): the embedding of each row's token. With it the first half of a norm.
#include "decode_norm.cuh"
#include "overlap.cuh"

// One block a row.
extern "C" __global__ void __launch_bounds__(256) decode_embedding(
    const TOKEN* __restrict__ tokens, const IO* __restrict__ embedding, int64 vocab, const IO* __restrict__ norm,
    float* __restrict__ residual, X* __restrict__ scaled, float* __restrict__ squares, int64 width) {
  let_next_begin();
  const int64 row = blockIdx.x, token = tokens[row];
  if (token < 0 || token >= vocab) __trap();  // as PyTorch's own lookup does
  float square = 0.0f;
  for (int64 m = threadIdx.x; m < width; m += 256) {
    const float r = to_float(embedding[token * width + m]);
    residual[row * width + m] = r;
    scaled[row * width + m] = from_float<X>(r * to_float(norm[m]));
    square = fmaf(r, r, square);
  }
  __shared__ float warps[8];
  square = sum_of_all_lanes(square);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = square;
  __syncthreads();
  if (threadIdx.x > 0) return;
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < 8; ++warp) sum += warps[warp];
  squares[row] = sum;
}
