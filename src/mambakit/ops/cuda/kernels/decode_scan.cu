// One step of the scan for every channel, with the projection of dt before it; the states move on in place:
//
//     dt = softplus(dt_proj(low) + bias)    h <- exp(-dt exp(A_log)) h + dt x B    y = (sum_n C_n h_n + D x) silu(z)
//
// SPREAD lanes of a warp share a channel: each has STATES neighbouring states and a part of its row of dt_proj. A block
// takes BATCH rows of the batch.
//
// IO: type of x, z, y and dt_proj. X: type of low, B and C. PROJECTED: the projection has been done, and `dt_weight` is its
// result, (B, D), which the kernel before may have written: not `__restrict__`, or it could be read before the wait.
// Otherwise as in matvec.cuh, with ROWS = 1.
#include "matvec.cuh"

// Functions of one number. Half precision rounds more than the special function unit does; float32 does not.
__device__ __forceinline__ float exponential(float x) { return sizeof(IO) == 4 ? expf(x) : exp2_approx(x * LOG2_E); }
__device__ __forceinline__ float sigmoid_of(float x) { return sizeof(IO) == 2 ? sigmoid(x) : 1.0f / (1.0f + expf(-x)); }
__device__ __forceinline__ float softplus(float v) { return fmaxf(v, 0.0f) + log1pf(expf(-fabsf(v))); }

__device__ __forceinline__ float sum_of_channel(float sum) {
#pragma unroll
  for (int offset = SPREAD / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  return sum;
}

// steering: (B, R + 2 N), with low, B and C side by side. dt_weight: (D, R). A_log: (D, N). state: (B, D, N).
extern "C" __global__ void __launch_bounds__(128, 4) decode_scan(
    const IO* dt_weight, const float* __restrict__ dt_bias, const float* __restrict__ A_log,
    const float* __restrict__ D, const X* steering, int64 steering_row, const IO* x, int64 x_row, const IO* z,
    int64 z_row, float* state, int64 state_batch, int64 state_channel, IO* y, int64 all_batch, int64 channels,
    int64 rank, int64 d_state) {
  const int part = threadIdx.x % SPREAD, n = part * STATES;
  const int64 own = (int64)blockIdx.x * (128 / SPREAD) + threadIdx.x / SPREAD, first = (int64)blockIdx.y * BATCH;
  const int64 channel = min(own, channels - 1);  // every lane stays, to take part in the sums
  const int batch = (int)min((int64)BATCH, all_batch - first);
  const bool has_states = own < channels && n < d_state;

#if !PROJECTED
  Weights<SPREAD> weights(dt_weight, channel, channels, rank, part);
#endif
  state += first * state_batch + channel * state_channel + n;
  Vector<float, STATES> before[BATCH], log_rates = {};
  if (has_states) log_rates = read<STATES>(A_log + channel * d_state + n);
#pragma unroll
  for (int b = 0; b < BATCH; ++b)
    if (has_states && b < batch) before[b] = read<STATES>(state + b * state_batch);
  const float bias = dt_bias[channel], skip = D[channel];
  let_next_begin();
  await_previous();

  float dt[BATCH] = {}, rates[STATES];
#if PROJECTED
#pragma unroll
  for (int b = 0; b < BATCH; ++b) dt[b] = to_float(dt_weight[(first + min(b, batch - 1)) * channels + channel]);
#else
  weights.multiply(dt, steering + first * steering_row, steering_row, batch);
#pragma unroll
  for (int b = 0; b < BATCH; ++b) dt[b] = sum_of_channel(dt[b]);
#endif
#pragma unroll
  for (int i = 0; i < STATES; ++i) rates[i] = -expf(log_rates.items[i]);
#pragma unroll
  for (int b = 0; b < BATCH; ++b) {
    if (b >= batch) break;
    const float step = softplus(dt[b] + bias), u = to_float(x[(first + b) * x_row + channel]);
    const X* B = steering + (first + b) * steering_row + rank;
    float sum = 0.0f;
    if (has_states) {
      float h[STATES];
#pragma unroll
      for (int i = 0; i < STATES; ++i) {
        h[i] = fmaf(exponential(step * rates[i]), before[b].items[i], step * u * to_float(B[n + i]));
        sum = fmaf(to_float(B[d_state + n + i]), h[i], sum);
      }
      write(state + b * state_batch, h);
    }
    sum = fmaf(skip, u, sum_of_channel(sum));
    const float gate = to_float(z[(first + b) * z_row + channel]);
    if (part == 0 && own < channels)
      y[(first + b) * channels + channel] = from_float<IO>(sum * gate * sigmoid_of(gate));
  }
}
