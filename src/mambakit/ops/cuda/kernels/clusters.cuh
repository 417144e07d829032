// Clusters: blocks that run at the same time and read one another's shared memory (from compute capability 9.0 on).
#pragma once

// Of this block in its cluster.
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// A barrier in two halves: what was written before the first, by any thread of the cluster, is there after the second.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// What the block of that rank has where this one has `own`.
__device__ __forceinline__ float read_of_block(const float* own, unsigned rank) {
  unsigned at = (unsigned)__cvta_generic_to_shared(own);
  float value;
  asm volatile("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(at) : "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(at) : "memory");
  return value;
}
