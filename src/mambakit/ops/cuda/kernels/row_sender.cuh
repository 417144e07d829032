// Rows of matrices through a ring, with a gap between neighbours so that a warp can read eight rows at a time without two of them
// in the same banks.
//
// SLOTS: of the ring. IN_FLIGHT: bytes that may be on their way at the same time. SLOT: bytes of a slot.
#pragma once
#include "ring.cuh"

constexpr int GAP = 64;  // bytes

struct RowSender : Sender<SLOTS, SLOT, IN_FLIGHT> {
  using Sender::Sender;

  // One slot: LENGTH numbers of each of `rows` rows.
  template <int LENGTH> __device__ __forceinline__ void send_rows(const IO* from, int rows, int64 stride) {
    constexpr int BYTES = LENGTH * sizeof(IO);
    send(rows * BYTES, [&](BlockBarrier& full, char* to) {
      for (int row = threadIdx.x % 32; row < rows; row += 32)
        full.copy<BYTES>(to + row * (BYTES + GAP), from + row * stride);
    });
  }

  // A matrix, eight rows and LENGTH columns a slot.
  template <int LENGTH, int COLUMNS> __device__ __forceinline__ void send_eights(const IO* from, int rows) {
    for (int row = 0; row < rows; row += 8)
      for (int k = 0; k < COLUMNS; k += LENGTH)
        send_rows<LENGTH>(from + (int64)row * COLUMNS + k, min(8, rows - row), COLUMNS);
  }
};
