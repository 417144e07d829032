// x, z = in_proj(norm(residual)); x = silu(conv(x)), whose state, the last W - 1 inputs, moves on in place.
//
// The convolution is one of each channel by itself, so the lane that has a channel's input does its step.
//
// TAPS: width of the convolution (W). Otherwise as in matvec.cuh and decode_norm.cuh.
#include "decode_norm.cuh"
#include "matvec.cuh"

constexpr int PAST = TAPS - 1;

// The state of one channel in one row of the batch, and the channel's filter.
struct Convolution {
  IO* state;
  int64 tap_stride;
  const IO* taps;
  const IO* bias;

  // Into the second-level cache, which takes no registers.
  __device__ __forceinline__ void prefetch() const {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(taps));
    asm volatile("prefetch.global.L2 [%0];" ::"l"(bias));
    if (PAST > 0) asm volatile("prefetch.global.L2 [%0];" ::"l"(state));
  }

  __device__ __forceinline__ float step(float input) {
    IO inputs[TAPS];
#pragma unroll
    for (int w = 0; w < PAST; ++w) inputs[w] = state[w * tap_stride];
    inputs[PAST] = from_float<IO>(input);
    float sum = to_float(*bias);
#pragma unroll
    for (int w = 0; w < TAPS; ++w) sum = fmaf(to_float(taps[w]), to_float(inputs[w]), sum);
#pragma unroll
    for (int w = 0; w < PAST; ++w) state[w * tap_stride] = inputs[w + 1];
    return sum / (1.0f + expf(-sum));
  }
};

// weight: (2 D, M). scaled: (B, M). squares: (B, parts). x, z: (B, D).
extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) decode_in_proj(
    const IO* __restrict__ weight, const IO* __restrict__ conv_weight, const IO* __restrict__ conv_bias, const X* scaled,
    const float* squares, int64 parts, float eps, IO* conv_state, int64 state_batch, int64 state_channel,
    int64 state_tap, IO* x, IO* z, int64 batch, int64 channels, int64 width) {
  const Place place(2 * channels, batch);
  BlockWeights weights = weights_of(weight, place, 2 * channels, width);
  const bool convolves = place.leads && place.row < channels;
  Convolution convolution{
      conv_state + place.batch_row * state_batch + place.row * state_channel, state_tap, conv_weight + place.row * TAPS,
      conv_bias + place.row};
  if (convolves) convolution.prefetch();
  let_next_begin();
  await_previous();

  __shared__ float scales[BATCH];
  find_scales(scales, squares + place.first_batch * parts, parts, place.batch, width, eps);
  const float sum = product(weights, place, scaled, width);
  if (!place.leads) return;
  const float value = sum * scales[place.batch_row - place.first_batch];
  if (convolves) x[place.batch_row * channels + place.row] = from_float<IO>(convolution.step(value));
  else z[place.batch_row * channels + place.row - channels] = from_float<IO>(value);
}
