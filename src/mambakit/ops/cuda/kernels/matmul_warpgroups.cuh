// The sums of a block of `matmul.cuh`, by products of warpgroups (wgmma, compute capability 9.0 alone), which take both factors
// from shared memory: 64 rows of x, those past BATCH being zeros, by 64 or 32 of the warpgroup's part of the rows of W.
#pragma once
#include "matmul_tiles.cuh"

static_assert(sizeof(X) == 2, "numbers of four bytes have to be rounded on their way");

struct Sums {
  static constexpr int OWN = TILE / WARPGROUPS;  // rows of W of a warpgroup
  static constexpr int AT_ONCE = OWN % 64 == 0 ? 64 : 32;
  float sums[OWN / AT_ONCE][AT_ONCE / 2] = {};
  int first;  // of these

  __device__ __forceinline__ explicit Sums(int warp) : first(warp / 4 * OWN) {}

  // The factors have been copied by threads, and warpgroups read them in another way.
  __device__ __forceinline__ static void make_visible() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

  __device__ __forceinline__ void begin(const char* memory) {
    const uint64 x = described(memory + W_BYTES), w = described(memory + first * 64);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
#pragma unroll
      for (int half = 0; half < 2; ++half)  // of a piece: 16 numbers, 32 bytes; addresses are in units of 16
#pragma unroll
        for (int i = 0; i < OWN / AT_ONCE; ++i)
          multiply_add_warpgroup<IO>(
              sums[i], x + step * X_ROWS * 4 + half * 2, w + (step * TILE + i * AT_ONCE) * 4 + half * 2);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  }

  __device__ __forceinline__ void end(const char*, const float*) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (auto& group : sums)
#pragma unroll
      for (float& sum : group) asm volatile("" : "+f"(sum)::"memory");  // not to be read before the wait
  }

  // To shared memory. A lane has, of each eight rows of W, two neighbours for each of two rows of x.
  __device__ __forceinline__ void put() {
    const int lane = threadIdx.x % 32, n = threadIdx.x / 32 % 4 * 16 + lane / 4, m = first + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < OWN / 8; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (n + 8 * half < BATCH) {
          const float* const from = &sums[i * 8 / AT_ONCE][i % (AT_ONCE / 8) * 4 + half * 2];
          *reinterpret_cast<float2*>(&sums_at(n + 8 * half, m + i * 8)) = {from[0], from[1]};
        }
  }

 private:
  // Rows of 64 bytes, turned; eights of them follow one another.
  __device__ __forceinline__ static uint64 described(const char* rows) {
    constexpr uint64 SWIZZLE_64 = 2ull << 62, EIGHTS = (uint64)(512 / 16) << 32, UNUSED = 1ull << 16;
    return SWIZZLE_64 | EIGHTS | UNUSED | ((unsigned)__cvta_generic_to_shared(rows) >> 4 & 0x3fff);
  }
};
