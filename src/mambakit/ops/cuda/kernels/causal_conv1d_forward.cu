// y_t = silu(bias + sum_w weight_w x_{t - (W-1) + w}), and the last W - 1 inputs. Memory bound: x is read once.
#include "causal_conv1d.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) causal_conv1d_forward(
    const IO* __restrict__ x, int64 x_batch, int64 x_time, const PARAMETER* __restrict__ weight,
    const PARAMETER* __restrict__ bias, const IO* __restrict__ initial, int64 initial_batch, int64 initial_channel,
    int64 initial_tap, const INDEX* __restrict__ seq_idx, IO* __restrict__ y, IO* __restrict__ final_state,
    int64 batches, int64 seqlen, int64 channels, int64 run) {
  const Place place(batches, seqlen, channels, run);
  if (!place.inside) return;
  const Inputs inputs{x + place.batch * x_batch + place.channel, x_time,
                      initial ? initial + place.batch * initial_batch + place.channel * initial_channel : nullptr,
                      initial_channel, initial_tap, seq_idx + place.batch * seqlen};
  __shared__ Rows::Slot slots[STEPS][THREADS];
  Rows rows(slots, inputs.x + place.begin * x_time, x_time);
  auto ask = [&](int slot, bool exists) {
    if (exists) rows.ask(slot);
    commit_copies();
  };
  for (int s = 0; s < STEPS; ++s) ask(s, s < place.steps);
  y += (place.batch * seqlen + place.begin) * channels + place.channel;
  const Filter filter(weight, bias, place.channel);
  Window window;
  window.enter(inputs, place.begin);

  auto walk = [&](int slot, int step) {
    float now[LANES], out[LANES];
    await_copies<STEPS - 1>();
    rows.take(now, slot);
    window.push(now, inputs.starts_document(place.begin + step));
    window.convolve(out, filter);
    ask(slot, step + STEPS < place.steps);
    if (SILU)
#pragma unroll
      for (int i = 0; i < LANES; ++i) out[i] *= sigmoid_of(out[i]);
    write(y, out);
    y += channels;
  };
  int step = 0;
  for (; step + STEPS <= place.steps; step += STEPS)
#pragma unroll
    for (int s = 0; s < STEPS; ++s) walk(s, step + s);
  for (int s = 0; step < place.steps; ++step, ++s) walk(s, step);

  if (place.begin + place.steps < seqlen) return;
  final_state += (place.batch * channels + place.channel) * PAST;
#pragma unroll
  for (int i = 0; i < LANES; ++i)
#pragma unroll UNROLLED
    for (int w = 0; w < PAST; ++w) final_state[i * PAST + w] = from_float<IO>(window.rows[w + 1][i]);
}
