// x, z = in_proj(norm(residual)); x = silu(conv(x)), whose state, the last W - 1 inputs, moves on in place.
//
// The convolution is one of each channel by itself, so the thread that has a channel's input does its step.
//
// TAPS: width of the convolution (W). Otherwise as in product.cuh and decode_norm.cuh. Where there are NEIGHBOURS, they are all
// of x or all of z, and their states lie side by side.
#include "decode_norm.cuh"
#include "product.cuh"

constexpr int PAST = TAPS - 1;

// Neighbouring channels of x with their filters and states, or of z.
struct Channels {
  using Numbers = Vector<IO, NEIGHBOURS>;
  IO* to;
  bool convolves;
  IO* state;
  int64 tap_stride;
  const IO* taps;
  const IO* bias;
  Numbers filters[TAPS], inputs[PAST + 1], offsets;  // of a channel after the other, as they lie in memory
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
    for (int i = 0; i < PAST; ++i) inputs[i] = read<NEIGHBOURS>(state_at(i));
#pragma unroll
    for (int i = 0; i < TAPS; ++i) filters[i] = read<NEIGHBOURS>(taps + i * NEIGHBOURS);
    offsets = read<NEIGHBOURS>(bias);
  }

  __device__ __forceinline__ void end(float (&sums)[NEIGHBOURS]) {
    if (convolves) {
#pragma unroll
      for (int c = 0; c < NEIGHBOURS; ++c) sums[c] = step(c, from_float<IO>(sums[c]));
#pragma unroll
      for (int i = 0; i < PAST; ++i) *reinterpret_cast<Numbers*>(state_at(i)) = inputs[i];
    }
    write(to, sums);
  }

 private:
  __device__ __forceinline__ IO* state_at(int i) const { return state + i * (NEIGHBOURS > 1 ? NEIGHBOURS : tap_stride); }

  // Number i of channel c, of so many.
  __device__ __forceinline__ static IO& of(Numbers* numbers, int count, int c, int i) {
    return numbers[(c * count + i) / NEIGHBOURS].items[(c * count + i) % NEIGHBOURS];
  }

  __device__ __forceinline__ float step(int c, IO input) {
    float sum = to_float(offsets.items[c]);
#pragma unroll
    for (int w = 0; w < PAST; ++w) sum = fmaf(to_float(of(filters, TAPS, c, w)), to_float(of(inputs, PAST, c, w)), sum);
    sum = fmaf(to_float(of(filters, TAPS, c, PAST)), to_float(input), sum);
#pragma unroll
    for (int w = 0; w < PAST; ++w) of(inputs, PAST, c, w) = w + 1 < PAST ? of(inputs, PAST, c, w + 1) : input;
    return sum / (1.0f + expf(-sum));
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
    return Channels{
        (convolves ? x + row : z + row - channels) + b * channels, convolves, conv_state + b * state_batch + row * state_channel,
        state_tap, conv_weight + row * TAPS, conv_bias + row};
  };
  product.each([&](int64 row, int64 b) { channel(row, b).prefetch(); });
  let_next_begin();
  await_previous();
  product.read(scaled, width);

  __shared__ float scales[BATCH];
  const auto find = [&] {
    find_scales<BATCH>(scales, squares + product.first_batch * parts, parts, product.batch, width, eps);
  };
  product.finish(channel, scales, find);
}
