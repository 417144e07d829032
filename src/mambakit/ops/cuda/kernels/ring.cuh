// A ring of slots in shared memory, through which one warp of a block sends what others need, weights above all: bulk copies,
// which take no registers and hardly an instruction, and which go on while the others wait for something else.
//
// Sender and takers go through the slots in the same order.
#pragma once
#include "block_barrier.cuh"

// full: the copies have arrived. empty: all takers have released the slot.
template <int COUNT> struct RingBarriers {
  BlockBarrier full[COUNT], empty[COUNT];

  __device__ __forceinline__ void make(int takers) {
    for (int i = 0; i < COUNT; ++i) full[i].make(1), empty[i].make(takers);
  }
};

// COUNT slots of so many BYTES.
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

// A whole warp. FLYING: slots that may be on their way at the same time. More keep the memory no busier, but what the takers then
// read by themselves waits longer behind them.
template <int COUNT, int BYTES, int FLYING> struct Sender : Ring<COUNT, BYTES> {
  int sent = 0;  // slots
  using Ring<COUNT, BYTES>::Ring;

  // One slot: do_copy(its barrier, its memory) copies so many bytes.
  template <class Copy> __device__ __forceinline__ void send(int bytes, Copy do_copy) {
    const int slot = this->slot;
    const unsigned turn = this->turn;
    this->barriers.empty[slot].await(turn ^ 1);  // at once in the first turn
    if (FLYING < COUNT && sent++ >= FLYING) {
      const bool is_of_last_turn = slot < FLYING;
      this->barriers.full[is_of_last_turn ? slot + COUNT - FLYING : slot - FLYING].await(turn ^ is_of_last_turn);
    }
    BlockBarrier& full = this->barriers.full[slot];
    if (threadIdx.x % 32 == 0) full.arrive_for(bytes);
    __syncwarp();
    do_copy(full, this->memory + slot * BYTES);
    this->advance();
  }
};

// Every warp of those that take, each by itself.
template <int COUNT, int BYTES> struct Taker : Ring<COUNT, BYTES> {
  using Ring<COUNT, BYTES>::Ring;

  __device__ __forceinline__ char* await_slot() const {
    this->barriers.full[this->slot].await(this->turn);
    return this->memory + this->slot * BYTES;
  }

  // The slot after this one, which has not been released.
  __device__ __forceinline__ char* await_next() const {
    const int next = this->slot + 1 == COUNT ? 0 : this->slot + 1;
    this->barriers.full[next].await(this->turn ^ (next == 0));
    return this->memory + next * BYTES;
  }

  __device__ __forceinline__ void release() {
    __syncwarp();
    if (threadIdx.x % 32 == 0) this->barriers.empty[this->slot].arrive();
    this->advance();
  }
};
