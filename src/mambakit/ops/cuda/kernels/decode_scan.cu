// One step of the scan for every channel, with the projection of dt before it; the states move on in place:
//
//     dt = softplus(dt_proj(low) + bias)    h <- exp(-dt exp(A_log)) h + dt x B    y = (sum_n C_n h_n + D x) silu(z)
//
// SPREAD lanes of a warp share a channel: each has STATES neighbouring states and a part of its row of dt_proj. A block
// takes BATCH rows of the batch, of which AHEAD are read together; the states of HELD rows are on their way.
//
// IO: type of x, z, y and dt_proj. X: type of low, B and C. STEERS: neighbours of B, and of C, that one access may read, a
// divisor of STATES. PROJECTED: the projection has been done, and `dt_weight` is its result, (B, D), which the kernel before
// may have written: not `__restrict__`, or it could be read before the wait. AHEAD: a divisor of BATCH and HELD. Otherwise
// as in matvec.cuh, with ROWS = 1.
#include "decode_functions.cuh"
#include "matvec.cuh"

__device__ __forceinline__ float sum_of_channel(float sum) {
#pragma unroll
  for (int offset = SPREAD / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  return sum;
}

// Neighbouring numbers, of which so many may be read in one access.
template <class T> __device__ __forceinline__ void read_steering(float (&to)[STATES], const T* from) {
#pragma unroll
  for (int i = 0; i < STATES; i += STEERS) {
    float some[STEERS];
    unpack(some, read<STEERS>(from + i));
#pragma unroll
    for (int j = 0; j < STEERS; ++j) to[i + j] = some[j];
  }
}

// steering: (B, R + 2 N), with low, B and C side by side. dt_weight: (D, R). A_log: (D, N). state: (B, D, N).
extern "C" __global__ void __launch_bounds__(128, PROJECTED ? 6 : 4) decode_scan(
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
  const auto read_states = [&](int b) {
    if (has_states && b < batch) before[b] = read<STATES>(state + b * state_batch);
  };
  if (has_states) log_rates = read<STATES>(A_log + channel * d_state + n);
#pragma unroll
  for (int b = 0; b < HELD; ++b) read_states(b);
  const float bias = dt_bias[channel], skip = D[channel];
  let_next_begin();
  await_previous();

  float rates[STATES];
#pragma unroll
  for (int i = 0; i < STATES; ++i) rates[i] = -expf(log_rates.items[i]);
#if !PROJECTED
  float projected[BATCH] = {};
  weights.multiply(projected, steering + first * steering_row, steering_row, batch);
#endif
#pragma unroll
  for (int turn = 0; turn < BATCH; turn += AHEAD) {
    if (turn >= batch) break;
    // All that is read comes first. What does not exist is read of the last row that does, or of the first states.
    float dt[AHEAD], u[AHEAD], gate[AHEAD], B[AHEAD][STATES], C[AHEAD][STATES];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      const int64 b = first + min(turn + i, batch - 1);
#if PROJECTED
      dt[i] = to_float(dt_weight[b * channels + channel]);
#else
      dt[i] = sum_of_channel(projected[turn + i]);
#endif
      u[i] = to_float(x[b * x_row + channel]), gate[i] = to_float(z[b * z_row + channel]);
      const X* of_row = steering + b * steering_row + rank + (has_states ? n : 0);
      read_steering(B[i], of_row), read_steering(C[i], of_row + d_state);
    }
    float h[AHEAD][STATES];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      unpack(h[i], before[turn + i]);
      if (turn + HELD + i < BATCH) read_states(turn + HELD + i);
    }
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      const float step = softplus(dt[i] + bias);
      float sum = 0.0f;
#pragma unroll
      for (int s = 0; s < STATES; ++s) {
        h[i][s] = fmaf(exponential(step * rates[s]), h[i][s], step * u[i] * B[i][s]);
        sum = fmaf(C[i][s], h[i][s], sum);
      }
      sum = fmaf(skip, u[i], sum_of_channel(has_states ? sum : 0.0f));
      if (turn + i >= batch) continue;
      if (has_states) write(state + (turn + i) * state_batch, h[i]);
      if (part == 0 && own < channels)
        y[(first + turn + i) * channels + channel] = from_float<IO>(sum * gate[i] * sigmoid_of(gate[i]));
    }
  }
}
