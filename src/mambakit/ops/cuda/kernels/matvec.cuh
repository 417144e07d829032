// Products of a few rows with a matrix, in the time that it takes to read the matrix: sums[o][b] = sum_k W[o][k] x[b][k].
//
// A warp has ROWS rows of W, and SPLIT warps share them along k. Each number of W is read once, past the first-level cache,
// DEPTH accesses ahead, and meets BATCH rows of x, which stay in that cache.
//
// A lane adds in the order of k; then lanes, then warps are added in a fixed order. Neither BATCH nor ROWS nor DEPTH has a
// part in it, so a row of the result is the same, bit for bit, whatever else is in the batch.
//
// IO: type of W. X: type of x. LANES: neighbouring numbers of an access, a divisor of K and of the stride of x.
// WARPS: of a block, SPLIT times a power of two. ROWS * BATCH: a power of two up to 32.
#pragma once
#include "overlap.cuh"
#include "vectors.cuh"

// Read once and by nobody else: not kept in the first-level cache.
template <int COUNT, class T> __device__ __forceinline__ Vector<T, COUNT> stream(const T* from) {
  Vector<T, COUNT> packed;
  if constexpr (sizeof(packed) == 16) {
    uint4 words;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w) : "l"(from));
    packed = reinterpret_cast<Vector<T, COUNT>&>(words);
  } else {
    packed = read<COUNT>(from);
  }
  return packed;
}

// ROWS rows of W, on their way to SHARING lanes. The reading begins at once; `multiply` goes on with it.
template <int SHARING> struct Weights {
  static constexpr int STEP = SHARING * LANES;
  const IO* at[ROWS];
  int first, columns;
  Vector<IO, LANES> held[DEPTH][ROWS];

  // Row `row` and those after it; past the last one it is read again.
  __device__ __forceinline__ Weights(const IO* weight, int64 row, int64 rows, int columns, int lane)
      : first(lane * LANES), columns(columns) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) at[r] = weight + min(row + r, rows - 1) * columns;
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) fetch(d, first + d * STEP);
  }

  __device__ __forceinline__ void fetch(int d, int k) {
    if (k >= columns) return;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) held[d][r] = stream<LANES>(at[r] + k);
  }

  // Adds this lane's part of the products with `batch` rows of x; what is past these is not to be used.
  __device__ __forceinline__ void multiply(float (&sums)[ROWS * BATCH], const X* x, int x_row, int batch) {
    for (int begin = first; begin < columns; begin += DEPTH * STEP)
#pragma unroll
      for (int d = 0; d < DEPTH; ++d) {
        const int k = begin + d * STEP;
        if (k >= columns) break;
        float w[ROWS][LANES];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) unpack(w[r], held[d][r]);
        fetch(d, k + DEPTH * STEP);
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
          float v[LANES];
          unpack(v, read<LANES>(x + min(b, batch - 1) * x_row + k));
#pragma unroll
          for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int i = 0; i < LANES; ++i) sums[r * BATCH + b] = fmaf(w[r][i], v[i], sums[r * BATCH + b]);
        }
      }
  }
};

// The sums of COUNT values over the warp: lane l returns that of values[l / (32 / COUNT)].
template <int COUNT, int OFFSET = 16> __device__ __forceinline__ float sum_over_warp(const float (&values)[COUNT]) {
  if constexpr (COUNT == 1) {
    float sum = values[0];
#pragma unroll
    for (int offset = OFFSET; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    return sum;
  } else {
    constexpr int HALF = COUNT / 2;
    const bool upper = threadIdx.x & OFFSET;  // keeps the upper half of the values, and gives the lower one away
    float kept[HALF];
#pragma unroll
    for (int i = 0; i < HALF; ++i) {
      const float given = upper ? values[i] : values[i + HALF];
      kept[i] = (upper ? values[i + HALF] : values[i]) + __shfl_xor_sync(0xffffffffu, given, OFFSET);
    }
    return sum_over_warp<HALF, OFFSET / 2>(kept);
  }
}

#ifdef SPLIT  // A product by whole warps.
constexpr int VALUES = ROWS * BATCH;
constexpr int EACH = 32 / VALUES;      // lanes that have the same sum
constexpr int GROUPS = WARPS / SPLIT;  // of a block, with ROWS rows of W each
constexpr int BLOCKS = 16 / WARPS;     // whose registers fit into a multiprocessor together: 128 a thread

// The sum that a lane has in the end.
struct Place {
  int group, piece;   // of this warp: which rows of the block, which part of k
  int64 first, row;   // the warp's first row of W, and this lane's
  int64 first_batch, batch_row;  // the block's first row of x, and this lane's
  int batch;          // rows of x that the block has
  bool exists;        // whether there is such a sum
  bool leads;         // whether this lane, of those that have the sum, is to write it

  __device__ __forceinline__ Place(int64 rows, int64 all_batch) {
    const int warp = threadIdx.x / 32, value = threadIdx.x % 32 / EACH;
    group = warp / SPLIT, piece = warp % SPLIT;
    first = ((int64)blockIdx.x * GROUPS + group) * ROWS, first_batch = (int64)blockIdx.y * BATCH;
    row = first + value / BATCH, batch_row = first_batch + value % BATCH;
    batch = (int)min((int64)BATCH, all_batch - first_batch);
    exists = row < rows && batch_row < all_batch;
    leads = exists && piece == 0 && threadIdx.x % EACH == 0;
  }
};

typedef Weights<32 * SPLIT> BlockWeights;

__device__ __forceinline__ BlockWeights weights_of(const IO* weight, const Place& place, int64 rows, int columns) {
  return BlockWeights(weight, place.first, rows, columns, threadIdx.x % (32 * SPLIT));
}

// This lane's sum; right in the first warp of each group. All threads of the block meet here.
__device__ __forceinline__ float product(BlockWeights& weights, const Place& place, const X* x, int x_row) {
  float sums[VALUES] = {};
  weights.multiply(sums, x + place.first_batch * x_row, x_row, place.batch);
  float sum = sum_over_warp(sums);
  __shared__ float pieces[WARPS][VALUES];
  if (SPLIT > 1 && threadIdx.x % EACH == 0) pieces[threadIdx.x / 32][threadIdx.x % 32 / EACH] = sum;
  __syncthreads();
  if (SPLIT > 1 && place.piece == 0)
#pragma unroll
    for (int piece = 1; piece < SPLIT; ++piece) sum += pieces[place.group * SPLIT + piece][threadIdx.x % 32 / EACH];
  return sum;
}
#endif
