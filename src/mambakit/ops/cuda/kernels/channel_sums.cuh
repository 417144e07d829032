// Sums over the channels of a warp, of dB and dC of a segment of steps.
//
// For each step a lane has, of each of its channels, a factor (dx for dB, dy for dC) and STATES numbers to be multiplied by it (`which`
// 0 for dB, whose steps come backwards, and 1 for dC, forwards). `add` takes them, `finish` leaves the sums of the warp in
// Totals, where `total` finds them.
#pragma once

FORCE_INLINE void add(States& sum, const States& more) {
#pragma unroll
  for (int n = 0; n < STATES; n++) sum.of[n] = scale_add(1.0f, more.of[n], sum.of[n]);
}

#if !COMPLEX && STATES == 4 && SPREAD == 4 && CHANNELS == 2
#include "tensor_cores.cuh"

// On tensor cores, as a product of the numbers with the factors. Half of the slots are four neighbouring lanes and a row of an
// operand A: row g = lane / 4 = 2 part + half, column t = lane % 4 = slot % 4. Two states and both channels are a lane's four elements
// (rows g and g + 8, columns t and t + 4), so all four states take two products.
//
// A lane's factors are its elements of the operand B, in column g. In the product of a step, all but those of the lanes whose own
// step it is (step % 4 == part) are 0: so columns 2u and 2u + 1 are for the step u of four, of the slots of either half. Lane (g, t)
// gets both of step t; the one of its row's half is wanted.
struct ChannelSums {
  static constexpr bool ON_TENSOR_CORES = true;  // so a factor of a lane's own step is enough
  static constexpr int QUADS = SEGMENT / 4;
  struct Scratch {};
  struct Totals { States of[2][QUADS][32]; };  // of half of the slots: lane (g, t) those of step t

  float sums[2][4];

  FORCE_INLINE void add(Scratch&, Totals& totals, const Place& at, int step, int which, const Floats& factors, const States (&v)[2]) {
    const int turn = which ? step % 4 : 3 - step % 4;
    if (turn == 0) sums[0][0] = sums[0][1] = sums[0][2] = sums[0][3] = sums[1][0] = sums[1][1] = sums[1][2] = sums[1][3] = 0.0f;
    const bool is_own = at.part == step % 4;
    const float f0 = is_own ? factors.of[0] : 0.0f, f1 = is_own ? factors.of[1] : 0.0f;
#pragma unroll
    for (int i = 0; i < 2; i++) multiply(sums[i], v[0].of[2 * i], v[0].of[2 * i + 1], v[1].of[2 * i], v[1].of[2 * i + 1], f0, f1);
    if (turn < 3) return;
    const bool half = at.slot >= 4;
    States sum;
#pragma unroll
    for (int n = 0; n < 4; n++) sum.of[n] = half ? sums[n / 2][n % 2 * 2 + 1] : sums[n / 2][n % 2 * 2];
    totals.of[which][step / 4][threadIdx.x % 32] = sum;
  }
  FORCE_INLINE void finish(const Scratch&, Totals&, const Place&) const {}

  // Of a step, dB or dC and a part: both halves, in the order that has no bank conflicts.
  template <class Get> static FORCE_INLINE States total(Get totals, int warp, int step, int which, int part) {
    States sum = {};
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int half = i ^ part % 2;
      ::add(sum, totals(warp, step / SEGMENT).of[which][step % SEGMENT / 4][(2 * part + half) * 4 + step % 4]);
    }
    return sum;
  }
  // What makes up for the bits that tensor cores leave out. Without a gate dy has no more than they take.
  static FORCE_INLINE float made_up(int which) { return IS_EXACT ? 1.0f : which == 0 || HAS_Z ? LEFT_OUT * LEFT_OUT : LEFT_OUT; }

 private:
  // Tensor cores take the first 11 bits of a float. For bfloat16, of 8 bits, it is enough to make up on average for what they leave
  // out. Otherwise more products add it.
  static constexpr bool IS_EXACT = !is_same<IO, bfloat16>;

  static FORCE_INLINE void multiply(float (&d)[4], float a0, float a1, float a2, float a3, float f0, float f1) {
    multiply_add_floats(d, a0, a1, a2, a3, f0, f1);
    if (!IS_EXACT) return;
    const float g0 = left_out(f0), g1 = left_out(f1), b0 = left_out(a0), b1 = left_out(a1), b2 = left_out(a2), b3 = left_out(a3);
    multiply_add_floats(d, a0, a1, a2, a3, g0, g1);
    multiply_add_floats(d, b0, b1, b2, b3, f0, f1);
    if (sizeof(IO) == 4) multiply_add_floats(d, b0, b1, b2, b3, g0, g1);
  }
};
#else
// Through shared memory: each lane puts its part there, and adds up what others left.
struct ChannelSums {
  static constexpr bool ON_TENSOR_CORES = false;
  struct Scratch { States parts[SEGMENT][2][SPREAD][SLOTS + 1]; };
  struct Totals { Number of[SEGMENT][2][PADDED]; };

  FORCE_INLINE void add(Scratch& scratch, Totals&, const Place& at, int step, int which, const Floats& factors, const States (&v)[CHANNELS]) {
    States sum;
#pragma unroll
    for (int n = 0; n < STATES; n++) {
      sum.of[n] = scaled(factors.of[0], v[0].of[n]);
#pragma unroll
      for (int j = 1; j < CHANNELS; j++) sum.of[n] = scale_add(factors.of[j], v[j].of[n], sum.of[n]);
    }
    scratch.parts[step][which][at.part][at.slot] = sum;
  }
  FORCE_INLINE void finish(const Scratch& scratch, Totals& totals, const Place&) const {
    for (int item = threadIdx.x % 32; item < SEGMENT * 2 * SPREAD; item += 32) {
      const int step = item / (2 * SPREAD), which = item / SPREAD % 2, part = item % SPREAD;
      if (which == 0 ? !B_VARIES : !C_VARIES) continue;
      States sum = scratch.parts[step][which][part][0];
#pragma unroll
      for (int slot = 1; slot < SLOTS; slot++) ::add(sum, scratch.parts[step][which][part][slot]);
      *(States*)&totals.of[step][which][part * STATES] = sum;
    }
  }

  template <class Get> static FORCE_INLINE States total(Get totals, int warp, int step, int which, int part) {
    return *(const States*)&totals(warp, step / SEGMENT).of[step % SEGMENT][which][part * STATES];
  }
  static FORCE_INLINE float made_up(int) { return 1.0f; }
};
#endif
