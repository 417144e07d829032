// The product of `product.cuh` for up to 128 rows of x, on tensor cores, in the time that it takes to read the matrix.
//
// A block has 32 WARPS_M rows of W. They and x come through shared memory, STEPS pieces of 32 numbers along k at a time,
// which holds STAGES of these. A warp multiplies 32 rows of W by one of WARPS_N parts of the BATCH rows of x, and takes every
// WARPS_K-th piece. Every block needs all of x, which comes from the second-level cache: so the CLUSTER blocks of a cluster
// share rows of W, each has a part of k and of x, and reads the others' sums from their shared memory.
//
// In shared memory a piece is a row of 64 bytes (128 of wide numbers), whose parts of 16 bytes are turned from row to row,
// so that lanes which read the same part of several rows meet different banks.
//
// The tensor core adds in the order of k; then warps, then blocks are added in a fixed order. Neither BATCH nor WARPS_M,
// WARPS_N, STAGES or STEPS has a part in it; sums of squares are those of a block's rows of W.
//
// IO: type of W, two bytes. X: type of x; float is scaled and rounded to IO before the product. BATCH: a multiple of
// 8 WARPS_N and of CLUSTER, not less than the rows of x. STEPS: a multiple of WARPS_K. W and the rows of x start at 16 bytes.
// NEIGHBOURS: rows of W that an end takes, 1, 2 or 4, a divisor of their number.
#pragma once
#include "clusters.cuh"
#include "decode_norm.cuh"
#include "overlap.cuh"
#include "tensor_cores.cuh"
#include "vectors.cuh"

constexpr int WARPS = WARPS_M * WARPS_N * WARPS_K, THREADS = 32 * WARPS;
constexpr int TILE = 32 * WARPS_M;                // rows of W of a block
constexpr int PIECE = 32;                         // numbers along k
constexpr int N_TILES = BATCH / WARPS_N / 8;      // eights of rows of x of a warp
constexpr int W_BYTES = STEPS * TILE * PIECE * sizeof(IO), X_BYTES = STEPS * BATCH * PIECE * sizeof(X);
constexpr int SUMS_ROW = TILE + 4;                // so that a warp's sums of a tile fall into different banks
constexpr int SHARE = BATCH / CLUSTER;            // rows of x that a block ends
constexpr int WIDTH = TILE / NEIGHBOURS;          // ends of a row of x
constexpr int AT_ONCE = 8 / NEIGHBOURS;           // ends of a thread whose reads are under way together
constexpr bool SCALES_FIRST = sizeof(X) == 4;

#define PRODUCT_KERNEL \
  extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, THREADS <= 256 ? 2 : 1)

__device__ __forceinline__ char* shared_memory() {
  extern __shared__ uint4 memory[];
  return reinterpret_cast<char*>(memory);
}

// Where a part of a row is.
template <class T> __device__ __forceinline__ constexpr int turned(int part, int row) {
  return sizeof(T) == 4 ? part ^ 2 * (row & 3) : part ^ (row >> 1 & 3);
}

struct Product {
  const IO* weight;
  const X* x = nullptr;
  int64 first;                 // row of W of this block
  int tile, rows, batch;       // which rows of W; how many of them exist, and how many rows of x
  int rank, begin, end;        // which part of k
  static constexpr int first_batch = 0;

  __device__ __forceinline__ Product(const IO* matrix, int64 all_rows, int columns, int64 batch) : batch((int)batch) {
    warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);  // the same in all lanes, as the compiler then knows
    tile = blockIdx.x / CLUSTER, rank = CLUSTER > 1 ? cluster_rank() : 0;
    first = (int64)tile * TILE, rows = (int)min((int64)TILE, all_rows - first);
    const int pieces = (columns + PIECE - 1) / PIECE, each = (pieces + CLUSTER - 1) / CLUSTER * PIECE;
    begin = rank * each, end = min(columns, begin + each);
    weight = matrix + first * columns, w_row = columns;
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage) fetch_weights(stage);
  }

  __device__ __forceinline__ void read(const X* from, int stride) {
    x = from, x_row = stride;
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage) {
      fetch_x(stage);
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

  template <class Make> __device__ __forceinline__ void finish(Make make, const float* scales) {
    multiply(scales);
    end_all<false>(make, scales);
    leave();
  }

  // As `finish`; and the sums of squares of what the ends make of the sums, of each row of x over the rows of W of the block.
  template <class Make> __device__ __forceinline__ void finish(Make make, const float* scales, float* squares) {
    multiply(scales);
    end_all<true>(make, scales);
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
  int warp, w_row, x_row = 0;

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

  __device__ __forceinline__ static float& sums_at(int n, int m) {
    return reinterpret_cast<float*>(shared_memory())[n * SUMS_ROW + m];
  }

  __device__ __forceinline__ static char* stage_memory(int stage) {
    return shared_memory() + stage % STAGES * (W_BYTES + X_BYTES);
  }

  __device__ __forceinline__ void fetch_weights(int stage) const {
    copy<TILE>(stage_memory(stage), weight, w_row, rows, stage);
  }

  __device__ __forceinline__ void fetch_x(int stage) const {
    copy<BATCH>(stage_memory(stage) + W_BYTES, x, x_row, batch, stage);
  }

  // ROWS rows of a stage, piece after piece, 512 bytes a warp at a time; zeros where there is nothing.
  template <int ROWS, class T>
  __device__ __forceinline__ void copy(char* to, const T* from, int stride, int rows, int stage) const {
    constexpr int EACH = 16 / sizeof(T), PARTS = PIECE / EACH, TOGETHER = 32 / PARTS, COUNT = STEPS * ROWS / TOGETHER;
    const int lane = threadIdx.x % 32, part = lane % PARTS;
    to += (lane / PARTS * PARTS + turned<T>(part, lane / PARTS)) * 16;
#pragma unroll
    for (int i = 0; i < (COUNT + WARPS - 1) / WARPS; ++i) {
      const int unit = i * WARPS + warp;
      if (COUNT % WARPS != 0 && unit >= COUNT) break;
      const int row = unit % (ROWS / TOGETHER) * TOGETHER + lane / PARTS;
      const int k = begin + (stage * STEPS + unit / (ROWS / TOGETHER)) * PIECE + part * EACH;
      const bool exists = row < rows && k < end;
      copy_async(to + unit * 512, exists ? from + row * stride + k : from, exists);
    }
  }

  // The sums of this block's part of k, to shared memory; the cluster meets.
  __device__ __forceinline__ void multiply(const float* scales) {
    const int lane = threadIdx.x % 32;
    const int of_k = warp % WARPS_K, of_n = warp / WARPS_K % WARPS_N, of_m = warp / (WARPS_K * WARPS_N);
    const int stages = (max(end - begin, 0) + STEPS * PIECE - 1) / (STEPS * PIECE);
    float sums[2][N_TILES][4] = {};
    for (int stage = 0; stage < stages; ++stage) {
      await_copies<STAGES - 2>();
      __syncthreads();
      if (stage + STAGES - 1 < stages) fetch_weights(stage + STAGES - 1), fetch_x(stage + STAGES - 1);
      commit_copies();
      const char* memory = stage_memory(stage);
#pragma unroll
      for (int step = of_k; step < STEPS; step += WARPS_K)
        multiply_piece(
            sums, memory + (step * TILE + of_m * 32) * PIECE * sizeof(IO),
            memory + W_BYTES + (step * BATCH + of_n * (BATCH / WARPS_N)) * PIECE * sizeof(X),
            scales + of_n * (BATCH / WARPS_N), lane);
    }
    await_copies<0>();
    __syncthreads();
    add_warps(sums, of_k, warp / WARPS_K, lane);
    if (of_k == 0)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int i = 0; i < 4 * N_TILES; ++i) {
          const int n = of_n * (BATCH / WARPS_N) + i / 4 * 8 + lane % 4 * 2 + i % 2;
          sums_at(n, of_m * 32 + half * 16 + i % 4 / 2 * 8 + lane / 4) = sums[half][i / 4][i % 4];
        }
    if (CLUSTER > 1) cluster_arrive(), cluster_wait();
    else __syncthreads();
  }

  // 32 rows of W by the warp's rows of x, over 32 numbers.
  __device__ __forceinline__ static void multiply_piece(
      float (&sums)[2][N_TILES][4], const char* w, const char* x, const float* scales, int lane) {
    const int row = lane % 16, part = turned<IO>(lane / 16, row);
    uint4 a[2][2];
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int step = 0; step < 2; ++step) a[half][step] = read_matrices(w + (half * 16 + row) * 64 + (part ^ 2 * step) * 16);
#pragma unroll
    for (int n = 0; n < N_TILES; ++n) {
      const uint4 b = read_x(x + n * 8 * PIECE * sizeof(X), scales + n * 8, lane);
#pragma unroll
      for (int half = 0; half < 2; ++half) multiply_add<IO>(sums[half][n], a[half][0], b.x, b.y);
#pragma unroll
      for (int half = 0; half < 2; ++half) multiply_add<IO>(sums[half][n], a[half][1], b.z, b.w);
    }
  }

  // A piece of eight rows of x, in words of IO.
  __device__ __forceinline__ static uint4 read_x(const char* x, const float* scales, int lane) {
    if constexpr (SCALES_FIRST) {
      const int row = lane / 4, pair = lane % 4;
      const float scale = scales[row];
      const auto word = [&](int i) {
        const char* at = x + row * 128 + turned<X>(2 * i + pair / 2, row) * 16 + pair % 2 * 8;
        const float2 wide = *reinterpret_cast<const float2*>(at);
        return pack<IO>(wide.x * scale, wide.y * scale);
      };
      return {word(0), word(1), word(2), word(3)};
    } else {
      return read_matrices(x + lane % 8 * 64 + turned<IO>(lane / 8, lane % 8) * 16);
    }
  }

  // The first of WARPS_K warps gets the sums of all.
  __device__ __forceinline__ static void add_warps(float (&sums)[2][N_TILES][4], int of_k, int group, int lane) {
    if (WARPS_K == 1) return;
    float4* const others = reinterpret_cast<float4*>(shared_memory());
    const auto place = [&](int piece, int i) {
      return (((piece - 1) * (WARPS_M * WARPS_N) + group) * (2 * N_TILES) + i) * 32 + lane;
    };
    if (of_k > 0)
#pragma unroll
      for (int i = 0; i < 2 * N_TILES; ++i) {
        const float (&from)[4] = sums[i / N_TILES][i % N_TILES];
        others[place(of_k, i)] = {from[0], from[1], from[2], from[3]};
      }
    __syncthreads();
    if (of_k == 0)
#pragma unroll
      for (int i = 0; i < 2 * N_TILES; ++i)
#pragma unroll
        for (int piece = 1; piece < WARPS_K; ++piece) {
          const float4 more = others[place(piece, i)];
          float (&to)[4] = sums[i / N_TILES][i % N_TILES];
          to[0] += more.x, to[1] += more.y, to[2] += more.z, to[3] += more.w;
        }
    __syncthreads();
  }

  // The sums of the cluster, for SHARE rows of x; their squares, if wanted, take the place of the sums of this block.
  template <bool SQUARES, class Make> __device__ __forceinline__ void end_all(Make make, const float* scales) const {
    for (int start = threadIdx.x; start < SHARE * WIDTH; start += AT_ONCE * THREADS) {
      decltype(make(0, 0)) ends[AT_ONCE];
      Vector<float, NEIGHBOURS> parts[AT_ONCE][CLUSTER];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        const Place at(*this, start + i * THREADS);
        ends[i] = make(first + at.m, (int64)at.b);
        ends[i].begin();
      }
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        const Place at(*this, start + i * THREADS);
#pragma unroll
        for (int block = 0; block < CLUSTER; ++block) {
          const float* own = &sums_at(at.b, at.exists ? at.m : TILE);  // beside the sums, where nobody writes
          parts[i][block] = CLUSTER > 1 ? read_of_block<NEIGHBOURS>(own, block) : ::read<NEIGHBOURS>(own);
        }
      }
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        const Place at(*this, start + i * THREADS);
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
    if (CLUSTER > 1) cluster_arrive(), cluster_wait();
  }
};
