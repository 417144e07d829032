// Sums of 64 rows of x by N rows of a matrix, of a warpgroup (wgmma), in pieces of the widths that instructions have.
#pragma once
#include "tensor_cores.cuh"

// Rows of 128 bytes, turned as boxes are; eights of them follow one another.
__device__ __forceinline__ uint64 described(const char* rows) {
  constexpr uint64 SWIZZLE_128 = 1ull << 62, EIGHTS = (uint64)(1024 / 16) << 32, UNUSED = 1ull << 16;
  return SWIZZLE_128 | EIGHTS | UNUSED | ((unsigned)__cvta_generic_to_shared(rows) >> 4 & 0x3fff);
}

template <int N> struct WarpgroupPieces {
  static constexpr int PIECES = (N + 175) / 176, PIECE = (N + 8 * PIECES - 1) / (8 * PIECES) * 8;
  float sums[PIECE / 2];
  WarpgroupPieces<N - PIECE> rest;

  __device__ __forceinline__ WarpgroupPieces() {  // as `= {}` more than 44 would stay in local memory
#pragma unroll
    for (float& sum : sums) sum = 0.0f;
  }

  __device__ __forceinline__ void add(uint64 x, uint64 w) {
    multiply_add_warpgroup<IO>(sums, x, w);
    rest.add(x, w + PIECE * 8);
  }
  __device__ __forceinline__ void pin() {
#pragma unroll
    for (float& sum : sums) asm volatile("" : "+f"(sum)::"memory");
    rest.pin();
  }
  __device__ __forceinline__ void add(const WarpgroupPieces& other) {
#pragma unroll
    for (int i = 0; i < PIECE / 2; ++i) sums[i] += other.sums[i];
    rest.add(other.rest);
  }
  template <class Do> __device__ __forceinline__ void each(int column, Do do_for) const {
#pragma unroll
    for (int i = 0; i < PIECE / 8; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) do_for(half, column + 8 * i, sums[4 * i + 2 * half], sums[4 * i + 2 * half + 1]);
    rest.each(column + PIECE, do_for);
  }
};
template <> struct WarpgroupPieces<0> {
  __device__ __forceinline__ void add(uint64, uint64) {}
  __device__ __forceinline__ void pin() {}
  __device__ __forceinline__ void add(const WarpgroupPieces&) {}
  template <class Do> __device__ __forceinline__ void each(int, Do) const {}
};

template <int N> struct WarpgroupSums {
  WarpgroupPieces<N> pieces;

  // 64 numbers along k; until `await` nobody may write to the factors.
  __device__ __forceinline__ void multiply(const char* x, const char* w) {
    const uint64 x_at = described(x), w_at = described(w);
    pieces.pin();
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int k = 0; k < 4; ++k) pieces.add(x_at + 2 * k, w_at + 2 * k);  // 16 numbers; addresses are in units of 16 bytes
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  }
  // All products but for the last `PENDING`.
  template <int PENDING> __device__ __forceinline__ void await() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
    pieces.pin();
  }
  __device__ __forceinline__ void add(const WarpgroupSums& other) { pieces.add(other.pieces); }

  // do_for(which half of sixteen rows, first of eight columns, two sums of a lane)
  template <class Do> __device__ __forceinline__ void each(Do do_for) const { pieces.each(0, do_for); }
};
