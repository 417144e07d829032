// One step of the scan for every channel; its states move on in place:
//
//     h <- exp(dt A) h + dt x B        y = (sum_n C_n h_n + D x) silu(z)        complex: y = 2 Re(sum_n C_n h_n) + ...
//
// SPREAD lanes of a warp share a channel; each has LANES neighbouring states at a time. Memory bound by the states.
//
// X, DT, Z, B_TYPE, C_TYPE: types in memory. PARAMETER: of D and dt_bias. COMPLEX: states, A, B and C are pairs of float.
#include "vectors.cuh"

constexpr int NUMBERS = COMPLEX ? 2 : 1;  // floats in a state

__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

extern "C" __global__ void __launch_bounds__(128) selective_scan_step(
    float* __restrict__ state, int64 state_batch, int64 state_channel, const X* __restrict__ x, int64 x_batch,
    int64 x_channel, const DT* __restrict__ dt, int64 dt_batch, int64 dt_channel, const float* __restrict__ A,
    const B_TYPE* __restrict__ B, int64 B_batch, int64 B_group, int64 B_channels, const C_TYPE* __restrict__ C,
    int64 C_batch, int64 C_group, int64 C_channels, const PARAMETER* __restrict__ D, const Z* __restrict__ z,
    int64 z_batch, int64 z_channel, const PARAMETER* __restrict__ dt_bias, int dt_softplus, X* __restrict__ y,
    int64 batch, int64 channels, int64 d_state) {
  const int lane = threadIdx.x % SPREAD;
  const int64 channel = (int64)blockIdx.x * (128 / SPREAD) + threadIdx.x / SPREAD;
  const bool inside = channel < channels;  // every lane stays, to take part in the sum
  const int64 numbers = inside ? d_state * NUMBERS : 0;

  for (int64 row = blockIdx.y; row < batch; row += gridDim.y) {
    float u = 0.0f, step = 0.0f, gate = 1.0f, sum = 0.0f;
    if (inside) {
      u = to_float(x[row * x_batch + channel * x_channel]);
      step = to_float(dt[row * dt_batch + channel * dt_channel]);
      if (dt_bias) step += to_float(dt_bias[channel]);
      if (dt_softplus) step = softplus(step);
    }
    float* h_at = state + row * state_batch + channel * state_channel;
    const B_TYPE* B_at = B + row * B_batch + channel / B_channels * B_group;
    const C_TYPE* C_at = C + row * C_batch + channel / C_channels * C_group;
    for (int n = lane * LANES; n < numbers; n += SPREAD * LANES) {
      float h[LANES], a[LANES], b[LANES], c[LANES];
      unpack(h, read<LANES>(h_at + n));
      unpack(a, read<LANES>(A + channel * numbers + n));
      unpack(b, read<LANES>(B_at + n));
      unpack(c, read<LANES>(C_at + n));
#pragma unroll
      for (int i = 0; i < LANES; i += NUMBERS) {
        if constexpr (COMPLEX) {
          const float size = expf(step * a[i]);
          float sine, cosine;
          sincosf(step * a[i + 1], &sine, &cosine);
          const float re = size * cosine, im = size * sine, old = h[i];
          h[i] = fmaf(re, old, fmaf(-im, h[i + 1], step * u * b[i]));
          h[i + 1] = fmaf(re, h[i + 1], fmaf(im, old, step * u * b[i + 1]));
          sum = fmaf(2.0f * c[i], h[i], fmaf(-2.0f * c[i + 1], h[i + 1], sum));
        } else {
          h[i] = fmaf(expf(step * a[i]), h[i], step * u * b[i]);
          sum = fmaf(c[i], h[i], sum);
        }
      }
      write(h_at + n, h);
    }
#pragma unroll
    for (int offset = SPREAD / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (!inside || lane > 0) continue;
    if (D) sum = fmaf(to_float(D[channel]), u, sum);
    if (z) {
      gate = to_float(z[row * z_batch + channel * z_channel]);
      sum *= gate / (1.0f + expf(-gate));
    }
    y[row * channels + channel] = from_float<X>(sum);
  }
}
