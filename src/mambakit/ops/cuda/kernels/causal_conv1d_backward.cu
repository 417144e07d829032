// Gradients of causal_conv1d_forward. With p = bias + sum_w weight_w x_{t - (W-1) + w} computed again and
// d_t = dy_t silu'(p_t):
//
//     dx_t = sum_w weight_w d_{t + (W-1) - w}     dweight_w = sum_t d_t x_{t - (W-1) + w}     dbias = sum_t d_t
//
// A thread walks its run in the direction of time and W - 1 steps beyond. What dx has got so far waits in registers, as
// the inputs do, until the last d that it meets has been added.
#include "causal_conv1d.cuh"

constexpr int STEPS = 8 / sizeof(IO);  // rows of x and dy that are on their way at a time

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

extern "C" __global__ void __launch_bounds__(32 * WARPS, 3) causal_conv1d_backward(
    const IO* __restrict__ x, int64 x_batch, int64 x_time, const PARAMETER* __restrict__ weight,
    const PARAMETER* __restrict__ bias, const IO* __restrict__ initial, int64 initial_batch, int64 initial_channel,
    int64 initial_tap, const INDEX* __restrict__ seq_idx, const IO* __restrict__ dy, int64 dy_batch, int64 dy_time,
    const IO* __restrict__ dfinal, int64 dfinal_batch, int64 dfinal_channel, int64 dfinal_tap,
    IO* __restrict__ dx, int64 dx_batch, int64 dx_time, float* __restrict__ dinitial, float* __restrict__ dweight,
    float* __restrict__ dbias, int64 seqlen, int64 channels, int64 run) {
  const Place place(seqlen, channels, run);
  Gradients gradients;

  if (place.inside) {
    const Inputs inputs{x + place.batch * x_batch + place.channel, x_time,
                        initial ? initial + place.batch * initial_batch + place.channel * initial_channel : nullptr,
                        initial_channel, initial_tap, seq_idx + place.batch * seqlen};
    const Filter filter(weight, bias, place.channel);
    Window window;
    window.enter(inputs, place.begin);
    const IO* x_from = inputs.x + place.begin * x_time;
    dy += place.batch * dy_batch + place.begin * dy_time + place.channel;
    dx += place.batch * dx_batch + place.begin * dx_time + place.channel;

    int step = 0;
    while (step < place.steps + PAST) {
      float now[LANES], d[LANES];
      if (step >= PAST && step + STEPS <= place.steps) {  // the usual case: nothing to ask
        Vector<IO, LANES> x_rows[STEPS], dy_rows[STEPS];
#pragma unroll
        for (int s = 0; s < STEPS; ++s, x_from += x_time, dy += dy_time) {
          x_rows[s] = read<LANES>(x_from);
          dy_rows[s] = read<LANES>(dy);
        }
#pragma unroll
        for (int s = 0; s < STEPS; ++s, dx += dx_time) {
          unpack(now, x_rows[s]);
          unpack(d, dy_rows[s]);
          window.push(now, inputs.starts_document(place.begin + step + s));
          gradients.advance();
          gradients.add(d, window, filter, true);
          write(dx, gradients.waiting[0]);
        }
        step += STEPS;
        continue;
      }
      gradients.advance();
      const int64 t = place.begin + step, done = t - PAST;
      if (t < seqlen) {
        unpack(now, read<LANES>(x_from));
        unpack(d, read<LANES>(dy));
        window.push(now, inputs.starts_document(t));
        gradients.add(d, window, filter, step < place.steps);
        x_from += x_time;
        dy += dy_time;
      }
      const int kept = done - (seqlen - PAST);  // which input of the final state `done` is, if not negative
      if (dfinal && done >= seqlen - PAST && PAST - 1 - kept <= window.age) {
        const IO* from = dfinal + place.batch * dfinal_batch + place.channel * dfinal_channel + kept * dfinal_tap;
#pragma unroll
        for (int i = 0; i < LANES; ++i) gradients.waiting[0][i] += to_float(from[i * dfinal_channel]);
      }
      if (step >= PAST) {
        write(dx, gradients.waiting[0]);
        dx += dx_time;
      } else if (place.begin == 0) {
#pragma unroll
        for (int i = 0; i < LANES; ++i)
          dinitial[(place.batch * channels + place.channel + i) * PAST + t] = gradients.waiting[0][i];
      }
      ++step;
    }
  }

  // The runs of a block, summed in the order of time.
  __shared__ float block[WARPS][32 * LANES];
  const int64 part = blockIdx.x / ((channels / LANES + 31) / 32);
  const int64 column = place.channel - threadIdx.x % 32 * LANES + threadIdx.x;  // first channel of the block, and on
#pragma unroll UNROLLED + 1
  for (int w = 0; w <= WIDTH; ++w) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < LANES; ++i) block[threadIdx.x / 32][threadIdx.x % 32 * LANES + i] = gradients.sums[w][i];
    __syncthreads();
    if (threadIdx.x < 32 * LANES && column < channels) {
      float sum = 0.0f;
#pragma unroll
      for (int other = 0; other < WARPS; ++other) sum += block[other][threadIdx.x];
      if (w < WIDTH) dweight[(part * channels + column) * WIDTH + w] = sum;
      else dbias[part * channels + column] = sum;
    }
  }
}

// dweight and dbias, of the types of the parameters: the sums of what the blocks left, (parts, D, W) and (parts, D).
extern "C" __global__ void causal_conv1d_add_parts(
    const float* __restrict__ dweight_parts, const float* __restrict__ dbias_parts, PARAMETER* __restrict__ dweight,
    PARAMETER* __restrict__ dbias, int64 parts, int64 channels) {
  const int64 i = (int64)blockIdx.x * blockDim.x + threadIdx.x, weights = channels * WIDTH;
  const bool is_weight = i < weights;
  const int64 place = is_weight ? i : i - weights, size = is_weight ? weights : channels;
  if (place >= size || (!is_weight && !dbias)) return;
  const float* from = (is_weight ? dweight_parts : dbias_parts) + place;
  float sum = 0.0f;
#pragma unroll 8
  for (int64 part = 0; part < parts; ++part) sum += from[part * size];
  (is_weight ? dweight : dbias)[place] = from_float<PARAMETER>(sum);
}
