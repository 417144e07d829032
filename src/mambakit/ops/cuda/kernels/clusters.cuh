// Clusters: blocks that run at the same time and read one another's shared memory (from compute capability 9.0 on).
#pragma once
#include "vectors.cuh"

// Of this block in its cluster.
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// A barrier in two halves: what was written before the first, by any thread of the cluster, is there after the second. One
// that has nothing written need not wait for what is on its way.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_arrive_unwritten() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// What the block of that rank has where this one has `own`. To be read between two barriers of the cluster; several reads
// are under way together, since they are ordered by these alone.
template <int COUNT> __device__ __forceinline__ Vector<float, COUNT> read_of_block(const float* own, unsigned rank) {
  unsigned at;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"((unsigned)__cvta_generic_to_shared(own)), "r"(rank));
  Vector<float, COUNT> x;
  if constexpr (COUNT == 4)
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.items[0]), "=f"(x.items[1]), "=f"(x.items[2]), "=f"(x.items[3]) : "r"(at));
  else
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
      asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x.items[i]) : "r"(at + i * 4));
  return x;
}
