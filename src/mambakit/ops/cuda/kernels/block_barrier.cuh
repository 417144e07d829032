// Barriers in shared memory, at which some wait and others arrive (mbarrier, from compute capability 9.0 on). Its turns are told
// apart by their parity: the first one has 0.
#pragma once
#include "numbers.cuh"

__device__ __forceinline__ unsigned address_of(const void* shared) { return (unsigned)__cvta_generic_to_shared(shared); }

// The same place in the shared memory of another block of the cluster.
__device__ __forceinline__ unsigned address_in(const void* shared, unsigned rank) {
  unsigned at;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(address_of(shared)), "r"(rank));
  return at;
}

// How a tensor lies in memory, as the driver encodes it.
struct alignas(64) TensorMap { char bytes[128]; };

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

  __device__ __forceinline__ void copy(char* to, const void* from, int bytes) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(address_of(to)), "l"(from), "r"(bytes), "r"(address_of(this)) : "memory");
  }
  // A box of a tensor in two dimensions, from this number of this row on.
  __device__ __forceinline__ void copy_box(char* to, const TensorMap& map, int number, int row) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 ::"r"(address_of(to)), "l"(&map), "r"(number), "r"(row), "r"(address_of(this)) : "memory");
  }

  __device__ __forceinline__ void copy_box(char* to, const TensorMap& map, int number, int row, int matrix) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];"
                 ::"r"(address_of(to)), "l"(&map), "r"(number), "r"(row), "r"(matrix), "r"(address_of(this)) : "memory");
  }

  // The barrier at the same place of another block of the cluster; what this thread wrote there may come later.
  __device__ __forceinline__ void arrive_at(unsigned rank) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address_in(this, rank)) : "memory");
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

// Numbers to the shared memory of a block of the cluster, of which a barrier there hears as of a copy.
__device__ __forceinline__ void write_async(unsigned to, float first, float second, unsigned barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];"
               ::"r"(to), "f"(first), "f"(second), "r"(barrier) : "memory");
}
__device__ __forceinline__ void write_async(unsigned to, float a, float b, float c, float d, unsigned barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
               ::"r"(to), "f"(a), "f"(b), "f"(c), "f"(d), "r"(barrier) : "memory");
}
