// The time step's softplus. Half precision rounds more than the special function unit does; float32 does not.
#pragma once
#include "numbers.cuh"

__device__ __forceinline__ float exponential(float x) { return sizeof(IO) == 4 ? expf(x) : exp2_approx(x * LOG2_E); }

// softplus(v) = max(v, 0) + log(1 + e),  e = exp(-|v|).  log(1 + e) is e times a minimax polynomial, with 3e-8 of the result: its
// error is relative for every v; log2(1 + e) would lose a small e, and a quotient would need another special function.
__device__ __forceinline__ float softplus(float v) {
  const float e = exponential(-fabsf(v));
  float p = 0.0053648246f;
  p = fmaf(p, e, -0.030065794f);
  p = fmaf(p, e, 0.079204537f);
  p = fmaf(p, e, -0.13753803f);
  p = fmaf(p, e, 0.19153655f);
  p = fmaf(p, e, -0.24857163f);
  p = fmaf(p, e, 0.33321324f);
  p = fmaf(p, e, -0.49999648f);
  p = fmaf(p, e, 1.0f);
  return fmaf(p, e, fmaxf(v, 0.0f));
}
