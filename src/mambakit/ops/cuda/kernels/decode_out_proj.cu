// residual += out_proj(y), in place, and with it the first half of the next norm. Constants as in product.cuh.
// SCALED: type of what the next product reads.
#include "decode_norm.cuh"
#include "product.cuh"

// One number of the residual stream.
struct Addition {
  float* residual;
  SCALED* scaled;
  const IO* norm;
  float before, norm_weight;
  static constexpr bool HELD = true;

  __device__ __forceinline__ void begin() { before = *residual, norm_weight = to_float(*norm); }
  __device__ __forceinline__ float end(float sum) {
    const float r = sum + before;
    *residual = r;
    *scaled = from_float<SCALED>(r * norm_weight);
    return r;
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
  product.finish(
      [&](int64 row, int64 b) { return Addition{residual + b * width + row, scaled + b * width + row, norm + row}; },
      nullptr, squares);
}
