// The selective scan, forward, of few channels and at most 16 real states: h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t,
// y_t = (sum_n C_n h_n + D x_t) silu(z_t).
//
// Few channels fill a GPU only if their states are spread over many lanes. Then most of a warp's work would be the same in all
// lanes of a channel, and shared memory, which gives a lane 4 bytes a clock, would be busier than the arithmetic. So
//
// - WARPS warps walk: 8 lanes a channel with 2 states each, through all of time, and compute what differs from state to state;
// - as many warps help: TILE by TILE of steps, they copy the inputs to shared memory, compute dt and dt x before a tile is
//   walked, and the gate and y after it. A helper's lane has 8 channels of one step: 16 bytes of each tensor;
// - tensor cores give each lane of a walker its B and C, and sum y over the lanes.
//
// Helpers are a tile ahead, and one behind. Barriers of a tile hand it over, when it is ready, and back, when it is walked.
//
// A warp runs on the scheduler of its number modulo 4: with WARPS = 4, each has a walker and a helper.
//
// Constants beside those of selective_scan.cuh:
//     TILE                    see above
//     B_LANES, C_LANES        neighbouring states that can be read at a time
#include "selective_scan_walk.cuh"

FORCE_INLINE float gate(float z) { return HAS_Z ? z * logistic(z) : 1.0f; }

// Tiles in which a step of a tile is one that exists.
FORCE_INLINE int tiles_with(int64 seqlen, int step) { return (int)((seqlen - step + TILE - 1) / TILE); }

// x, dt or z of a helper's lane, on the way from memory to shared memory; each call goes on to the next tile.
struct EightRows {
  const IO* at;
  int64 tile;  // from one to the next

  FORCE_INLINE EightRows(const IO* tensor, int64 time_stride, int step) : at(tensor + step * time_stride), tile(TILE * time_stride) {}
  FORCE_INLINE void copy_tile(Eight& to, int count) {
    copy(to, at, count);
    at += tile;
  }
};

// B or C likewise: LANES neighbouring states of a step at a time, by all helpers.
template <int LANES> struct WeightRows {
  static constexpr int EACH = PADDED / LANES, APART = HELPERS / EACH, COUNT = TILE / APART;
  static_assert(COUNT * APART == TILE, "lanes have as many steps");
  const IO* at[COUNT];
  int tiles[COUNT];  // in which they exist
  int64 tile;
  int step, n;

  FORCE_INLINE WeightRows(const IO* tensor, int64 time_stride, int me, int64 seqlen, int d_state)
      : tile(TILE * time_stride), step(me / EACH), n(me % EACH * LANES) {
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
      at[k] = tensor + (step + k * APART) * time_stride + n;
      tiles[k] = n < d_state ? tiles_with(seqlen, step + k * APART) : 0;
    }
  }
  FORCE_INLINE void copy_tile(Pair (*to)[PAIRS], int now) {
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
      copy<LANES>(&to[step + k * APART][0].of[0] + n, at[k], now < tiles[k]);
      at[k] += tile;
    }
  }
};

extern "C" __global__ void __launch_bounds__(2 * HELPERS, MIN_BLOCKS) scan_narrow(
    const IO* x, const IO* dt, const Number* A, const void* B, const void* C, const float* D, const IO* z,
    const float* dt_bias, const Number* initial_state, const unsigned char* restart,
    IO* y, Number* final_state, Number* saved, int64 seqlen, int64 d_inner, int64 d_state_, int64 groups,
    int64 x_batch, int64 x_time, int64 dt_batch, int64 dt_time, int64 z_batch, int64 z_time,
    int64 B_batch, int64 B_time, int64 B_group, int64 B_groups, int64 C_batch, int64 C_time, int64 C_group, int64 C_groups) {
  extern __shared__ __align__(16) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int d_state = (int)d_state_;

  const int64 width = d_inner / groups, blocks = (width + BLOCK_CHANNELS - 1) / BLOCK_CHANNELS;
  Part at;
  at.batch = blockIdx.x / (blocks * groups), at.group = blockIdx.x / blocks % groups;
  const int64 inside = blockIdx.x % blocks * BLOCK_CHANNELS;
  at.channel = at.group * width + inside;
  at.count = width - inside < BLOCK_CHANNELS ? (int)(width - inside) : BLOCK_CHANNELS;

  begin_walked(shared);
  if (threadIdx.x < HELPERS) {
    walk(shared, at, A, (const Number*)B, (const Number*)C, initial_state, final_state, saved, seqlen, d_inner, d_state);
    return;
  }

  // Lanes go over the PARTS of a step, then over steps. A part is the channels of HELPED / SLOTS walkers.
  const int me = threadIdx.x - HELPERS, part = me % PARTS, step = me / PARTS;
  const int left_channels = at.count - part * HELPED, count = left_channels < 0 ? 0 : left_channels < HELPED ? left_channels : HELPED;
  const int64 channel = at.channel + part * HELPED;
  float bias[HELPED], skip[HELPED];
#pragma unroll
  for (int j = 0; j < HELPED; j++) {
    bias[j] = j < count && dt_bias ? dt_bias[channel + j] : 0.0f;
    skip[j] = j < count && D ? D[channel + j] : 0.0f;
  }
  EightRows x_rows(x + at.batch * x_batch + channel, x_time, step);
  EightRows dt_rows(dt + at.batch * dt_batch + channel, dt_time, step);
  EightRows z_rows(z + at.batch * z_batch + channel, z_time, step);
  WeightRows<B_LANES> B_rows((const IO*)B + at.batch * B_batch + at.group * B_groups / groups * B_group, B_time, me, seqlen, d_state);
  WeightRows<C_LANES> C_rows((const IO*)C + at.batch * C_batch + at.group * C_groups / groups * C_group, C_time, me, seqlen, d_state);
  y += (at.batch * seqlen + step) * d_inner + channel;
  if (HAS_RESTART) restart += at.batch * seqlen + me;

  // Of step `me` of the tile that is prepared next: read a tile ahead.
  const int restart_tiles = tiles_with(seqlen, me);
  auto restart_of = [&](int tile) { return HAS_RESTART && me < TILE && tile < restart_tiles ? restart[(int64)tile * TILE] : (unsigned char)0; };
  unsigned char restarts = restart_of(0);

  // `place`: of the inputs and y of a tile, the same for every fourth. `my_tiles`: in which the lane's step exists. Helpers share a
  // scheduler with a walker, which each of their instructions delays: so tiles are counted in 32 bits, and those past the end
  // are copied as zeros. Around a branch for them NVRTC 13.0 makes the addresses in shared memory anew four times a tile.
  const int my_tiles = tiles_with(seqlen, step);
  auto copy_inputs = [&](int tile, unsigned place) {
    const int here = tile < my_tiles ? count : 0;
    x_rows.copy_tile(shared.x[place][me], here);
    dt_rows.copy_tile(shared.dt[place][me], here);
    if (HAS_Z) z_rows.copy_tile(shared.z[place][me], here);
    if (B_VARIES) B_rows.copy_tile(&shared.B[place * TILE], tile);
    if (C_VARIES) C_rows.copy_tile(&shared.C[place * TILE], tile);
    commit_copies();
  };
  Steps* const steps = &shared.steps[part * (HELPED / SLOTS)];
  const Sums* const sums = &shared.y[part * (HELPED / SLOTS)];
  auto prepare = [&](int tile, unsigned place) {
    const unsigned to = tile % 2u * TILE;
    const Eight x_now = shared.x[place][me], dt_now = shared.dt[place][me];
#pragma unroll
    for (int j = 0; j < HELPED; j++) {
      Step prepared;
      prepared.dt[0] = time_step(dt_now.value(j) + bias[j], tile < my_tiles);
      prepared.dx[0] = prepared.dt[0] * x_now.value(j);
      steps[j / SLOTS].of[j % SLOTS][to + step] = prepared;
    }
    if (HAS_RESTART && me < TILE) shared.restarts[to + me] = restarts ? 0.0f : 1.0f;
    restarts = restart_of(tile + 1);
  };
  auto finish = [&](int tile, unsigned place) {
    const Eight x_now = shared.x[place][me], z_now = HAS_Z ? shared.z[place][me] : Eight();
    float out[HELPED];
#pragma unroll
    for (int j = 0; j < HELPED; j++) {
      const float(&halves)[2][Y_RING + 16] = sums[j / SLOTS].of[j % SLOTS];
      const unsigned here = place * TILE + step;
      out[j] = fmaf(MADE_UP, halves[0][here] + halves[1][here], skip[j] * x_now.value(j)) * gate(z_now.value(j));
    }
    write(y, out, tile < my_tiles ? count : 0);
    y += TILE * d_inner;
  };

  // A tile is prepared as soon as its place is free, while the one before it is walked; what can wait comes after: the tile
  // before the last is finished, and its place gets the one after the next. `finish` of all helpers has ended when the tile after
  // the next is ready, before its y can come where the first one was. One tile more than there are is announced, since walkers
  // read ahead.
  const int tiles = tiles_with(seqlen, 0);
  copy_inputs(0, 0), copy_inputs(1, 1);
#pragma unroll 1
  for (int tile = 0; tile < tiles + 2; tile++) {
    const unsigned place = tile % INPUT_TILES, other = (place + 2) % INPUT_TILES;
    if (tile >= 2) await_walked(shared, tile - 2);
    await_copies<1>();
    if (tile < tiles) prepare(tile, place);
    if (tile <= tiles) announce_ready(tile);
    if (tile >= 2) finish(tile - 2, other);
    copy_inputs(tile + 2, other);
  }
  await_copies<0>();  // before shared memory is another block's
}
