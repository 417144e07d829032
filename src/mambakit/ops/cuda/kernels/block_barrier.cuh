// Barriers in shared memory, at which some wait and others arrive (mbarrier, from compute capability 9.0 on). Its turns are told
// apart by their parity: the first one has 0.
#pragma once
#include "numbers.cuh"

__device__ __forceinline__ unsigned address_of(const void* shared) { return (unsigned)__cvta_generic_to_shared(shared); }

struct BlockBarrier {
  uint64 word;

  // By one thread, before `publish` and a barrier of the block.
  __device__ __forceinline__ void make(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address_of(this)), "r"(arrivals) : "memory");
  }
  __device__ __forceinline__ static void publish() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

  __device__ __forceinline__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address_of(this)) : "memory");
  }

  // And so many bytes have to be copied before the turn ends.
  __device__ __forceinline__ void arrive_for(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address_of(this)), "r"(bytes) : "memory");
  }

  // A copy of which the barrier hears, without registers. BYTES: a multiple of 16, as both addresses are.
  template <int BYTES> __device__ __forceinline__ void copy(char* to, const void* from) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(address_of(to)), "l"(from), "n"(BYTES), "r"(address_of(this)) : "memory");
  }

  // That a turn of this parity has ended.
  __device__ __forceinline__ void await(unsigned parity) const {
    unsigned done;
    do {
      asm volatile("{.reg .pred done; mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2; selp.b32 %0, 1, 0, done;}"
                   : "=r"(done) : "r"(address_of(this)), "r"(parity) : "memory");
    } while (!done);
  }
};
