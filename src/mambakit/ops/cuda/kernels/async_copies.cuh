// Copies from memory to shared memory that need no registers on their way.
#pragma once

// 16 bytes, or as many zeros.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool exists) {
  const unsigned at = (unsigned)__cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(exists ? 16 : 0) : "memory");
}

// 4, 8 or 16 bytes that the thread itself takes; fewer, of which there is no such copy, it waits for.
template <int BYTES> __device__ __forceinline__ void copy_own(void* to, const void* from) {
  const unsigned at = (unsigned)__cvta_generic_to_shared(to);
  if constexpr (BYTES == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
  else if constexpr (BYTES >= 4)
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(at), "l"(from), "n"(BYTES) : "memory");
  else *static_cast<unsigned short*>(to) = *static_cast<const unsigned short*>(from);
}

// What this thread has begun to copy since the last call becomes one group.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// All groups of this thread have arrived but for the last `PENDING`.
template <int PENDING> __device__ __forceinline__ void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
