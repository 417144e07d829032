// Gradients of causal_conv1d_forward. With p = bias + sum_w weight_w x_{t - (W-1) + w} computed again and
// d_t = dy_t silu'(p_t):
//
//     dx_t = sum_w weight_w d_{t + (W-1) - w}     dweight_w = sum_t d_t x_{t - (W-1) + w}     dbias = sum_t d_t
//
// A thread walks its run in the direction of time and W - 1 steps beyond. What dx has got so far waits in registers, as
// the inputs do, until the last d that it meets has been added. Each run leaves its sums of dweight and dbias behind, which
// a second kernel adds in one order: equal bits every time.
#include "causal_conv1d.cuh"
#include "overlap.cuh"

// Slot of a step. Slot 0 is that of the first step that writes dx: there the usual case begins.
__device__ __forceinline__ int slot_of(int step) { return (unsigned)(step + (STEPS - 1) * PAST) % STEPS; }

struct Gradients {
  float waiting[WIDTH][LANES] = {};   // dx of the times t - (W-1) to t
  float sums[WIDTH + 1][LANES] = {};  // of dweight, and of dbias

  // Make room for time t; the one that leaves has got all.
  __device__ __forceinline__ void advance() {
#pragma unroll UNROLLED
    for (int w = 0; w < PAST; ++w)
#pragma unroll
      for (int i = 0; i < LANES; ++i) waiting[w][i] = waiting[w + 1][i];
#pragma unroll
    for (int i = 0; i < LANES; ++i) waiting[PAST][i] = 0.0f;
  }

  // Turn dy_t into d_t and add what it gives. The sums of parameters get it only from the run that t belongs to.
  __device__ __forceinline__ void add(float (&d)[LANES], const Window& window, const Filter& filter, bool own) {
    if (SILU) {
      float p[LANES];
      window.convolve(p, filter);
#pragma unroll
      for (int i = 0; i < LANES; ++i) {
        const float gate = sigmoid_of(p[i]);
        d[i] *= gate * fmaf(p[i], 1.0f - gate, 1.0f);
      }
    }
#pragma unroll UNROLLED
    for (int w = 0; w < WIDTH; ++w) {
      if (PACKED && PAST - w > window.age) continue;
#pragma unroll
      for (int i = 0; i < LANES; ++i) waiting[w][i] = fmaf(filter.taps[w][i], d[i], waiting[w][i]);
    }
    if (!own) return;
#pragma unroll UNROLLED
    for (int w = 0; w < WIDTH; ++w)
#pragma unroll
      for (int i = 0; i < LANES; ++i) sums[w][i] = fmaf(d[i], window.rows[w][i], sums[w][i]);
#pragma unroll
    for (int i = 0; i < LANES; ++i) sums[WIDTH][i] += d[i];
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) causal_conv1d_backward(
    const IO* __restrict__ x, int64 x_batch, int64 x_time, const PARAMETER* __restrict__ weight,
    const PARAMETER* __restrict__ bias, const IO* __restrict__ initial, int64 initial_batch, int64 initial_channel,
    int64 initial_tap, const INDEX* __restrict__ seq_idx, const IO* __restrict__ dy, int64 dy_batch, int64 dy_time,
    const IO* __restrict__ dfinal, int64 dfinal_batch, int64 dfinal_channel, int64 dfinal_tap,
    IO* __restrict__ dx, int64 dx_batch, int64 dx_time, float* __restrict__ dinitial, float* __restrict__ parts,
    int64 batches, int64 seqlen, int64 channels, int64 run) {
  const Place place(batches, seqlen, channels, run);
  if (!place.inside) return;
  const Inputs inputs{x + place.batch * x_batch + place.channel, x_time,
                      initial ? initial + place.batch * initial_batch + place.channel * initial_channel : nullptr,
                      initial_channel, initial_tap, seq_idx + place.batch * seqlen};
  const int given = min((int64)place.steps + PAST, seqlen - place.begin);  // steps that have x and dy
  __shared__ Rows::Slot x_slots[STEPS][THREADS], dy_slots[STEPS][THREADS];
  Rows x_rows(x_slots, inputs.x + place.begin * x_time, x_time);
  Rows dy_rows(dy_slots, dy + place.batch * dy_batch + place.begin * dy_time + place.channel, dy_time);
  auto ask = [&](int slot, bool exists) {
    if (exists) x_rows.ask(slot), dy_rows.ask(slot);
    commit_copies();
  };
  for (int step = 0; step < STEPS; ++step) ask(slot_of(step), step < given);
  dx += place.batch * dx_batch + place.begin * dx_time + place.channel;
  const Filter filter(weight, bias, place.channel);
  Window window;
  window.enter(inputs, place.begin);

  Gradients gradients;
  auto walk = [&](int slot, int step, bool usual) {  // usual: all of the step is in the run and in the sequence
    const int64 t = place.begin + step, done = t - PAST;
    gradients.advance();
    if (usual || step < given) {
      float now[LANES], d[LANES];
      await_copies<STEPS - 1>();
      x_rows.take(now, slot);
      dy_rows.take(d, slot);
      window.push(now, inputs.starts_document(t));
      gradients.add(d, window, filter, usual || step < place.steps);
      ask(slot, step + STEPS < given);
    }
    const int kept = done - (seqlen - PAST);  // which input of the final state `done` is, if not negative
    if (!usual && dfinal && done >= seqlen - PAST && PAST - 1 - kept <= window.age) {
      const IO* from = dfinal + place.batch * dfinal_batch + place.channel * dfinal_channel + kept * dfinal_tap;
#pragma unroll
      for (int i = 0; i < LANES; ++i) gradients.waiting[0][i] += to_float(from[i * dfinal_channel]);
    }
    if (usual || step >= PAST) {
      write(dx, gradients.waiting[0]);
      dx += dx_time;
    } else if (place.begin == 0) {
#pragma unroll
      for (int i = 0; i < LANES; ++i)
        dinitial[(place.batch * channels + place.channel + i) * PAST + t] = gradients.waiting[0][i];
    }
  };
  int step = 0;
  while (step < place.steps + PAST) {
    if (step >= PAST && slot_of(step) == 0 && step + STEPS <= place.steps) {
#pragma unroll
      for (int s = 0; s < STEPS; ++s) walk(s, step + s, true);
      step += STEPS;
    } else {
      walk(slot_of(step), step, false);
      ++step;
    }
  }

  let_next_begin();
#pragma unroll UNROLLED + 1
  for (int w = 0; w <= WIDTH; ++w) write(parts + (place.part * (WIDTH + 1) + w) * channels + place.channel, gradients.sums[w]);
}

// dweight (D, W) and dbias (D), of the types of the parameters: the sums of what the runs left, (count, W + 1, D). A lane has
// a sum, of whose parts each of the ADDERS warps takes every ADDERSth.
extern "C" __global__ void __launch_bounds__(32 * ADDERS) causal_conv1d_add_parts(
    const float* parts, PARAMETER* dweight, PARAMETER* dbias, int64 count, int64 channels) {
  __shared__ float sums[ADDERS][32];
  const int lane = threadIdx.x % 32, adder = threadIdx.x / 32;
  const int64 i = (int64)blockIdx.x * 32 + lane, size = (WIDTH + 1) * channels;
  float sum = 0.0f;
  await_previous();
  if (i < size)
#pragma unroll 8
    for (int64 part = adder; part < count; part += ADDERS) sum += parts[part * size + i];
  sums[adder][lane] = sum;
  __syncthreads();
  if (adder > 0 || i >= size) return;
#pragma unroll
  for (int other = 1; other < ADDERS; ++other) sum += sums[other][lane];
  const int64 w = i / channels, channel = i % channels;
  if (w < WIDTH) dweight[channel * WIDTH + w] = from_float<PARAMETER>(sum);
  else if (dbias) dbias[channel] = from_float<PARAMETER>(sum);
}
