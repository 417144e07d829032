// Numbers in memory and in registers. Memory holds float, bfloat16 or float16; arithmetic is float.
//
// The half-precision types are their bits, so that no CUDA header is needed: NVRTC then compiles without a toolkit.
#pragma once

typedef long long int64;
typedef unsigned long long uint64;

struct bfloat16 { unsigned short bits; };
struct float16 { unsigned short bits; };

template <class T, class U> constexpr bool is_same = false;
template <class T> constexpr bool is_same<T, T> = true;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bfloat16 x) { return __uint_as_float((unsigned)x.bits << 16); }
__device__ __forceinline__ float to_float(float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bfloat16 from_float<bfloat16>(float x) {
  bfloat16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <> __device__ __forceinline__ float16 from_float<float16>(float x) {
  float16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

// Two halves of a word, the first in the low bits. One instruction each for bfloat16.
template <class T> __device__ __forceinline__ float low_float(unsigned word);
template <class T> __device__ __forceinline__ float high_float(unsigned word);
template <> __device__ __forceinline__ float low_float<bfloat16>(unsigned word) { return __uint_as_float(word << 16); }
template <> __device__ __forceinline__ float high_float<bfloat16>(unsigned word) { return __uint_as_float(word & 0xffff0000u); }
template <> __device__ __forceinline__ float low_float<float16>(unsigned word) { return to_float(float16{(unsigned short)word}); }
template <> __device__ __forceinline__ float high_float<float16>(unsigned word) { return to_float(float16{(unsigned short)(word >> 16)}); }

// The special function unit: 2^x, 1/x and log2 x to about 2^-22, each one instruction.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

// 1 / (1 + exp(-x)). exp(-x) overflows to infinity for x < -88, whose reciprocal is the right 0.
__device__ __forceinline__ float sigmoid(float x) { return reciprocal_approx(1.0f + exp2_approx(-x * LOG2_E)); }
