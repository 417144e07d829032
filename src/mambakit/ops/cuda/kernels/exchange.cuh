// What blocks of a grid that all run at the same time hand to one another in memory, without barriers: a place that is empty
// holds ones in all bits, and who needs a number reads its place until there is another. That takes one way to the memory and
// one back; a barrier would take three and a way to the number itself.
//
// No arithmetic gives that number: a NaN that it makes is 0x7fff.... Places are numbers of their own, so nothing has to be in
// order but the emptying of a place and its next filling, for those who read it: see `Keeper`.
#pragma once
#include "block_barrier.cuh"
#include "vectors.cuh"

__device__ __forceinline__ void empty(float* place) { *reinterpret_cast<unsigned*>(place) = ~0u; }
__device__ __forceinline__ void empty(IO* place) { place->bits = 0xffff; }

// Whether one of the numbers in 16 bytes is not there. By the greatest: nothing is greater than an empty place.
template <class T> __device__ __forceinline__ bool lacks_one(const uint4& words);
template <> __device__ __forceinline__ bool lacks_one<float>(const uint4& words) {
  return max(max(words.x, words.y), max(words.z, words.w)) == ~0u;
}
__device__ __forceinline__ unsigned greatest_halves(unsigned a, unsigned b) {
  unsigned greatest;
  asm("max.u16x2 %0, %1, %2;" : "=r"(greatest) : "r"(a), "r"(b));
  return greatest;
}
template <> __device__ __forceinline__ bool lacks_one<IO>(const uint4& words) {
  const unsigned greatest = greatest_halves(greatest_halves(words.x, words.y), greatest_halves(words.z, words.w));
  return greatest >= 0xffff0000u || (greatest & 0xffffu) == 0xffffu;
}

// Without a branch, so that one read need not wait for the one before.
__device__ __forceinline__ void read_if(bool wanted, uint4& words, const void* from) {
  asm volatile("{.reg .pred wanted; setp.ne.u32 wanted, %5, 0; @wanted ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];}"
               : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w) : "l"(from), "r"((unsigned)wanted) : "memory");
}

// Of a whole warp, COUNT times 16 bytes a lane: those at from + offset(i) if they are wanted(i), else zeros.
template <class T, int COUNT, class Offset, class Wanted>
__device__ __forceinline__ void receive(uint4 (&words)[COUNT], const T* from, Offset offset, Wanted wanted) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const unsigned bits = wanted(i) ? ~0u : 0u;
    words[i] = uint4{bits, bits, bits, bits};
  }
  bool lacks;
  do {
    asm volatile("" : "+l"(from));  // or all addresses are kept in registers from layer to layer
#pragma unroll
    for (int i = 0; i < COUNT; ++i) read_if(lacks_one<T>(words[i]), words[i], from + offset(i));
    lacks = false;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) lacks |= lacks_one<T>(words[i]);
  } while (__any_sync(~0u, lacks));
}

// Keeps the order of emptying and filling: a barrier of all blocks, which one warp of each waits at while the others go on.
//
// The others have emptied places (emptied_here: their warps arrive), and read none of these again before all blocks have
// (emptied_everywhere).
struct Keeper {
  BlockBarrier emptied_here, emptied_everywhere;

  __device__ __forceinline__ void make(int warps) { emptied_here.make(warps), emptied_everywhere.make(1); }

  // A warp. arrived: blocks, from -1 on.
  __device__ __forceinline__ void keep(unsigned* arrived, int turns) {
    if (threadIdx.x % 32 > 0) return;
    for (int turn = 0; turn < turns; ++turn) {
      emptied_here.await(turn & 1);
      asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrived) : "memory");
      const unsigned all = gridDim.x * (turn + 1);
      unsigned count;
      do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(arrived) : "memory");
      while (count + 1 < all);
      emptied_everywhere.arrive();
    }
  }
};
