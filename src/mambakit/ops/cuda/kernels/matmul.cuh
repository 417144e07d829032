// The product of `product.cuh` for up to 64 rows of x, on tensor cores, in the time that it takes to read the matrix.
//
// A block has TILE rows of W. They and x come through shared memory, STEPS pieces of 32 numbers along k at a time, which holds
// STAGES of these. Every block needs all of x, which comes from the second-level cache: so the CLUSTER blocks of a cluster
// share rows of W, each has a part of k and of x, and reads the others' sums from their shared memory.
//
// A tensor core adds in the order of k; then warps, then blocks are added in a fixed order. Neither BATCH nor TILE, STAGES or
// STEPS has a part in it; sums of squares are those of a block's rows of W.
//
// IO: type of W, two bytes. X: type of x; float is scaled and rounded to IO before the product. BATCH: a multiple of 8 and of
// CLUSTER, not less than the rows of x. TILE: a multiple of 32. NEIGHBOURS: rows of W that an end takes, 1, 2 or 4, a divisor
// of their number. WARPGROUPS: if defined, so many multiply together; see `matmul_warpgroups.cuh`, else `matmul_warps.cuh`. W
// and the rows of x start at 16 bytes.
#pragma once
#include "clusters.cuh"
#include "decode_norm.cuh"
#include "overlap.cuh"
#include "tensor_cores.cuh"
#ifdef WARPGROUPS
#include "matmul_warpgroups.cuh"
#else
#include "matmul_warps.cuh"
#endif

constexpr int SHARE = BATCH / CLUSTER;            // rows of x that a block ends
constexpr int WIDTH = TILE / NEIGHBOURS;          // ends of a row of x
constexpr int AT_ONCE = 8 / NEIGHBOURS;           // ends of a thread whose reads are under way together

#define PRODUCT_KERNEL \
  extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, THREADS <= 256 ? 2 : 1)

struct Product {
  int64 first;                 // row of W of this block
  int tile, rows, batch;       // which rows of W; how many of them exist, and how many rows of x
  int rank, begin, count;      // which part of k
  static constexpr int first_batch = 0;

  __device__ __forceinline__ Product(const IO* matrix, int64 all_rows, int columns, int64 batch) : batch((int)batch) {
    warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);  // the same in all lanes, as the compiler then knows
    tile = blockIdx.x / CLUSTER, rank = CLUSTER > 1 ? cluster_rank() : 0;
    first = (int64)tile * TILE, rows = (int)min((int64)TILE, all_rows - first);
    const int pieces = (columns + PIECE - 1) / PIECE, each = (pieces + CLUSTER - 1) / CLUSTER * PIECE;
    begin = rank * each, count = min(columns - begin, each);
    weights = {matrix + first * columns + begin, columns, rows, count, warp};
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage) weights.fetch(stage_memory(stage), stage);
  }

  __device__ __forceinline__ void read(const X* from, int stride) {
    x = {from + begin, stride, batch, count, warp};
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage) {
      x.fetch(stage_memory(stage) + W_BYTES, stage);
      commit_copies();
    }
  }

  // Calls do_for(row, b) for every end of this thread.
  template <class Do> __device__ __forceinline__ void each(Do do_for) const {
    for (int place = threadIdx.x; place < SHARE * WIDTH; place += THREADS) {
      const Place at(*this, place);
      if (at.exists) do_for(first + at.m, (int64)at.b);
    }
  }

  template <class Make, class Find>
  __device__ __forceinline__ void finish(Make make, const float* scales, Find find) {
    if (SCALES_FIRST) find();
    multiply(scales);
    end_all<false>(make, scales, find);
    leave();
  }

  // As `finish`; and the sums of squares of what the ends make of the sums, of each row of x over the rows of W of the block.
  template <class Make> __device__ __forceinline__ void finish_with_squares(Make make, float* squares) {
    multiply(nullptr);
    end_all<true>(make, nullptr, [] {});
    __syncthreads();
    const int lane = threadIdx.x % 32;
    for (int n = warp; n < SHARE && rank * SHARE + n < batch; n += WARPS) {
      float sum = 0.0f;
      for (int m = lane; m < TILE; m += 32) sum += sums_at(rank * SHARE + n, m);
      sum = sum_of_all_lanes(sum);
      if (lane == 0) squares[(int64)(rank * SHARE + n) * (gridDim.x / CLUSTER) + tile] = sum;
    }
    leave();
  }

 private:
  int warp;
  Fetcher<TILE, IO> weights;
  Fetcher<X_ROWS, X> x;

  // The row of W in the block and the row of x of an end. One that does not exist has those of one that does, so that
  // nothing has to be asked before it is read.
  struct Place {
    int m, b;
    bool exists;

    __device__ __forceinline__ Place(const Product& of, int place) {
      m = place % WIDTH * NEIGHBOURS, b = of.rank * SHARE + place / WIDTH;
      exists = place < SHARE * WIDTH && m < of.rows && b < of.batch;
      if (!exists) m = b = 0;
    }
  };

  __device__ __forceinline__ static char* stage_memory(int stage) {
    return shared_memory() + stage % STAGES * (W_BYTES + X_BYTES);
  }

  // The sums of this block's part of k, to shared memory.
  __device__ __forceinline__ void multiply(const float* scales) {
    const int stages = (max(count, 0) + STEPS * PIECE - 1) / (STEPS * PIECE);
    Sums sums(warp);
    for (int stage = 0; stage < stages; ++stage) {
      await_copies<STAGES - 2>();
      sums.make_visible();
      __syncthreads();
      const char* const memory = stage_memory(stage);
      sums.begin(memory);
      if (const int next = stage + STAGES - 1; next < stages) {
        weights.fetch(stage_memory(next), next);
        x.fetch(stage_memory(next) + W_BYTES, next);
      }
      commit_copies();
      sums.end(memory, scales);
    }
    await_copies<0>();
    __syncthreads();
    sums.put();
  }

  // The sums of the cluster, for SHARE rows of x; their squares, if wanted, take the place of the sums of this block.
  template <bool SQUARES, class Make, class Find>
  __device__ __forceinline__ void end_all(Make make, const float* scales, Find find) const {
    for (int start = 0; start < SHARE * WIDTH; start += AT_ONCE * THREADS) {
      const auto place = [&](int i) { return Place(*this, start + i * THREADS + threadIdx.x); };
      decltype(make(0, 0)) ends[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        ends[i] = make(first + place(i).m, (int64)place(i).b);
        ends[i].begin();
      }
      if (start == 0) {  // All that is read has been asked for when the cluster meets.
        if (!SCALES_FIRST) find();
        if (CLUSTER > 1) cluster_arrive(), cluster_wait();
        else __syncthreads();
      }
      Vector<float, NEIGHBOURS> parts[AT_ONCE][CLUSTER];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        const Place at = place(i);
        const float* const own = &sums_at(at.b, at.exists ? at.m : TILE);  // beside the sums, where nobody writes
#pragma unroll
        for (int block = 0; block < CLUSTER; ++block)
          // What is not used may be read after another block has gone: only of this one.
          parts[i][block] =
              CLUSTER > 1 ? read_of_block<NEIGHBOURS>(own, at.exists ? block : rank) : ::read<NEIGHBOURS>(own);
      }
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        const Place at = place(i);
        const float scale = scales == nullptr || SCALES_FIRST ? 1.0f : scales[at.b];
        float sums[NEIGHBOURS];
#pragma unroll
        for (int j = 0; j < NEIGHBOURS; ++j) {
          sums[j] = parts[i][0].items[j];
#pragma unroll
          for (int block = 1; block < CLUSTER; ++block) sums[j] += parts[i][block].items[j];
          sums[j] *= scale;
        }
        if (!at.exists) continue;
        ends[i].end(sums);
        if constexpr (SQUARES) {
#pragma unroll
          for (int j = 0; j < NEIGHBOURS; ++j) sums[j] *= sums[j];
          write(&sums_at(at.b, at.m), sums);
        }
      }
    }
  }

  // A block's memory has to stay until all of the cluster have read it.
  __device__ __forceinline__ static void leave() {
    if (CLUSTER > 1) cluster_arrive_unwritten(), cluster_wait();
  }
};
