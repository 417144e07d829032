// A projection within a step: y = x W^T, (B, O). Constants as in product.cuh; Y: type of y.
#include "product.cuh"

struct Values {
  Y* to;
  static constexpr bool HELD = false;

  __device__ __forceinline__ void begin() {}
  __device__ __forceinline__ void end(const float (&sums)[NEIGHBOURS]) { write(to, sums); }
};

// weight: (O, K). x: (B, K), with neighbours along K side by side.
PRODUCT_KERNEL decode_linear(
    const IO* __restrict__ weight, const X* x, int64 x_row, Y* y, int64 batch, int64 rows, int64 columns) {
  Product product(weight, rows, columns, batch);
  let_next_begin();
  await_previous();
  product.read(x, x_row);
  product.finish([&](int64 row, int64 b) { return Values{y + b * rows + row}; }, nullptr, [] {});
}
