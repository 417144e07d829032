// residual += out_proj(y), in place, and with it the first half of the next norm. Constants as in product.cuh.
// SCALED: type of what the next product reads.
#include "decode_norm.cuh"
#include "product.cuh"

// Neighbours in the residual stream.
struct Addition {
  float* residual;
  SCALED* scaled;
  const IO* norm;
  Vector<float, NEIGHBOURS> before;
  Vector<IO, NEIGHBOURS> norm_weight;
  static constexpr bool HELD = true;

  __device__ __forceinline__ void begin() { before = read<NEIGHBOURS>(residual), norm_weight = read<NEIGHBOURS>(norm); }
  __device__ __forceinline__ void end(float (&r)[NEIGHBOURS]) {
    float normed[NEIGHBOURS];
#pragma unroll
    for (int i = 0; i < NEIGHBOURS; ++i) r[i] += before.items[i], normed[i] = r[i] * to_float(norm_weight.items[i]);
    write(residual, r);
    write(scaled, normed);
  }
};

// weight: (M, D). y: (B, D). residual, scaled: (B, M). squares: (B, parts), a part for the rows of W of a block.
PRODUCT_KERNEL decode_out_proj(
    const IO* __restrict__ weight, const IO* __restrict__ norm, const X* y, float* residual, SCALED* scaled,
    float* squares, int64 batch, int64 width, int64 columns) {
  Product product(weight, width, columns, batch);
  let_next_begin();
  await_previous();
  product.read(y, columns);
  product.finish_with_squares(
      [&](int64 row, int64 b) { return Addition{residual + b * width + row, scaled + b * width + row, norm + row}; },
      squares);
}
