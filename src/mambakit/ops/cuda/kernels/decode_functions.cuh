// Functions of one number in a step of the scan. Half precision rounds more than the special function unit does; float32 does
// not.
#pragma once
#include "numbers.cuh"

__device__ __forceinline__ float exponential(float x) { return sizeof(IO) == 4 ? expf(x) : exp2_approx(x * LOG2_E); }
__device__ __forceinline__ float sigmoid_of(float x) { return sizeof(IO) == 2 ? sigmoid(x) : 1.0f / (1.0f + expf(-x)); }
__device__ __forceinline__ float softplus(float v) { return fmaxf(v, 0.0f) + log1pf(expf(-fabsf(v))); }
