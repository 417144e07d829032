// logits = head(norm(residual)), (B, V). Constants as in product.cuh and decode_norm.cuh.
#include "decode_norm.cuh"
#include "product.cuh"

struct Logits {
  IO* to;
  static constexpr bool HELD = false;

  __device__ __forceinline__ void begin() {}
  __device__ __forceinline__ void end(const float (&sums)[NEIGHBOURS]) { write(to, sums); }
};

// weight: (V, M). scaled: (B, M). squares: (B, parts).
PRODUCT_KERNEL decode_head(
    const IO* __restrict__ weight, const X* scaled, const float* squares, int64 parts, float eps, IO* logits,
    int64 batch, int64 vocab, int64 width) {
  Product product(weight, vocab, width, batch);
  let_next_begin();
  await_previous();
  product.read(scaled, width);
  __shared__ float scales[BATCH];
  const auto find = [&] {
    find_scales<BATCH>(scales, squares + product.first_batch * parts, parts, product.batch, width, eps);
  };
  product.finish([&](int64 row, int64 b) { return Logits{logits + b * vocab + row}; }, scales, find);
}
