// The product of `product.cuh` for a few rows of x, in the time that it takes to read the matrix.
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
constexpr int NEIGHBOURS = 1;  // rows of W that an end takes
constexpr int VALUES = ROWS * BATCH;
constexpr int EACH = 32 / VALUES;      // lanes that have the same sum
constexpr int GROUPS = WARPS / SPLIT;  // of a block, with ROWS rows of W each
constexpr int BLOCKS = 16 / WARPS;     // whose registers fit into a multiprocessor together: 128 a thread

#define PRODUCT_KERNEL extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)

// The sum that a lane has in the end.
struct Place {
  int group, piece;   // of this warp: which rows of the block, which part of k
  int64 first, row;   // the warp's first row of W, and this lane's
  int64 first_batch, batch_row;  // the block's first row of x, and this lane's
  int batch;          // rows of x that the block has
  bool leads;         // whether the sum exists, and this lane, of those that have it, is to write it

  __device__ __forceinline__ Place(int64 rows, int64 all_batch) {
    const int warp = threadIdx.x / 32, value = threadIdx.x % 32 / EACH;
    group = warp / SPLIT, piece = warp % SPLIT;
    first = ((int64)blockIdx.x * GROUPS + group) * ROWS, first_batch = (int64)blockIdx.y * BATCH;
    row = first + value / BATCH, batch_row = first_batch + value % BATCH;
    batch = (int)min((int64)BATCH, all_batch - first_batch);
    leads = row < rows && batch_row < all_batch && piece == 0 && threadIdx.x % EACH == 0;
  }
};

struct Product : Place {
  Weights<32 * SPLIT> weights;
  const X* x = nullptr;
  int x_row = 0;

  __device__ __forceinline__ Product(const IO* matrix, int64 rows, int columns, int64 all_batch)
      : Place(rows, all_batch), weights(matrix, first, rows, columns, threadIdx.x % (32 * SPLIT)) {}

  __device__ __forceinline__ void read(const X* from, int stride) { x = from + first_batch * stride, x_row = stride; }

  template <class Do> __device__ __forceinline__ void each(Do do_for) const {
    if (leads) do_for(row, batch_row);
  }

  template <class Make, class Find>
  __device__ __forceinline__ void finish(Make make, const float* scales, Find find) {
    find();
    auto end = make(row, batch_row);
    float sum[] = {begin_and_multiply(end, scales)};
    if (leads) end.end(sum);
  }

  // As `finish`; and the sums of squares of what the ends make of the sums, of each row of x over the rows of W of the block: over
  // the rows of a warp, then over the groups, pairs of neighbours, then pairs of these, and so on, so that it makes no
  // difference how many rows a warp has.
  template <class Make> __device__ __forceinline__ void finish_with_squares(Make make, float* squares) {
    auto end = make(row, batch_row);
    float value[] = {begin_and_multiply(end, nullptr)};
    if (leads) end.end(value);
    float square = leads ? __fmul_rn(value[0], value[0]) : 0.0f;  // not to be joined with an addition for some ROWS only
#pragma unroll
    for (int offset = 32 / ROWS; offset < 32; offset *= 2) square += __shfl_xor_sync(0xffffffffu, square, offset);
    __shared__ float groups[GROUPS][BATCH];
    if (piece == 0 && threadIdx.x % 32 < 32 / ROWS && threadIdx.x % EACH == 0)
      groups[group][threadIdx.x % 32 / EACH] = square;
    __syncthreads();
    if (threadIdx.x >= batch) return;
    float sums[GROUPS];
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) sums[group] = groups[group][threadIdx.x];
#pragma unroll
    for (int half = GROUPS / 2; half > 0; half /= 2)
#pragma unroll
      for (int pair = 0; pair < half; ++pair) sums[pair] = sums[2 * pair] + sums[2 * pair + 1];
    squares[(first_batch + threadIdx.x) * gridDim.x + blockIdx.x] = sums[0];
  }

 private:
  // The sum of this lane, right if it leads.
  template <class End> __device__ __forceinline__ float begin_and_multiply(End& end, const float* scales) {
    if (end.HELD && leads) end.begin();
    float sums[VALUES] = {};
    weights.multiply(sums, x, x_row, batch);
    float sum = sum_over_warp(sums);
    __shared__ float pieces[WARPS][VALUES];
    if (SPLIT > 1 && threadIdx.x % EACH == 0) pieces[threadIdx.x / 32][threadIdx.x % 32 / EACH] = sum;
    __syncthreads();
    if (!leads) return sum;
    if (SPLIT > 1)
#pragma unroll
      for (int piece = 1; piece < SPLIT; ++piece) sum += pieces[group * SPLIT + piece][threadIdx.x % 32 / EACH];
    if (!end.HELD) end.begin();
    return scales == nullptr ? sum : sum * scales[batch_row - first_batch];
  }
};
#endif
