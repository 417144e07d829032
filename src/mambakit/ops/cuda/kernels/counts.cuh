// How often blocks of a grid that all run at the same time have come to a point, and what they wrote before.
#pragma once
#include "block_barrier.cuh"

// On a line of its own.
struct Count { unsigned count, unused[31]; };

// By one thread, when the others of its block have met it: what they have written is there for who waits.
__device__ __forceinline__ void count_up(Count& count) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(&count.count) : "memory");
}

__device__ __forceinline__ void await_count_alone(const Count& count, unsigned wanted) {
  unsigned found;
  do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(&count.count) : "memory");
  while (found < wanted);
}

// A whole warp.
__device__ __forceinline__ void await_count(const Count& count, unsigned wanted) {
  if (threadIdx.x % 32 == 0) await_count_alone(count, wanted);
  __syncwarp();
}

// What has been waited for is seen by copies that begin now.
__device__ __forceinline__ void fence_for_copies() { asm volatile("fence.proxy.async;" ::: "memory"); }

// What others write: past the first-level cache.
__device__ __forceinline__ float read_fresh(const float* from) {
  float x;
  asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(x) : "l"(from) : "memory");
  return x;
}
__device__ __forceinline__ float2 read_fresh(const float2* from) {
  float2 x;
  asm volatile("ld.relaxed.gpu.global.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "l"(from) : "memory");
  return x;
}
__device__ __forceinline__ uint4 read_fresh(const uint4* from) {
  uint4 x;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(from) : "memory");
  return x;
}
