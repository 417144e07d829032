// One step of the convolution for every channel; its state, the last W - 1 inputs, moves on in place.
#include "numbers.cuh"

constexpr int PAST = WIDTH - 1;
constexpr int UNROLLED = WIDTH <= 16 ? WIDTH : 1;

extern "C" __global__ void __launch_bounds__(128) causal_conv1d_step(
    IO* __restrict__ state, int64 state_batch, int64 state_channel, int64 state_tap, const IO* __restrict__ x,
    int64 x_batch, int64 x_channel, const PARAMETER* __restrict__ weight, const PARAMETER* __restrict__ bias,
    IO* __restrict__ y, int64 batch, int64 channels) {
  const int64 channel = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  if (channel >= channels) return;
  float taps[WIDTH];
#pragma unroll UNROLLED
  for (int w = 0; w < WIDTH; ++w) taps[w] = to_float(weight[channel * WIDTH + w]);
  const float b = bias ? to_float(bias[channel]) : 0.0f;
  for (int64 row = blockIdx.y; row < batch; row += gridDim.y) {
    IO* past = state + row * state_batch + channel * state_channel;
    const IO now = x[row * x_batch + channel * x_channel];
    IO inputs[WIDTH];
#pragma unroll UNROLLED
    for (int w = 0; w < PAST; ++w) inputs[w] = past[w * state_tap];
    inputs[PAST] = now;
    float sum = b;
#pragma unroll UNROLLED
    for (int w = 0; w < WIDTH; ++w) sum = fmaf(taps[w], to_float(inputs[w]), sum);
#pragma unroll UNROLLED
    for (int w = 0; w < PAST; ++w) past[w * state_tap] = inputs[w + 1];
    y[row * channels + channel] = from_float<IO>(SILU ? sum / (1.0f + expf(-sum)) : sum);
  }
}
