// Neighbouring numbers, moved between memory and registers in accesses of up to 16 bytes.
#pragma once
#include "numbers.cuh"

template <class T, int COUNT> struct alignas(COUNT * sizeof(T) < 16 ? COUNT * sizeof(T) : 16) Vector { T items[COUNT]; };

template <int COUNT, class T> __device__ __forceinline__ Vector<T, COUNT> read(const T* from) {
  return *reinterpret_cast<const Vector<T, COUNT>*>(from);
}

template <class T, int COUNT> __device__ __forceinline__ void unpack(float (&x)[COUNT], const Vector<T, COUNT>& packed) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) x[i] = to_float(packed.items[i]);
}

// The same from whole words, in an instruction less for two halves.
template <class T, int COUNT> __device__ __forceinline__ void unpack_words(float (&x)[COUNT], const Vector<T, COUNT>& packed) {
  if constexpr (sizeof(T) == 4 || COUNT == 1) {
    unpack(x, packed);
  } else {
    const auto& words = reinterpret_cast<const Vector<unsigned, COUNT / 2>&>(packed);
#pragma unroll
    for (int i = 0; i < COUNT / 2; ++i) {
      x[2 * i] = low_float<T>(words.items[i]);
      x[2 * i + 1] = high_float<T>(words.items[i]);
    }
  }
}

// Two numbers in one instruction: the first in the low half.
template <class T> __device__ __forceinline__ unsigned pack(float first, float second);
template <> __device__ __forceinline__ unsigned pack<bfloat16>(float first, float second) {
  unsigned word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}
template <> __device__ __forceinline__ unsigned pack<float16>(float first, float second) {
  unsigned word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}

template <class T, int COUNT> __device__ __forceinline__ void write(T* to, const float (&x)[COUNT]) {
  Vector<T, COUNT> packed;
  if constexpr (sizeof(T) == 4 || COUNT == 1) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) packed.items[i] = from_float<T>(x[i]);
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; i += 2) {
      const unsigned word = pack<T>(x[i], x[i + 1]);
      packed.items[i].bits = (unsigned short)word;
      packed.items[i + 1].bits = (unsigned short)(word >> 16);
    }
  }
  *reinterpret_cast<Vector<T, COUNT>*>(to) = packed;
}

// Sixteen bytes of global memory in one instruction: told so, since the compiler may make four of it.
__device__ __forceinline__ void write_whole(float* to, const float (&x)[4]) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]) : "memory");
}
