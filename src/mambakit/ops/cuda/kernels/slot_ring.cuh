// A ring of slots of shared memory, through which one warp of a block sends what copies bring, boxes of tensors and rows, to
// the others. It waits for room alone. `ring.cuh` is the same for rows of one kind.
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
