// Who walks in `scan_narrow`: the recurrence of 4 channels a warp; 8 lanes a channel, 2 states a lane. See selective_scan_narrow.cu.
#pragma once
#include "selective_scan.cuh"
#include "tensor_cores.cuh"

constexpr int SEGMENT = SAVE_EVERY;    // steps whose y are summed at a time
constexpr int QUAD = 4;                // steps whose B and C a lane reads as one word
constexpr int PAIRS = PADDED / 2;
constexpr int HELPERS = 32 * WARPS;    // lanes
constexpr int HELPED = 8;              // channels of a helper's lane, of one step of a tile: 16 bytes
constexpr int PARTS = BLOCK_CHANNELS / HELPED;
constexpr int INPUT_TILES = 4;         // from the beginning of its copy until its y is finished
constexpr int RING = 2 * TILE;         // steps of which dt and dt x are there
constexpr int Y_RING = 4 * TILE;       // and y
static_assert(STATES == 2 && SPREAD == 8 && CHANNELS == 1 && SEGMENT == 16, "lanes as operands of tensor cores");
static_assert(TILE * PARTS == HELPERS && PARTS == 2, "who has what of a tile, without bank conflicts");

typedef Packed<2> Pair;
typedef Packed<HELPED> Eight;

// Gaps: without bank conflicts a walker's lanes read from four channels, and a helper's write and read steps of two walkers.
struct alignas(16) Steps { Step of[SLOTS][RING + 2]; float gap[8]; };
struct alignas(16) Sums { float of[SLOTS][2][Y_RING + 16]; float gap[8]; };
struct Shared {
  Steps steps[WARPS];
  Sums y[WARPS];
  Pair B[INPUT_TILES * TILE][PAIRS], C[INPUT_TILES * TILE][PAIRS];
  Eight x[INPUT_TILES][HELPERS], dt[INPUT_TILES][HELPERS], z[INPUT_TILES][HELPERS];
  float restarts[RING];
  uint64 walked[2];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "ops/cuda/scan_layout.py counts the same bytes");

// Barriers between walkers and helpers, two of each kind in turn. Who announces does not wait.
//
// What is ready goes by barriers of the hardware, what is walked by barriers in shared memory, at which each lane arrives. Either
// kind would do for both. This is the fastest; and to racecheck a bar.arrive that comes after a bar.sync of the same warp does
// not order what the warp did in between, although it does (PTX ISA, "Memory Consistency Model").
FORCE_INLINE void announce_ready(unsigned tile) {
  asm volatile("bar.arrive %0, %1;" ::"r"(1 + tile % 2), "n"(2 * HELPERS) : "memory");
}
FORCE_INLINE void await_ready(unsigned tile) {
  asm volatile("bar.sync %0, %1;" ::"r"(1 + tile % 2), "n"(2 * HELPERS) : "memory");
}

FORCE_INLINE unsigned walked(const Shared& shared, unsigned tile) {
  return (unsigned)__cvta_generic_to_shared(&shared.walked[tile % 2]);
}
FORCE_INLINE void begin_walked(Shared& shared) {
  if (threadIdx.x == 0)
    for (int i = 0; i < 2; i++) asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(walked(shared, i)), "r"(32 * WARPS) : "memory");
  __syncthreads();
}
FORCE_INLINE void announce_walked(Shared& shared, unsigned tile) {
  asm volatile("{.reg .b64 state; mbarrier.arrive.shared.b64 state, [%0];}" ::"r"(walked(shared, tile)) : "memory");
}
#if __CUDA_ARCH__ >= 900
#define TEST "try_wait"  // sleeps meanwhile
#else
#define TEST "test_wait"
#endif
FORCE_INLINE void await_walked(const Shared& shared, unsigned tile) {
  unsigned done;
  do {
    asm volatile("{.reg .pred p; mbarrier." TEST ".parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(done) : "r"(walked(shared, tile)), "r"(tile / 2 % 2) : "memory");
  } while (!done);
}
#undef TEST

// What a block has of the arguments: its batch row, group and channels.
struct Part {
  int64 batch, group, channel;
  int count;  // of its channels that exist
};

// Tensor cores take the first 11 bits of a float. For y in bfloat16, of 8 bits, it is enough that what they leave out is made up
// for on average; for float16 a second product adds it.
constexpr bool SUMS_TWICE = !is_same<IO, bfloat16>;
constexpr float MADE_UP = SUMS_TWICE ? 1.0f : LEFT_OUT;

// Sums of SEGMENT steps over 4 lanes. Row g of an operand A has the lanes 4g .. 4g + 3, and B has ones that bring the sums of
// quad q to columns 2q and 2q + 1: so lane (g, t) gets those of the steps 4t .. 4t + 3 of its row.
struct LaneSums {
  float one[8];  // one[g]: 1 in the lanes of row g

  FORCE_INLINE LaneSums() {
#pragma unroll
    for (int g = 0; g < 8; g++) one[g] = opaque(threadIdx.x % 32 / 4 == g ? 1.0f : 0.0f);
  }
  FORCE_INLINE float4 of(const float (&v)[SEGMENT]) const {
    float d[4] = {};
#pragma unroll
    for (int i = 0; i < SEGMENT; i += 4) {
      const float(&w)[4] = *(const float(*)[4])&v[i];
      add(d, i, w[0], w[1], w[2], w[3]);
      if (!SUMS_TWICE) continue;
      float rest[4];
#pragma unroll
      for (int k = 0; k < 4; k++) rest[k] = left_out(w[k]);
      add(d, i, rest[0], rest[1], rest[2], rest[3]);
    }
    return make_float4(d[0], d[1], d[2], d[3]);
  }

 private:
  FORCE_INLINE void add(float (&d)[4], int i, float s0, float s1, float s2, float s3) const {
    multiply_add_floats(d, s0, s2, s1, s3, one[i / 2], one[i / 2 + 1]);
  }
};

// B or C of a quad of steps as lane (g, t) = (lane / 4, lane % 4) needs it: of its states 4t + g % 2 and 2 more.
//
// The word of lane (g, t) is, as an operand B (8 x 8), of step t and column g, which is of the states 2g and 2g + 1. Row g of
// an operand A takes of it one of both states of one step, row g + 8 of the next.
struct Choice {
  unsigned take[QUAD];

  FORCE_INLINE Choice(int g, int t) {
#pragma unroll
    for (int s = 0; s < QUAD; s++) take[s] = s == t ? (unsigned)from_float<IO>(1.0f).bits << 16 * (g % 2) : 0;
  }
  FORCE_INLINE void hand_out(Pair pair, float (&weights)[QUAD][2]) const {
#pragma unroll
    for (int s = 0; s < QUAD; s += 2) {
      float d[4] = {};
      multiply_add<IO>(d, take[s], take[s + 1], pair.word);
      weights[s][0] = d[0], weights[s][1] = d[1], weights[s + 1][0] = d[2], weights[s + 1][1] = d[3];
    }
  }
};

// Where a lane of a walker finds a segment in shared memory: dt and dt x, and B and C of one step and two states.
struct Lane {
  int steps, weights, y;  // offsets of the lane's own

  FORCE_INLINE Lane(const Shared& shared, int warp, int g, int t)
      : steps(opaque((int)(shared.steps[warp].of[g / 2] - shared.steps[0].of[0]))), weights(opaque(t * PAIRS + g)),
        y(opaque((int)(shared.y[warp].of[g / 2][g % 2] - shared.y[0].of[0][0]) + 4 * t)) {}
};
struct Source {
  const Step* steps;
  const Pair *B, *C;

  FORCE_INLINE Source(const Shared& shared, const Lane& lane, unsigned step) {
    const unsigned row = step % (INPUT_TILES * TILE);
    steps = shared.steps[0].of[0] + lane.steps + step % RING;
    B = shared.B[0] + lane.weights + row * PAIRS, C = shared.C[0] + lane.weights + row * PAIRS;
  }
};

// What the lane needs of a quad of steps: as it is there, and ready for the recurrence.
struct Quad {
  Step steps[QUAD];
  Pair B, C;

  FORCE_INLINE void get(const Source& from, int step) {
#pragma unroll
    for (int i = 0; i < QUAD; i += 2) *(float4*)&steps[i] = *(const float4*)&from.steps[step + i];
    if (B_VARIES) B = from.B[step * PAIRS];
    if (C_VARIES) C = from.C[step * PAIRS];
  }
};
struct Ready {
  float dx[QUAD], factor[QUAD][2], B[QUAD][2], C[QUAD][2];

  FORCE_INLINE void make(const Quad& quad, const float (&a)[2], const Choice& choice) {
    if (B_VARIES) choice.hand_out(quad.B, B);
    if (C_VARIES) choice.hand_out(quad.C, C);
#pragma unroll
    for (int s = 0; s < QUAD; s++) {
      dx[s] = quad.steps[s].dx[0];
#pragma unroll
      for (int k = 0; k < 2; k++) factor[s][k] = decay(quad.steps[s].dt[0], a[k]);
    }
  }
};

// A lane has channel g / 2 of the warp.
FORCE_INLINE void walk(
    Shared& shared, const Part& at, const Number* A, const Number* B_constant, const Number* C_constant, const Number* initial_state,
    Number* final_state, Number* saved, int64 seqlen, int64 d_inner, int d_state) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int slot = g / 2, within = warp * SLOTS + slot, first = 4 * t + g % 2;
  const bool exists = within < at.count;
  const int64 channel = at.channel + within, state_row = (at.batch * d_inner + channel) * d_state;
  float a[2], h[2], B_fixed[2], C_fixed[2];
#pragma unroll
  for (int k = 0; k < 2; k++) {
    const int n = first + 2 * k;
    const bool held = exists && n < d_state;
    a[k] = held ? A_UNIT * A[channel * d_state + n] : 0.0f;
    h[k] = held && initial_state ? initial_state[state_row + n] : 0.0f;
    B_fixed[k] = !B_VARIES && held ? B_constant[channel * d_state + n] : 0.0f;
    C_fixed[k] = !C_VARIES && held ? C_constant[channel * d_state + n] : 0.0f;
  }
  const int64 segments = (seqlen + SEGMENT - 1) / SEGMENT;
  int to_save = saved && exists ? (int)segments : 0;
  saved += (at.batch * segments * d_inner + channel) * PADDED + first;
  const Choice choice(g, t);
  const LaneSums lane_sums;
  const Lane lane(shared, warp, g, t);

  // One warp a scheduler has no other to fill its waits: a quad is read two quads ahead, and made ready one ahead. All quads of
  // a tile are one piece of code, so that the compiler can fill waits of one with work of others. What it makes of this depends
  // on the order here by 8 %, and on its version: this order is fast with NVRTC 13.0 and 13.5 (lab notes).
  await_ready(0);
  Source here(shared, lane, 0);
  Quad next;
  Ready ready_next;
  next.get(here, 0);
  ready_next.make(next, a, choice);
  next.get(here, QUAD);
  const unsigned tiles = (unsigned)((seqlen + TILE - 1) / TILE);
#pragma unroll 1
  for (unsigned tile = 0; tile < tiles; tile++) {
    const unsigned step = tile * TILE;  // modulo 2^32, which is a multiple of all rings
    const Source then(shared, lane, step + TILE);
#pragma unroll
    for (int from = 0; from < TILE; from += SEGMENT) {
      if (from + SEGMENT == TILE) await_ready(tile + 1);
      if (from / SEGMENT < to_save) saved[0] = h[0], saved[2] = h[1];
      saved += d_inner * PADDED;
      float products[SEGMENT];
#pragma unroll
      for (int q = 0; q < SEGMENT; q += QUAD) {
        const Ready now = ready_next;
#pragma unroll
        for (int s = 0; s < QUAD; s++) {
#pragma unroll
          for (int k = 0; k < 2; k++) {
            float factor = now.factor[s][k];
            if (HAS_RESTART) factor *= shared.restarts[step % RING + from + q + s];
            h[k] = fmaf(factor, h[k], now.dx[s] * (B_VARIES ? now.B[s][k] : B_fixed[k]));
          }
          const float* const C = C_VARIES ? now.C[s] : C_fixed;
          products[q + s] = fmaf(C[1], h[1], C[0] * h[0]);
        }
        ready_next.make(next, a, choice);
        const int ahead = from + q + 2 * QUAD;
        next.get(ahead < TILE ? here : then, ahead % TILE);
      }
      *(float4*)(shared.y[0].of[0][0] + lane.y + step % Y_RING + from) = lane_sums.of(products);
    }
    announce_walked(shared, tile);
    to_save -= TILE / SEGMENT;
    here = then;
  }
#pragma unroll
  for (int k = 0; k < 2; k++)
    if (exists && first + 2 * k < d_state) final_state[state_row + first + 2 * k] = h[k];
}
