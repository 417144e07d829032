// What forward and backward of the causal convolution share: who computes what, and the filter's view of the past.
//
// A thread has LANES neighbouring channels and walks a run of time steps, with the last W inputs in registers. The 32
// lanes of a warp have neighbouring channels, and so have neighbouring warps, as far as there are channels: what is read at
// the same time lies side by side.
//
// IO: type of x and y. PARAMETER: type of weight and bias. WIDTH: taps (W). LANES: channels of a thread, a divisor of
// all channels and strides. SILU: whether it follows. PACKED: whether rows hold documents. INDEX: their numbers' type.
// WARPS: of a block. STEPS: rows that are on their way to a thread at a time. RESIDENT: blocks of a multiprocessor.
#pragma once
#include "async_copies.cuh"
#include "vectors.cuh"

constexpr int PAST = WIDTH - 1;  // inputs before the present that a filter meets
constexpr int THREADS = 32 * WARPS;
constexpr int UNROLLED = WIDTH <= 16 ? WIDTH : 1;  // a wider window lives in local memory: slow, but right

// The silu of half-precision numbers has room for approximate exponentials, that of floats has not.
__device__ __forceinline__ float sigmoid_of(float x) { return sizeof(IO) == 2 ? sigmoid(x) : 1.0f / (1.0f + expf(-x)); }

struct Place {
  int64 channel, batch, begin;  // first channel of this thread, first time step of its run
  int steps;                    // in its run
  int64 part;                   // number of the run among those of all batch rows
  bool inside;                  // whether there is such a run at all

  __device__ Place(int64 batches, int64 seqlen, int64 channels, int64 run) {
    const unsigned columns = (channels / LANES + 31) / 32, runs = (seqlen + run - 1) / run;
    const unsigned warp = blockIdx.x * WARPS + threadIdx.x / 32;
    channel = (int64)(warp % columns * 32 + threadIdx.x % 32) * LANES;
    part = warp / columns;
    begin = part % runs * run;
    batch = part / runs;
    steps = min(run, seqlen - begin);
    inside = channel < channels && batch < batches;
  }
};

// Rows of a run on their way to a thread, through slots of its own in shared memory. (The compiler moves loads to registers
// together, and has the thread wait for them there.) A thread first asks for STEPS rows, then in turn takes one and asks.
struct Rows {
  using Slot = Vector<IO, LANES>;
  Slot* mine;      // this thread's part of slot 0
  const IO* from;  // the row to be asked for next
  int64 stride;

  __device__ Rows(Slot (&slots)[STEPS][THREADS], const IO* from, int64 stride)
      : mine(slots[0] + threadIdx.x), from(from), stride(stride) {}

  __device__ __forceinline__ void ask(int slot) {
    copy_own<sizeof(Slot)>(mine + slot * THREADS, from);
    from += stride;
  }
  __device__ __forceinline__ void take(float (&row)[LANES], int slot) const { unpack_words(row, mine[slot * THREADS]); }
};

struct Filter {
  float taps[WIDTH][LANES], bias[LANES];

  __device__ Filter(const PARAMETER* weight, const PARAMETER* bias_at, int64 channel) {
#pragma unroll
    for (int i = 0; i < LANES; ++i) {
#pragma unroll UNROLLED
      for (int w = 0; w < WIDTH; ++w) taps[w][i] = to_float(weight[(channel + i) * WIDTH + w]);
      bias[i] = bias_at ? to_float(bias_at[channel + i]) : 0.0f;
    }
  }
};

// Inputs of one batch row, from this thread's channels on.
struct Inputs {
  const IO* x;
  int64 time_stride;
  const IO* initial;  // or null
  int64 channel_stride, tap_stride;
  const INDEX* seq_idx;

  __device__ bool starts_document(int64 t) const { return PACKED && t > 0 && seq_idx[t] != seq_idx[t - 1]; }

  // Those of a time t < 0.
  __device__ void before(float (&row)[LANES], int64 t) const {
#pragma unroll
    for (int i = 0; i < LANES; ++i)
      row[i] = initial ? to_float(initial[i * channel_stride + (t + PAST) * tap_stride]) : 0.0f;
  }
};

// The last W inputs, the present one last; zero where they belong to an earlier document.
struct Window {
  float rows[WIDTH][LANES] = {};
  int age = WIDTH;  // steps since the document began, or any number that no filter reaches across

  __device__ void push(const float (&row)[LANES], bool starts_document) {
#pragma unroll UNROLLED
    for (int w = 0; w < PAST; ++w)
#pragma unroll
      for (int i = 0; i < LANES; ++i) rows[w][i] = PACKED && starts_document ? 0.0f : rows[w + 1][i];
#pragma unroll
    for (int i = 0; i < LANES; ++i) rows[PAST][i] = row[i];
    if (PACKED) age = starts_document ? 0 : min(age + 1, WIDTH);
  }

  // Fill it with what lies before time t.
  __device__ void enter(const Inputs& inputs, int64 t) {
    Vector<IO, LANES> past[WIDTH];
#pragma unroll UNROLLED
    for (int w = 0; w < PAST; ++w)
      if (t - PAST + w >= 0) past[w] = read<LANES>(inputs.x + (t - PAST + w) * inputs.time_stride);
#pragma unroll UNROLLED
    for (int w = 0; w < PAST; ++w) {
      float row[LANES];
      if (t - PAST + w >= 0) unpack(row, past[w]);
      else inputs.before(row, t - PAST + w);
      push(row, inputs.starts_document(t - PAST + w));
    }
  }

  __device__ void convolve(float (&y)[LANES], const Filter& filter) const {
#pragma unroll
    for (int i = 0; i < LANES; ++i) y[i] = filter.bias[i];
#pragma unroll UNROLLED
    for (int w = 0; w < WIDTH; ++w)
#pragma unroll
      for (int i = 0; i < LANES; ++i) y[i] = fmaf(filter.taps[w][i], rows[w][i], y[i]);
  }
};
