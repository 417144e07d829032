// Products of up to eight rows of x with matrices that come through a ring, on tensor cores: eight rows of the matrix and
// sixteen numbers along k an instruction. Every warp has its part of k, PART / WARPS numbers of each PART, and with it x in
// registers; the sums of the warps meet in shared memory.
//
// A tensor core adds in the order of k, four sums in turn; then these, then warps are added in a fixed order, whatever else is
// in the batch.
//
// The order of numbers along k within an instruction is free, as long as it is the same for both factors: lane 4 g + t reads
// sixteen bytes of row g, those from number 8 t of 32 on, and has with them its words for two instructions.
#pragma once
#include "exchange.cuh"
#include "row_sender.cuh"
#include "tensor_cores.cuh"

// The barrier of those that multiply.
__device__ __forceinline__ void meet() { asm volatile("bar.sync 1, %0;" ::"n"(32 * WARPS) : "memory"); }

constexpr int CHUNK = 32;                        // numbers along k that a warp has at a time
constexpr int CHUNKS = PART / WARPS / CHUNK;     // of a warp, of each PART
constexpr int MOST_ROWS = 64;                    // of a matrix that a block sums up at a time
constexpr int SUMS_ROW = MOST_ROWS + 8;          // with room that keeps rows of x in different banks

using Sums = float[WARPS][BATCH][SUMS_ROW];

// x of a warp, of COUNT times PART numbers along k, each word as `factor` orders it; of rows that do not exist zeros.
template <int COUNT> struct Factor {
  uint4 words[COUNT * CHUNKS];
};

// Sixteen bytes of x as the instruction's first factor, which has sixteen rows: eight of the batch with the first half of the
// numbers, and the same eight with the second.
__device__ __forceinline__ uint4 factor(unsigned first, unsigned second, unsigned third, unsigned fourth) {
  return uint4{first, third, second, fourth};
}

struct Lane {
  int warp = threadIdx.x / 32, row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 8;

  // The first number that this lane has of a chunk: number() of the first chunk, and so many further on.
  __device__ __forceinline__ int number() const { return warp * CHUNKS * CHUNK + column; }
  __device__ __forceinline__ static int further(int i) { return i / CHUNKS * PART + i % CHUNKS * CHUNK; }
};

// The sums of eight rows of a matrix with eight rows of x.
struct Eight {
  float sums[4][4] = {};

  // Half of what each instruction gives is of no use: products of one half of x with the other of w.
  __device__ __forceinline__ void add(const uint4& x, const uint4& w, int chunk) {
    multiply_add<IO>(sums[chunk % 2 * 2], x, w.x, w.y);
    multiply_add<IO>(sums[chunk % 2 * 2 + 1], x, w.z, w.w);
  }

  // Of two neighbouring rows of the matrix and one row of x.
  __device__ __forceinline__ float sum(int i) const { return (sums[0][i] + sums[1][2 + i]) + (sums[2][i] + sums[3][2 + i]); }
};

// CHUNKS of a warp in a slot, from this lane's first number on. (To read a slot while the one before is multiplied takes
// registers that are not there, and spilling costs more.)
__device__ __forceinline__ void multiply(Eight& eight, const uint4* x, const char* at) {
  uint4 w[CHUNKS];
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) w[c] = *reinterpret_cast<const uint4*>(at + c * CHUNK * sizeof(IO));
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) eight.add(x[c], w[c], c);
}

struct RingProduct : Taker<SLOTS, SLOT> {
  Lane lane;
  int batch;

  __device__ __forceinline__ RingProduct(char* memory, RingBarriers<SLOTS>& barriers, int batch)
      : Taker(memory, barriers), batch(batch) {}

  // x, of which every block has written a part.
  template <int COUNT> __device__ __forceinline__ void receive_x(Factor<COUNT>& x, const IO* from) const {
    receive<IO>(
        x.words, from + lane.row * COUNT * PART + lane.number(), [](int i) { return Lane::further(i); },
        [&](int) { return lane.row < batch; });
#pragma unroll
    for (uint4& word : x.words) word = factor(word.x, word.y, word.z, word.w);
  }

  // Rows of a matrix that were sent in eights. To sums from `first` on.
  template <int COUNT> __device__ __forceinline__ void eights(Sums& to, int first, int rows, const Factor<COUNT>& x) {
    for (int row = 0; row < rows; row += 8) {
      Eight eight;
#pragma unroll
      for (int p = 0; p < COUNT; ++p) {
        multiply(eight, x.words + p * CHUNKS, await_slot() + lane.row * (PART * (int)sizeof(IO) + GAP) + lane.number() * sizeof(IO));
        release();
      }
      put(to, eight, first + row);
    }
  }

  // At most eight rows of a matrix that were sent whole, in one slot. To the room beside the sums, from MOST_ROWS on: others
  // may still be read.
  template <int COUNT> __device__ __forceinline__ void few(Sums& to, int rows, const Factor<COUNT>& x) {
    if (rows == 0) return;
    const char* const row = await_slot() + min(lane.row, rows - 1) * (COUNT * PART * (int)sizeof(IO) + GAP);
    Eight eight;
#pragma unroll
    for (int p = 0; p < COUNT; ++p) multiply(eight, x.words + p * CHUNKS, row + (p * PART + lane.number()) * sizeof(IO));
    release();
    put(to, eight, MOST_ROWS);
  }

  // The sum of all warps.
  __device__ __forceinline__ static float sum(const Sums& sums, int b, int row) {
    float sum = sums[0][b][row];
#pragma unroll
    for (int warp = 1; warp < WARPS; ++warp) sum += sums[warp][b][row];
    return sum;
  }

 private:
  __device__ __forceinline__ void put(Sums& to, const Eight& eight, int first) const {
    if (lane.row < batch)
      *reinterpret_cast<float2*>(&to[lane.warp][lane.row][first + lane.column / 4]) = float2{eight.sum(0), eight.sum(1)};
  }
};
