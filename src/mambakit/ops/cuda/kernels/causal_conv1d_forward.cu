// y_t = silu(bias + sum_w weight_w x_{t - (W-1) + w}), and the last W - 1 inputs. Memory bound: x is read once.
#include "causal_conv1d.cuh"

constexpr int STEPS = 8;  // rows of x that are on their way at a time

extern "C" __global__ void __launch_bounds__(32 * WARPS, 2) causal_conv1d_forward(
    const IO* __restrict__ x, int64 x_batch, int64 x_time, const PARAMETER* __restrict__ weight,
    const PARAMETER* __restrict__ bias, const IO* __restrict__ initial, int64 initial_batch, int64 initial_channel,
    int64 initial_tap, const INDEX* __restrict__ seq_idx, IO* __restrict__ y, IO* __restrict__ final_state,
    int64 seqlen, int64 channels, int64 run) {
  const Place place(seqlen, channels, run);
  if (!place.inside) return;
  const Inputs inputs{x + place.batch * x_batch + place.channel, x_time,
                      initial ? initial + place.batch * initial_batch + place.channel * initial_channel : nullptr,
                      initial_channel, initial_tap, seq_idx + place.batch * seqlen};
  const Filter filter(weight, bias, place.channel);
  Window window;
  window.enter(inputs, place.begin);
  const IO* from = inputs.x + place.begin * x_time;
  y += (place.batch * seqlen + place.begin) * channels + place.channel;

  auto put = [&](const Vector<IO, LANES>& row, int step) {
    float now[LANES], out[LANES];
    unpack(now, row);
    window.push(now, inputs.starts_document(place.begin + step));
    window.convolve(out, filter);
    if (SILU)
#pragma unroll
      for (int i = 0; i < LANES; ++i) out[i] *= sigmoid_of(out[i]);
    write(y, out);
    y += channels;
  };

  int step = 0;
  for (; step + STEPS <= place.steps; step += STEPS) {
    Vector<IO, LANES> rows[STEPS];
#pragma unroll
    for (int s = 0; s < STEPS; ++s, from += x_time) rows[s] = read<LANES>(from);
#pragma unroll
    for (int s = 0; s < STEPS; ++s) put(rows[s], step + s);
  }
  for (; step < place.steps; ++step, from += x_time) put(read<LANES>(from), step);

  if (place.begin + place.steps < seqlen) return;
  final_state += (place.batch * channels + place.channel) * PAST;
#pragma unroll
  for (int i = 0; i < LANES; ++i)
#pragma unroll UNROLLED
    for (int w = 0; w < PAST; ++w) final_state[i * PAST + w] = from_float<IO>(window.rows[w + 1][i]);
}
