// What the kernels of the selective scan share: who holds what, and the arithmetic of one state.
//
// A lane holds STATES states of each of CHANNELS neighbouring channels, and SPREAD lanes share these channels:
//
//     lane = part * SLOTS + slot     slot: which channels (0 .. SLOTS - 1),  part: which of their states
//
// Everything that is the same for all states of a channel (softplus, gate, sums over states) is computed by one lane
// only: lane (part, slot) takes the steps part, part + SPREAD, ... of a segment and hands the result to the other lanes
// of its slot through shared memory. A warp needs no other warp for that, so it waits at __syncwarp alone.
//
// Constants from the compiler's command line:
//     IO                      float, bfloat16 or float16: x, dt, z, y, and B, C that vary in time
//     COMPLEX                 whether A, B, C and the state are complex
//     STATES, SPREAD          STATES * SPREAD >= N; padding states have A = B = C = 0 and stay 0
//     CHANNELS, WARPS         channels a lane, warps a block
//     B_VARIES, C_VARIES      whether B, C vary in time: (B, L, G, N), else (D, N)
//     HAS_Z, SOFTPLUS         gate; dt through softplus
//     HAS_RESTART             whether the state starts afresh at marked steps
//     ALIGNED                 whether a lane's channels can be read and written as one vector
//     SHARED_BYTES            what the launch gives of shared memory
#pragma once
#include "softplus.cuh"

constexpr int SLOTS = 32 / SPREAD;
constexpr int PADDED = SPREAD * STATES;
constexpr int WARP_CHANNELS = SLOTS * CHANNELS;
constexpr int BLOCK_CHANNELS = WARPS * WARP_CHANNELS;

#define FORCE_INLINE __device__ __forceinline__

// v, but unknown to the compiler: what is computed of it within a loop stays there. An address that is made again once a tile
// costs less than registers for it, or a spill.
template <class T> FORCE_INLINE T opaque(T v) {
  if constexpr (sizeof(T) == 8) asm volatile("" : "+l"(v));
  else if constexpr (is_same<T, float>) asm volatile("" : "+f"(v));
  else asm volatile("" : "+r"(v));
  return v;
}

// The special function unit rounds 2^x down, by 2e-8 on average. Over the many steps that a slow state remembers this adds
// up to more than all other errors; this much in x puts it right.
constexpr float ROUNDING = 2.5e-8f;

// More functions of one number a step; as in softplus.cuh.
FORCE_INLINE float inverse(float x) { return sizeof(IO) == 4 ? 1.0f / x : reciprocal_approx(x); }
FORCE_INLINE float logistic(float x) { return inverse(1.0f + exponential(-x)); }

// One state, and what is done with it: for real A a float, for complex A a float2. `conj` is nothing for floats.
#if COMPLEX
typedef float2 Number;
typedef float2 Weight;  // B and C in memory
constexpr float A_UNIT = 1.0f;

FORCE_INLINE Number zero() { return make_float2(0.0f, 0.0f); }
FORCE_INLINE Number scaled(float s, Number a) { return make_float2(s * a.x, s * a.y); }
FORCE_INLINE Number multiply(Number a, Number b) { return make_float2(a.x * b.x - a.y * b.y, a.x * b.y + a.y * b.x); }
FORCE_INLINE Number multiply_add(Number a, Number b, Number c) {
  return make_float2(fmaf(a.x, b.x, fmaf(-a.y, b.y, c.x)), fmaf(a.x, b.y, fmaf(a.y, b.x, c.y)));
}
// s a + b
FORCE_INLINE Number scale_add(float s, Number a, Number b) { return make_float2(fmaf(s, a.x, b.x), fmaf(s, a.y, b.y)); }
FORCE_INLINE Number conj(Number a) { return make_float2(a.x, -a.y); }
// Re(a b) + sum
FORCE_INLINE float real_product(Number a, Number b, float sum) { return fmaf(a.x, b.x, fmaf(-a.y, b.y, sum)); }
// exp(dt a). The angle is reduced by multiples of pi/2, held in three floats, good for |angle| < 1e5; then sine and cosine
// on +-pi/4 are polynomials (Cephes, S. Moshier).
//
// `rest` is what rounding left of dt, where that is a sum over many steps. The angle is then large, and its last bit counts.
FORCE_INLINE Number decay(float dt, Number a, float rest = 0.0f) {
  const float size = expf(fmaf(rest, a.x, dt * a.x));
  const float angle = dt * a.y, angle_rest = fmaf(rest, a.y, fmaf(dt, a.y, -angle));
  const float quarters = rintf(angle * 0.63661977f);
  float r = fmaf(quarters, -1.5707960129f, angle);
  r = fmaf(quarters, -3.1391647326e-7f, r);
  r = fmaf(quarters, -5.3903025300e-15f, r) + angle_rest;
  const float q = r * r;
  const float s = fmaf(r * q, fmaf(q, fmaf(q, -1.9515295891e-4f, 8.3321608736e-3f), -1.6666654611e-1f), r);
  const float c = fmaf(q * q, fmaf(q, fmaf(q, 2.443315711809948e-5f, -1.388731625493765e-3f), 4.166664568298827e-2f),
                       fmaf(q, -0.5f, 1.0f));
  const int k = (int)quarters;
  const float sine = k & 1 ? c : s, cosine = k & 1 ? s : c;
  return make_float2(size * (k + 1 & 2 ? -cosine : cosine), size * (k & 2 ? -sine : sine));
}
FORCE_INLINE Number to_number(Weight w) { return w; }
FORCE_INLINE Weight to_weight(Number a) { return a; }
#else
typedef float Number;
typedef IO Weight;
constexpr float A_UNIT = LOG2_E;  // A is held times log2 e, so that a decay is one 2^x

FORCE_INLINE Number zero() { return 0.0f; }
FORCE_INLINE Number scaled(float s, Number a) { return s * a; }
FORCE_INLINE Number multiply(Number a, Number b) { return a * b; }
FORCE_INLINE Number multiply_add(Number a, Number b, Number c) { return fmaf(a, b, c); }
FORCE_INLINE Number scale_add(float s, Number a, Number b) { return fmaf(s, a, b); }
FORCE_INLINE Number conj(Number a) { return a; }
FORCE_INLINE float real_product(Number a, Number b, float sum) { return fmaf(a, b, sum); }
// exp(dt A), as 2^x.
FORCE_INLINE Number decay(float dt, Number a, float rest = 0.0f) { return exp2_approx(fmaf(dt, a, ROUNDING)); }
FORCE_INLINE Number to_number(Weight w) { return to_float(w); }
FORCE_INLINE Weight to_weight(Number a) { return from_float<IO>(a); }
#endif

// Neighbouring numbers of one time step, as they are in memory. They stay one word until they are needed: to take a word
// apart is to wait for it.
template <int BYTES> struct Word;
template <> struct Word<2> { typedef unsigned short Type; };
template <> struct Word<4> { typedef unsigned Type; };
template <> struct Word<8> { typedef uint2 Type; };
template <> struct Word<16> { typedef uint4 Type; };

template <int COUNT> union Packed {
  IO of[COUNT];
  typename Word<sizeof(IO) * COUNT>::Type word;

  FORCE_INLINE Packed() : word{} {}
  template <class T = IO> FORCE_INLINE float value(int j) const {
    if constexpr (sizeof(T) == 2 && COUNT == 2) return j ? high_float<T>(word) : low_float<T>(word);
    else if constexpr (sizeof(T) == 2 && COUNT == 4) {
      const unsigned half = j < 2 ? word.x : word.y;
      return j % 2 ? high_float<T>(half) : low_float<T>(half);
    } else if constexpr (sizeof(T) == 2 && COUNT == 8) {
      const unsigned half = j < 4 ? j < 2 ? word.x : word.y : j < 6 ? word.z : word.w;
      return j % 2 ? high_float<T>(half) : low_float<T>(half);
    } else return to_float(of[j]);
  }
};
typedef Packed<CHANNELS> Channels;

// `count` of the numbers exist, the others read as zero.
template <int COUNT = CHANNELS, bool AS_WORD = ALIGNED> FORCE_INLINE Packed<COUNT> read(const IO* p, int count) {
  Packed<COUNT> c;
  if constexpr (AS_WORD) {
    if (count) c.word = *reinterpret_cast<const decltype(c.word)*>(p);
  } else {
#pragma unroll
    for (int j = 0; j < COUNT; j++)
      if (j < count) c.of[j] = p[j];
  }
  return c;
}

// The same, on its way from memory to shared memory while the warp goes on; `await_copies` waits for all of a lane's.
template <int COUNT> FORCE_INLINE void copy(IO* to, const IO* p, bool exists) {
  constexpr int BYTES = sizeof(IO) * COUNT;
  const unsigned at = (unsigned)__cvta_generic_to_shared(to);
  if constexpr (BYTES == 16) {  // can pass by the first-level cache, which has little room beside much shared memory
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(p), "r"(exists ? BYTES : 0) : "memory");
  } else if constexpr (BYTES >= 4) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(at), "l"(p), "n"(BYTES), "r"(exists ? BYTES : 0) : "memory");
  } else {
    *to = exists ? *p : IO{};
  }
}
template <int COUNT> FORCE_INLINE void copy(Packed<COUNT>& to, const IO* p, int count) {
  if constexpr (ALIGNED) copy<COUNT>(to.of, p, count != 0);
  else to = read<COUNT>(p, count);
}
FORCE_INLINE void copy(void* to, const void* from) {
  const unsigned at = (unsigned)__cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
}
FORCE_INLINE void await_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

template <int COUNT> FORCE_INLINE void write(IO* p, const float (&values)[COUNT], int count) {
  Packed<COUNT> c;
#pragma unroll
  for (int j = 0; j < COUNT; j++) c.of[j] = from_float<IO>(values[j]);
#if ALIGNED
  if (!count) return;
  if constexpr (sizeof(c) == 16)  // told so, since the compiler may make four accesses of it
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(c.word.x), "r"(c.word.y), "r"(c.word.z), "r"(c.word.w) : "memory");
  else *reinterpret_cast<decltype(c.word)*>(p) = c.word;
#else
#pragma unroll
  for (int j = 0; j < COUNT; j++)
    if (j < count) p[j] = c.of[j];
#endif
}

// A lane's states of one channel, in a row of PADDED or N numbers.
struct alignas(16) States { Number of[STATES]; };

FORCE_INLINE States read_states(const Number* row, int first, int count) {
  States s;
#pragma unroll
  for (int n = 0; n < STATES; n++) s.of[n] = first + n < count ? row[first + n] : zero();
  return s;
}

// Which channels this lane holds. Groups share B and C; a block stays within one group.
struct Place {
  int part, slot, warp, group;
  int block, blocks;     // number of the block within its batch row, and how many a row has
  int count;       // channels of this lane that exist, 0 .. CHANNELS
  int64 batch, channel;  // the first channel
};

FORCE_INLINE Place place(int64 groups, int64 width) {
  const int lane = threadIdx.x % 32;
  const int blocks = (int)((width + BLOCK_CHANNELS - 1) / BLOCK_CHANNELS);  // of a group
  Place p;
  p.blocks = blocks * (int)groups, p.block = blockIdx.x % p.blocks, p.batch = blockIdx.x / p.blocks;
  p.part = lane / SLOTS, p.slot = lane % SLOTS, p.warp = threadIdx.x / 32;
  p.group = p.block / blocks;
  const int64 within = (int64)(p.block % blocks) * BLOCK_CHANNELS + p.warp * WARP_CHANNELS + p.slot * CHANNELS;
  const int64 left = width - within;
  p.count = left >= CHANNELS ? CHANNELS : left > 0 ? (int)left : 0;
  p.channel = p.group * width + within;
  return p;
}

// The time step of a lane's channel from its raw value; steps past the end are identities: dt = 0. A product, since a choice
// would be compiled to a branch, and one softplus would wait for the other.
FORCE_INLINE float time_step(float raw, bool exists) { return (SOFTPLUS ? softplus(raw) : raw) * (exists ? 1.0f : 0.0f); }

// B or C of a tile of steps, on the way from memory to shared memory: fetched by the whole block a tile ahead, since
// memory is far, and put down as Numbers in rows of PADDED.
template <int STEPS> struct Fetch {
  static constexpr int EACH = (STEPS * PADDED + 32 * WARPS - 1) / (32 * WARPS);
  static constexpr bool EARLY = EACH <= 8;  // few enough to hold in registers during a tile
  Weight held[EACH];

  // `count` steps from `rows` on exist.
  FORCE_INLINE void get(const Weight* rows, int64 time_stride, int64 count, int d_state) {
    const int thread = EARLY ? threadIdx.x : opaque((int)threadIdx.x);  // or all addresses would be made before the loop, and spilled
#pragma unroll
    for (int k = 0; k < EACH; k++) {
      const int i = k * 32 * WARPS + thread, step = i / PADDED, n = i % PADDED;
      const bool exists = step < STEPS && step < count && n < d_state;
      if (exists) held[k] = rows[step * time_stride + n];
      else held[k] = Weight{};
    }
  }
  FORCE_INLINE void put(Number (*tile)[PADDED]) const {
    put([&](int step, int n, Weight w) { tile[step][n] = to_number(w); });
  }
  // To where `keep` says.
  template <class Keep> FORCE_INLINE void put(Keep keep) const {
#pragma unroll
    for (int k = 0; k < EACH; k++) {
      const int i = k * 32 * WARPS + threadIdx.x;
      if (i < STEPS * PADDED) keep(i / PADDED, i % PADDED, held[k]);
    }
  }
};

// What every lane of a slot needs of a time step: dt, and what enters the state, dt x.
struct alignas(CHANNELS == 1 ? 8 : 16) Step { float dt[CHANNELS], dx[CHANNELS]; };

// A sum of many floats, with what rounding lost of it (Kahan).
struct Sum {
  float total = 0.0f, lost = 0.0f;
  FORCE_INLINE void add(float v) {
    const float wanted = v - lost, next = total + wanted;
    lost = (next - total) - wanted;
    total = next;
  }
};

// One float a channel.
struct alignas(4 * CHANNELS) Floats { float of[CHANNELS]; };
