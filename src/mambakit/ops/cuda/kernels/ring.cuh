// A ring of slots in shared memory, through which one warp of a block sends rows of matrices to the others: bulk copies, which
// take no registers and hardly an instruction, and which go on while the others wait for something else.
//
// A slot holds rows, or parts of rows, with a gap between neighbours so that a warp can read eight rows at a time without two
// of them in the same banks. Sender and takers go through the slots in the same order.
//
// SLOTS: of the ring. IN_FLIGHT: bytes that may be on their way at the same time. More keep the memory no busier, but what
// the takers then read by themselves waits longer behind them. SLOT: bytes of a slot.
#pragma once
#include "block_barrier.cuh"

constexpr int GAP = 64;  // bytes

// full: the copies have arrived. empty: all takers have released the slot.
struct RingBarriers {
  BlockBarrier full[SLOTS], empty[SLOTS];
  int bytes[SLOTS];  // that were sent last
};

struct Ring {
  char* memory;
  RingBarriers& barriers;
  int slot = 0;
  unsigned turn = 0;  // parity

  __device__ __forceinline__ Ring(char* memory, RingBarriers& barriers) : memory(memory), barriers(barriers) {}

  __device__ __forceinline__ static void make(RingBarriers& barriers, int takers) {
    for (int i = 0; i < SLOTS; ++i) barriers.full[i].make(1), barriers.empty[i].make(takers);
  }

  __device__ __forceinline__ void advance() {
    if (++slot == SLOTS) slot = 0, turn ^= 1;
  }
};

// A whole warp.
struct Sender : Ring {
  Ring oldest;  // slot of those on their way
  int in_flight = 0;  // bytes

  __device__ __forceinline__ Sender(char* memory, RingBarriers& barriers) : Ring(memory, barriers), oldest(memory, barriers) {}

  // One slot: LENGTH numbers of each of `rows` rows.
  template <int LENGTH> __device__ __forceinline__ void send(const IO* from, int rows, int64 stride) {
    constexpr int BYTES = LENGTH * sizeof(IO);
    barriers.empty[slot].await(turn ^ 1);  // at once in the first turn
    while (in_flight > 0 && (in_flight + rows * BYTES > IN_FLIGHT || oldest.slot == slot)) {
      barriers.full[oldest.slot].await(oldest.turn);
      in_flight -= barriers.bytes[oldest.slot];
      oldest.advance();
    }
    BlockBarrier& full = barriers.full[slot];
    const int lane = threadIdx.x % 32;
    if (lane == 0) full.arrive_for(rows * BYTES), barriers.bytes[slot] = rows * BYTES;
    __syncwarp();
    for (int row = lane; row < rows; row += 32)
      full.copy<BYTES>(memory + slot * SLOT + row * (BYTES + GAP), from + row * stride);
    in_flight += rows * BYTES;
    advance();
  }

  // A matrix, eight rows and LENGTH columns a slot.
  template <int LENGTH, int COLUMNS> __device__ __forceinline__ void send_eights(const IO* from, int rows) {
    for (int row = 0; row < rows; row += 8)
      for (int k = 0; k < COLUMNS; k += LENGTH)
        send<LENGTH>(from + (int64)row * COLUMNS + k, min(8, rows - row), COLUMNS);
  }
};

// Every warp of those that take, each by itself.
struct Taker : Ring {
  using Ring::Ring;

  __device__ __forceinline__ const char* await_slot() const {
    barriers.full[slot].await(turn);
    return memory + slot * SLOT;
  }

  __device__ __forceinline__ void release() {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barriers.empty[slot].arrive();
    advance();
  }
};
