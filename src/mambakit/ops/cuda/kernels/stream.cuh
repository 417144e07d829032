// A ring of slots of shared memory, through which one warp of a block sends what copies bring, boxes of tensors and rows, to
// the others. It waits for room alone. See `ring.cuh`.
#pragma once
#include "block_barrier.cuh"

// full: the copies have arrived. empty: all takers have released the slot.
template <int COUNT> struct RingBarriers {
  BlockBarrier full[COUNT], empty[COUNT];

  __device__ __forceinline__ void make(int takers) {
    for (int i = 0; i < COUNT; ++i) full[i].make(1), empty[i].make(takers);
  }
};

template <int COUNT, int BYTES> struct Ring {
  char* memory;
  RingBarriers<COUNT>& barriers;
  int slot = 0;
  unsigned turn = 0;  // parity

  __device__ __forceinline__ Ring(char* memory, RingBarriers<COUNT>& barriers) : memory(memory), barriers(barriers) {}

 protected:
  __device__ __forceinline__ void advance() {
    if (++slot == COUNT) slot = 0, turn ^= 1;
  }
};

// A whole warp.
template <int COUNT, int BYTES> struct Sender : Ring<COUNT, BYTES> {
  const int in_flight;  // slots that may be on their way
  int sent = 0;

  __device__ __forceinline__ Sender(char* memory, RingBarriers<COUNT>& barriers, int in_flight)
      : Ring<COUNT, BYTES>(memory, barriers), in_flight(in_flight) {}

  // One slot: do_copy(its barrier, its memory) copies so many bytes.
  template <class Copy> __device__ __forceinline__ void send(int bytes, Copy do_copy) {
    const int slot = this->slot;
    const unsigned turn = this->turn;
    this->barriers.empty[slot].await(turn ^ 1);  // at once in the first turn
    if (in_flight < COUNT && sent++ >= in_flight) {
      const bool is_of_last_turn = slot < in_flight;
      this->barriers.full[is_of_last_turn ? slot + COUNT - in_flight : slot - in_flight].await(turn ^ is_of_last_turn);
    }
    BlockBarrier& full = this->barriers.full[slot];
    if (threadIdx.x % 32 == 0) full.arrive_for(bytes);
    __syncwarp();
    do_copy(full, this->memory + slot * BYTES);
    this->advance();
  }
};

// Every warp of those that take, each by itself. It may have several slots, and releases the oldest.
template <int COUNT, int BYTES> struct Taker : Ring<COUNT, BYTES> {
  using Ring<COUNT, BYTES>::Ring;
  int oldest = 0;

  __device__ __forceinline__ char* await_slot() {
    this->barriers.full[this->slot].await(this->turn);
    char* const memory = this->memory + this->slot * BYTES;
    this->advance();
    return memory;
  }

  __device__ __forceinline__ void release() {
    __syncwarp();
    if (threadIdx.x % 32 == 0) this->barriers.empty[oldest].arrive();
    if (++oldest == COUNT) oldest = 0;
  }
};

// What blocks of a grid that all run at the same time tell one another: how many have come so far. To be called by one
// thread, when the others of its block have met it.
__device__ __forceinline__ void count_up(unsigned* count) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(count) : "memory");
}
__device__ __forceinline__ void await_count_alone(const unsigned* count, unsigned wanted) {
  unsigned found;
  SPINS_BEGIN
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(count) : "memory");
    SPINS_CHECK
  } while (found < wanted);
}
// A whole warp.
__device__ __forceinline__ void await_count(const unsigned* count, unsigned wanted) {
#ifndef NO_COUNTS
  if (threadIdx.x % 32 == 0) await_count_alone(count, wanted);
  __syncwarp();
#endif
}
// What others have written, and have been waited for, is seen by copies that begin now.
__device__ __forceinline__ void fence_for_copies() { asm volatile("fence.proxy.async;" ::: "memory"); }

// What others write: past the first-level cache.
__device__ __forceinline__ float read_fresh(const float* from) {
  float x;
  asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(x) : "l"(from) : "memory");
  return x;
}
__device__ __forceinline__ uint4 read_fresh(const uint4* from) {
  uint4 x;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(from) : "memory");
  return x;
}

// From shared memory, which may be written again after `await_reading`. By a thread, after a fence of those that wrote.
__device__ __forceinline__ void copy_back(void* to, const void* from, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(address_of(from)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void await_reading() {
  asm volatile("cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;" ::: "memory");
}
