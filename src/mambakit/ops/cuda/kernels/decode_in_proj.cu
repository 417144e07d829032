// x, z = in_proj(norm(residual)); x = silu(conv(x)), whose state, the last W - 1 inputs, moves on in place.
//
// The convolution is one of each channel by itself, so the thread that has a channel's input does its step.
//
// TAPS: width of the convolution (W). Otherwise as in product.cuh and decode_norm.cuh.
#include "decode_norm.cuh"
#include "product.cuh"

constexpr int PAST = TAPS - 1;

// The end of one sum: a channel of x with its filter and state, or of z.
struct Channel {
  IO* to;
  bool convolves;
  IO* state;
  int64 tap_stride;
  const IO* taps;
  const IO* bias;
  float filter[TAPS], inputs[TAPS], offset;
  static constexpr bool HELD = false;  // through the product it would cost registers

  // Into the second-level cache, which takes none.
  __device__ __forceinline__ void prefetch() const {
    if (!convolves) return;
    asm volatile("prefetch.global.L2 [%0];" ::"l"(taps));
    asm volatile("prefetch.global.L2 [%0];" ::"l"(bias));
    if (PAST > 0) asm volatile("prefetch.global.L2 [%0];" ::"l"(state));
  }

  __device__ __forceinline__ void begin() {
    if (!convolves) return;
#pragma unroll
    for (int w = 0; w < PAST; ++w) inputs[w] = to_float(state[w * tap_stride]);
#pragma unroll
    for (int w = 0; w < TAPS; ++w) filter[w] = to_float(taps[w]);
    offset = to_float(*bias);
  }

  __device__ __forceinline__ void end(float input) {
    const IO rounded = from_float<IO>(input);
    if (!convolves) {
      *to = rounded;
      return;
    }
    inputs[PAST] = to_float(rounded);
    float sum = offset;
#pragma unroll
    for (int w = 0; w < TAPS; ++w) sum = fmaf(filter[w], inputs[w], sum);
#pragma unroll
    for (int w = 0; w < PAST; ++w) state[w * tap_stride] = from_float<IO>(inputs[w + 1]);
    *to = from_float<IO>(sum / (1.0f + expf(-sum)));
  }
};

// weight: (2 D, M). scaled: (B, M). squares: (B, parts). x, z: (B, D).
PRODUCT_KERNEL decode_in_proj(
    const IO* __restrict__ weight, const IO* __restrict__ conv_weight, const IO* __restrict__ conv_bias, const X* scaled,
    const float* squares, int64 parts, float eps, IO* conv_state, int64 state_batch, int64 state_channel,
    int64 state_tap, IO* x, IO* z, int64 batch, int64 channels, int64 width) {
  Product product(weight, 2 * channels, width, batch);
  const auto channel = [&](int64 row, int64 b) {
    const bool convolves = row < channels;
    return Channel{
        (convolves ? x + row : z + row - channels) + b * channels, convolves, conv_state + b * state_batch + row * state_channel,
        state_tap, conv_weight + row * TAPS, conv_bias + row};
  };
  product.each([&](int64 row, int64 b) { channel(row, b).prefetch(); });
  let_next_begin();
  await_previous();
  product.read(scaled, width);

  __shared__ float scales[BATCH];
  find_scales<BATCH>(scales, squares + product.first_batch * parts, parts, product.batch, width, eps);
  product.finish(channel, scales);
}
