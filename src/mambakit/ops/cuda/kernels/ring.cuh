// A ring of slots in shared memory, through which one warp of a block sends what others need, weights above all: bulk copies,
// which take no registers and hardly an instruction, and which go on while the others wait for something else.
//
// Sender and takers go through the slots in the same order.
#pragma once
#include "block_barrier.cuh"

// full: the copies have arrived. empty: all takers have released the slot. bytes: that were sent last.
template <int COUNT> struct RingBarriers {
  BlockBarrier full[COUNT], empty[COUNT];
  int bytes[COUNT];

  __device__ __forceinline__ void make(int takers) {
    for (int i = 0; i < COUNT; ++i) full[i].make(1), empty[i].make(takers);
  }
};

// Where one who goes through COUNT slots in their order is.
template <int COUNT> struct Turn {
  int slot = 0;
  unsigned turn = 0;  // parity

  __device__ __forceinline__ void advance() {
    if (++slot == COUNT) slot = 0, turn ^= 1;
  }
};

// COUNT slots of so many BYTES.
template <int COUNT, int BYTES> struct Ring : Turn<COUNT> {
  char* memory;
  RingBarriers<COUNT>& barriers;

  __device__ __forceinline__ Ring(char* memory, RingBarriers<COUNT>& barriers) : memory(memory), barriers(barriers) {}
};

// A whole warp. FLYING: bytes that may be on their way at the same time. More keep the memory no busier, but what the takers then
// read by themselves waits longer behind them.
template <int COUNT, int BYTES, int FLYING> struct Sender : Ring<COUNT, BYTES> {
  Ring<COUNT, BYTES> oldest;  // slot of those on their way
  int in_flight = 0;          // bytes

  __device__ __forceinline__ Sender(char* memory, RingBarriers<COUNT>& barriers)
      : Ring<COUNT, BYTES>(memory, barriers), oldest(memory, barriers) {}

  // One slot: do_copy(its barrier, its memory) copies so many bytes.
  template <class Copy> __device__ __forceinline__ void send(int bytes, Copy do_copy) {
    const int slot = this->slot;
    RingBarriers<COUNT>& barriers = this->barriers;
    barriers.empty[slot].await(this->turn ^ 1);  // at once in the first turn
    while (in_flight > 0 && (in_flight + bytes > FLYING || oldest.slot == slot)) {
      barriers.full[oldest.slot].await(oldest.turn);
      in_flight -= barriers.bytes[oldest.slot];
      oldest.advance();
    }
    __syncwarp();  // all lanes have read the bytes of a slot that is sent anew
    if (threadIdx.x % 32 == 0) barriers.full[slot].arrive_for(bytes), barriers.bytes[slot] = bytes;
    __syncwarp();
    do_copy(barriers.full[slot], this->memory + slot * BYTES);
    in_flight += bytes;
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
