// The convolution of a prompt and a product with what it makes, x_proj of the Mamba block, in one pass over memory:
//
//   y_t = silu(bias + sum_w weight_w x_{t - (W-1) + w}),   projected_t = P y_t
//
// A block has ROWS time steps of a sequence and walks its channels, 64 at a time. Boxes of x come with eight rows from before the
// block's own. The warps of CONVOLVING warpgroups convolve some rows each, two channels a lane; one warpgroup multiplies what they
// have made with P, and sends it to memory from where it reads it. That one also asks for what comes next: when y is there, x has
// been read. Its sums take most registers that a thread can have; those that convolve have none, and so room for many rows at once.
//
// IO, PARAMETER, WIDTH and SILU: as in `causal_conv1d.cuh`. COLUMNS: of the product. ROWS: of a block. X_SLOTS, Y_SLOTS, P_SLOTS:
// places in shared memory. REGISTERS, CONVOLVING_REGISTERS: of a thread that multiplies, and of one that convolves.
#define LANES 2
#define PACKED 0
#define INDEX int
#define WARPS 4
#define STEPS 1
#include "causal_conv1d.cuh"
#include "ring.cuh"
#include "warpgroup_sums.cuh"

constexpr int CHANNELS = 64;  // at a time: the 128 bytes of a swizzle
constexpr int ROW = CHANNELS * sizeof(IO), BEFORE = 8, TILES = ROWS / 64, OF_WARP = ROWS / (4 * CONVOLVING);
constexpr int PADDED = (COLUMNS + 7) / 8 * 8;
constexpr int TAPS_BYTES = CHANNELS * WIDTH * sizeof(PARAMETER), BIAS_BYTES = CHANNELS * sizeof(PARAMETER);
constexpr int X_BYTES = (BEFORE + ROWS) * ROW, X_SLOT = (X_BYTES + TAPS_BYTES + BIAS_BYTES + 1023) / 1024 * 1024;
constexpr int P_SLOT = PADDED * ROW, Y_SLOT = ROWS * ROW;
static_assert(OF_WARP % 8 == 0 && PAST <= BEFORE, "rows of a warp begin where a swizzle does");

struct Parameters {
  TensorMap before, x, y, projection;  // boxes of BEFORE, ROWS, ROWS and PADDED rows
  const PARAMETER *weight, *bias;      // bias: or null
  const IO* initial;                   // or null
  int64 initial_batch, initial_channel, initial_tap;
  IO *final_state, *projected;
  int64 seqlen, channels;
};

struct Barriers {
  BlockBarrier x[X_SLOTS], projection[P_SLOTS];  // has come
  BlockBarrier y[Y_SLOTS], y_free[Y_SLOTS];      // has been made; may be made anew
};

// Word of this lane in a row: its two channels, where a box's swizzle has them. rows: begin where a swizzle does.
__device__ __forceinline__ unsigned& word_of(char* rows, int row) {
  const int lane = threadIdx.x % 32;
  return *reinterpret_cast<unsigned*>(rows + ((lane / 4 * 16 + lane % 4 * 4) ^ (row & 7) * 16) + row * ROW);
}

__device__ __forceinline__ void read_row(float (&row)[2], char* rows, int at) {
  const unsigned word = word_of(rows, at);
  row[0] = low_float<IO>(word), row[1] = high_float<IO>(word);
}

extern "C" __global__ void __launch_bounds__(128 * (CONVOLVING + 1), 1)
    causal_conv1d_linear(const __grid_constant__ Parameters p) {
  extern __shared__ __align__(1024) char memory[];
  char* const y_slots = memory + X_SLOTS * X_SLOT;
  char* const p_slots = y_slots + Y_SLOTS * Y_SLOT;
  Barriers& barriers = *reinterpret_cast<Barriers*>(p_slots + P_SLOTS * P_SLOT);
  if (threadIdx.x == 0) {
    for (auto& barrier : barriers.x) barrier.make(1);
    for (auto& barrier : barriers.projection) barrier.make(1);
    for (auto& barrier : barriers.y) barrier.make(4 * CONVOLVING);
    for (auto& barrier : barriers.y_free) barrier.make(1);
    BlockBarrier::publish();
  }
  __syncthreads();
  const int runs = (p.seqlen + ROWS - 1) / ROWS, batch = blockIdx.x / runs, begin = blockIdx.x % runs * ROWS;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, last = p.seqlen - 1 - begin;

  if (warp < 4 * CONVOLVING) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(CONVOLVING_REGISTERS));
    Turn<X_SLOTS> x_at;
    Turn<Y_SLOTS> y_at;
    const int first = warp * OF_WARP;
    const bool begins = p.initial && begin + first == 0, ends = first <= last && last < first + OF_WARP;
    for (int channel = 0; channel < p.channels; channel += CHANNELS, x_at.advance(), y_at.advance()) {
      char* const slot = memory + x_at.slot * X_SLOT;
      char* const x = slot + (BEFORE + first) * ROW;
      char* const y = y_slots + y_at.slot * Y_SLOT + first * ROW;
      const int own = channel + 2 * lane;
      const Inputs inputs{nullptr, 0, p.initial ? p.initial + batch * p.initial_batch + own * p.initial_channel : nullptr,
                          p.initial_channel, p.initial_tap, nullptr};
      barriers.x[x_at.slot].await(x_at.turn);
      const auto* const taps = reinterpret_cast<const PARAMETER*>(slot + X_BYTES);
      const Filter filter(taps, p.bias ? taps + CHANNELS * WIDTH : nullptr, 2 * lane);
      Window window;
#pragma unroll
      for (int w = 0; w < PAST; ++w) {
        float row[2];
        if (begins) inputs.before(row, w - PAST);
        else read_row(row, x - BEFORE * ROW, BEFORE - PAST + w);
        window.push(row, false);
      }
      if (ends)
        for (int w = 0; w < PAST; ++w) {
          float row[2];
          const int at = last - first - PAST + 1 + w;
          if (begin + first + at < 0) inputs.before(row, begin + first + at);
          else read_row(row, x - BEFORE * ROW, BEFORE + at);
#pragma unroll
          for (int i = 0; i < 2; ++i)
            p.final_state[(batch * p.channels + own + i) * PAST + w] = from_float<IO>(row[i]);
        }
      barriers.y_free[y_at.slot].await(y_at.turn ^ 1);  // at once in the first turn
#pragma unroll
      for (int i = 0; i < OF_WARP; ++i) {
        float now[2], out[2];
        read_row(now, x, i);
        window.push(now, false);
        window.convolve(out, filter);
        if (SILU)
#pragma unroll
          for (float& number : out) number *= sigmoid_of(number);
        word_of(y, i) = pack<IO>(out[0], out[1]);
      }
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // y is read by copies and by a warpgroup
      __syncwarp();
      if (lane == 0) barriers.y[y_at.slot].arrive();
    }
    return;
  }

  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
  const bool leads = threadIdx.x == 128 * CONVOLVING;
  auto ask_x = [&](int slot, int channel) {
    char* const to = memory + slot * X_SLOT;
    BlockBarrier& come = barriers.x[slot];
    come.arrive_for(X_BYTES + TAPS_BYTES + (p.bias ? BIAS_BYTES : 0));
    come.copy_box(to, p.before, channel, begin - BEFORE, batch);
    come.copy_box(to + BEFORE * ROW, p.x, channel, begin, batch);
    come.copy<TAPS_BYTES>(to + X_BYTES, p.weight + (int64)channel * WIDTH);
    if (p.bias) come.copy<BIAS_BYTES>(to + X_BYTES + TAPS_BYTES, p.bias + channel);
  };
  auto ask_projection = [&](int slot, int channel) {
    barriers.projection[slot].arrive_for(P_SLOT);
    barriers.projection[slot].copy_box(p_slots + slot * P_SLOT, p.projection, channel, 0);
  };
  if (leads) {
    for (int i = 0; i < X_SLOTS && i * CHANNELS < p.channels; ++i) ask_x(i, i * CHANNELS);
    for (int i = 0; i < P_SLOTS && i * CHANNELS < p.channels; ++i) ask_projection(i, i * CHANNELS);
  }
  Turn<X_SLOTS> x_at;
  Turn<Y_SLOTS> y_at;
  Turn<P_SLOTS> p_at;
  WarpgroupSums<PADDED> sums[TILES];
  for (int channel = 0; channel < p.channels; channel += CHANNELS, x_at.advance(), y_at.advance(), p_at.advance()) {
    char* const y = y_slots + y_at.slot * Y_SLOT;
    barriers.y[y_at.slot].await(y_at.turn);
    if (leads) {
      asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%1, %2, %3}], [%4];"
                   ::"l"(&p.y), "r"(channel), "r"(begin), "r"(batch), "r"(address_of(y)) : "memory");
      asm volatile("cp.async.bulk.commit_group;" ::: "memory");
      const int next = channel + X_SLOTS * CHANNELS;
      if (next < p.channels) ask_x(x_at.slot, next);
    }
    __syncwarp();
    barriers.projection[p_at.slot].await(p_at.turn);
#pragma unroll
    for (int t = 0; t < TILES; ++t) sums[t].multiply(y + t * 64 * ROW, p_slots + p_at.slot * P_SLOT);
#pragma unroll
    for (auto& tile : sums) tile.template await<0>();
    asm volatile("bar.sync 1, 128;" ::: "memory");  // all four warps have multiplied
    if (leads) {
      const int next = channel + P_SLOTS * CHANNELS;
      if (next < p.channels) ask_projection(p_at.slot, next);
      asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
      barriers.y_free[y_at.slot].arrive();
    }
  }
#pragma unroll
  for (int t = 0; t < TILES; ++t)
    sums[t].each([&](int half, int column, float a, float b) {
      const int row = t * 64 + warp % 4 * 16 + lane / 4 + 8 * half;
      column += lane % 4 * 2;
      if (row <= last && column < COLUMNS)
        *reinterpret_cast<unsigned*>(p.projected + ((int64)batch * p.seqlen + begin + row) * COLUMNS + column) = pack<IO>(a, b);
    });
  if (leads) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
