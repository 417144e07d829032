// Sums over the channels of a warp, of dB and dC of a segment of steps.
//
// A lane has, for each step, the contributions of its channels to STATES states of dB and of dC (`which` 0 and 1). `add`
// takes them, and `finish` leaves the sums over the SLOTS lanes that share the states in totals[step][which][state].
#pragma once

#if !COMPLEX && STATES == 4 && SPREAD == 4
// On tensor cores, by mma.m16n8k8: D += A B sums over k. The four floats that a lane adds are its four elements of A, in rows
// g and g + 8 and columns k and k + 4 for g = lane / 4, k = lane % 4: so a sum over four columns collects a group of four
// lanes. B has ones such that the two sums of a row land in columns 2p and 2p + 1 of D, with p = 0 .. 3 for dB and dC of an
// even and an odd step. Then lane (g, p) of D holds the four sums of group g, and SLOTS = 8 makes two groups a part.
//
// The floats are rounded to 11 bits (tf32), more than half precision keeps of the result. For float32 a second product adds
// the rest that rounding leaves.
struct ChannelSums {
  struct Scratch {};

  float sums[SEGMENT / 2][4];
  float one[8];  // one[g]: 1 in the lanes of group g

  FORCE_INLINE ChannelSums() {
#pragma unroll
    for (int g = 0; g < 8; g++) one[g] = threadIdx.x % 32 / 4 == g ? 1.0f : 0.0f;
  }
  FORCE_INLINE void start() {
#pragma unroll
    for (int k = 0; k < SEGMENT / 2; k++)
#pragma unroll
      for (int i = 0; i < 4; i++) sums[k][i] = 0.0f;
  }
  FORCE_INLINE void add(Scratch&, const Place&, int step, int which, const States& v) {
    States high, rest;
#pragma unroll
    for (int n = 0; n < STATES; n++) high.of[n] = rounded(v.of[n]);
    multiply(step, which, high);
    if (sizeof(IO) < 4) return;
#pragma unroll
    for (int n = 0; n < STATES; n++) rest.of[n] = rounded(v.of[n] - truncated(high.of[n]));
    multiply(step, which, rest);
  }
  FORCE_INLINE void finish(const Scratch&, const Place& at, Number (*totals)[2][PADDED]) {
    const int lane = threadIdx.x % 32, p = lane % 4;
#pragma unroll
    for (int k = 0; k < SEGMENT / 2; k++) {
#pragma unroll
      for (int i = 0; i < 4; i++) sums[k][i] += __shfl_xor_sync(~0u, sums[k][i], 4);  // the other group of the part
      const States total = {{sums[k][0], sums[k][2], sums[k][1], sums[k][3]}};
      if (lane / 4 % 2 == 0) *(States*)&totals[2 * k + p / 2][p % 2][at.part * STATES] = total;
    }
  }

 private:
  // To the nearest, but for the low 13 bits, at which tensor cores do not look; `truncated` is what they see.
  static FORCE_INLINE float rounded(float v) { return __uint_as_float(__float_as_uint(v) + 0x1000u); }
  static FORCE_INLINE float truncated(float v) { return __uint_as_float(__float_as_uint(v) & 0xffffe000u); }

  FORCE_INLINE void multiply(int step, int which, const States& v) {
    const int p = step % 2 * 2 + which;
    float(&d)[4] = sums[step / 2];
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(__float_as_uint(v.of[0])), "r"(__float_as_uint(v.of[1])), "r"(__float_as_uint(v.of[2])),
          "r"(__float_as_uint(v.of[3])), "r"(__float_as_uint(one[2 * p])), "r"(__float_as_uint(one[2 * p + 1])));
  }
};
#else
// Through shared memory: each lane puts its part there, and adds up what others left.
struct ChannelSums {
  struct Scratch { States parts[SEGMENT][2][SPREAD][SLOTS + 1]; };

  FORCE_INLINE void start() {}
  FORCE_INLINE void add(Scratch& scratch, const Place& at, int step, int which, const States& v) {
    scratch.parts[step][which][at.part][at.slot] = v;
  }
  FORCE_INLINE void finish(const Scratch& scratch, const Place&, Number (*totals)[2][PADDED]) const {
    for (int item = threadIdx.x % 32; item < SEGMENT * 2 * SPREAD; item += 32) {
      const int step = item / (2 * SPREAD), which = item / SPREAD % 2, part = item % SPREAD;
      if (which == 0 ? !B_VARIES : !C_VARIES) continue;
      States sum = scratch.parts[step][which][part][0];
#pragma unroll
      for (int slot = 1; slot < SLOTS; slot++) {
        const States more = scratch.parts[step][which][part][slot];
#pragma unroll
        for (int n = 0; n < STATES; n++) sum.of[n] = scale_add(1.0f, more.of[n], sum.of[n]);
      }
      *(States*)&totals[step][which][part * STATES] = sum;
    }
  }
};
#endif
