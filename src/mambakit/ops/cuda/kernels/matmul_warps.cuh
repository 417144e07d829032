// The sums of a block of `matmul.cuh`, by products of single warps (mma.sync): a warp multiplies 32 rows of W by
// all rows of x, and takes every WARPS_K-th piece. STEPS is a multiple of WARPS_K.
#pragma once
#include "matmul_tiles.cuh"

struct Sums {
  static constexpr int EIGHTS = BATCH / 8;  // of rows of x
  float sums[2][EIGHTS][4] = {};
  int lane, of_k, of_m;

  __device__ __forceinline__ explicit Sums(int warp) : lane(threadIdx.x % 32), of_k(warp % WARPS_K), of_m(warp / WARPS_K) {}

  // A warp reads what was copied as any thread does, and its products end one by one: nothing to begin.
  __device__ __forceinline__ static void make_visible() {}
  __device__ __forceinline__ void begin(const char*) {}

  __device__ __forceinline__ void end(const char* memory, const float* scales) {
#pragma unroll
    for (int step = of_k; step < STEPS; step += WARPS_K)
      multiply_piece(
          memory + (step * TILE + of_m * 32) * PIECE * sizeof(IO), memory + W_BYTES + step * BATCH * PIECE * sizeof(X),
          scales);
  }

  // To shared memory.
  __device__ __forceinline__ void put() {
    add_warps();
    if (of_k > 0) return;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < 4 * EIGHTS; ++i)
        sums_at(i / 4 * 8 + lane % 4 * 2 + i % 2, of_m * 32 + half * 16 + i % 4 / 2 * 8 + lane / 4) =
            sums[half][i / 4][i % 4];
  }

 private:
  // 32 rows of W by the warp's rows of x, over 32 numbers.
  __device__ __forceinline__ void multiply_piece(const char* w, const char* x, const float* scales) {
    const int row = lane % 16, part = turned<IO>(lane / 16, row);
    uint4 a[2][2];
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int step = 0; step < 2; ++step) a[half][step] = read_matrices(w + (half * 16 + row) * 64 + (part ^ 2 * step) * 16);
#pragma unroll
    for (int n = 0; n < EIGHTS; ++n) {
      const uint4 b = read_x(x + n * 8 * PIECE * sizeof(X), scales + n * 8);
#pragma unroll
      for (int half = 0; half < 2; ++half) multiply_add<IO>(sums[half][n], a[half][0], b.x, b.y);
#pragma unroll
      for (int half = 0; half < 2; ++half) multiply_add<IO>(sums[half][n], a[half][1], b.z, b.w);
    }
  }

  // A piece of eight rows of x, in words of IO.
  __device__ __forceinline__ uint4 read_x(const char* x, const float* scales) const {
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
  __device__ __forceinline__ void add_warps() {
    if (WARPS_K == 1) return;
    float4* const others = reinterpret_cast<float4*>(shared_memory());
    const auto place = [&](int piece, int i) {
      return (((piece - 1) * (WARPS / WARPS_K) + of_m) * (2 * EIGHTS) + i) * 32 + lane;
    };
    if (of_k > 0)
#pragma unroll
      for (int i = 0; i < 2 * EIGHTS; ++i) {
        const float (&from)[4] = sums[i / EIGHTS][i % EIGHTS];
        others[place(of_k, i)] = {from[0], from[1], from[2], from[3]};
      }
    __syncthreads();
    if (of_k == 0)
#pragma unroll
      for (int i = 0; i < 2 * EIGHTS; ++i)
#pragma unroll
        for (int piece = 1; piece < WARPS_K; ++piece) {
          const float4 more = others[place(piece, i)];
          float (&to)[4] = sums[i / EIGHTS][i % EIGHTS];
          to[0] += more.x, to[1] += more.y, to[2] += more.z, to[3] += more.w;
        }
    __syncthreads();
  }
};
