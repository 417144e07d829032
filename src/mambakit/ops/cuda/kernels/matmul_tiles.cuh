// What a block of `matmul.cuh` has, and where it is in shared memory: for each stage STEPS pieces of 32 numbers along k, first
// of its TILE rows of W, then of x; afterwards the sums.
//
// In a piece a row has 64 bytes (128 of wide numbers), whose parts of 16 bytes are turned from row to row, so that lanes which
// read the same part of several rows meet different banks. It is the order that warpgroups know as a swizzle of 64 bytes.
#pragma once
#include "vectors.cuh"

#ifdef WARPGROUPS
constexpr int WARPS = 4 * WARPGROUPS, X_ROWS = 64;
#else
constexpr int WARPS = TILE / 32 * WARPS_K, X_ROWS = BATCH;
#endif
constexpr int THREADS = 32 * WARPS;
constexpr int PIECE = 32;                         // numbers along k
constexpr int W_BYTES = STEPS * TILE * PIECE * sizeof(IO), X_BYTES = STEPS * X_ROWS * PIECE * sizeof(X);
constexpr int ALIGNED = 512;                      // eight rows of a piece: the unit in which parts are turned
constexpr bool SCALES_FIRST = sizeof(X) == 4;

__device__ __forceinline__ char* shared_memory() {
  extern __shared__ uint4 memory[];
  const unsigned at = (unsigned)__cvta_generic_to_shared(memory);
  return reinterpret_cast<char*>(memory) + ((at + ALIGNED - 1) / ALIGNED * ALIGNED - at);
}

// Where a part of a row is.
template <class T> __device__ __forceinline__ constexpr int turned(int part, int row) {
  return sizeof(T) == 4 ? part ^ 2 * (row & 3) : part ^ (row >> 1 & 3);
}

// The sum of row m of the block's rows of W and row n of x. Rows lie so that a warp's sums fall into different banks.
__device__ __forceinline__ float& sums_at(int n, int m) {
#ifdef WARPGROUPS
  constexpr int ROW = TILE + 8;
#else
  constexpr int ROW = TILE + 4;
#endif
  return reinterpret_cast<float*>(shared_memory())[n * ROW + m];
}

// Copies the pieces of ROWS rows, of which `rows` exist, 512 bytes a warp at a time; zeros where there is nothing.
template <int ROWS, class T> struct Fetcher {
  static constexpr int EACH = 16 / sizeof(T), PARTS = PIECE / EACH, TOGETHER = 32 / PARTS;
  static constexpr int UNITS = STEPS * ROWS / TOGETHER, TURNS = (UNITS + WARPS - 1) / WARPS;
  const T* at[TURNS];
  int left[TURNS];  // numbers along k from there on
  int warp, to;

  __device__ __forceinline__ Fetcher() {}
  __device__ __forceinline__ Fetcher(const T* from, int stride, int rows, int count, int warp) : warp(warp) {
    const int lane = threadIdx.x % 32, part = lane % PARTS;
    to = warp * 512 + (lane / PARTS * PARTS + turned<T>(part, lane / PARTS)) * 16;
#pragma unroll
    for (int i = 0; i < TURNS; ++i) {
      const int unit = i * WARPS + warp, row = unit % (ROWS / TOGETHER) * TOGETHER + lane / PARTS;
      const int k = unit / (ROWS / TOGETHER) * PIECE + part * EACH;
      const bool exists = unit < UNITS && row < rows;
      at[i] = from + (exists ? row * stride + k : 0), left[i] = exists ? count - k : 0;
    }
  }

  __device__ __forceinline__ void fetch(char* memory, int stage) const {
    const int k = stage * (STEPS * PIECE);
#pragma unroll
    for (int i = 0; i < TURNS; ++i) {
      if (UNITS % WARPS != 0 && i * WARPS + warp >= UNITS) break;
      copy_async(memory + to + i * (WARPS * 512), at[i] + k, k < left[i]);
    }
  }
};
