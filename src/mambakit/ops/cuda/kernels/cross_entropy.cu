// Softmax cross-entropy of rows of logits; a block is a row.
//
//     loss = log sum_v exp(logits_v) - logits_target,   logits <- softmax(logits) - one-hot(target)
//
// The row is read from memory once: what fits of it is copied to shared memory, all at once, both for the pass that finds its
// maximum and sum, together, and for the pass that writes the gradient. What does not fit is read by each of them.
//
// Constants: IO, float, bfloat16 or float16; THREADS; GRADIENTS, whether logits are overwritten.
#include "async_copies.cuh"
#include "vectors.cuh"

constexpr int LANES = 16 / sizeof(IO);
constexpr int WARPS = THREADS / 32;
constexpr int BATCH = 4;          // accesses that a thread asks for before it looks at the first
constexpr float LOWEST = -1e38f;  // not -infinity, whose difference with itself is no number

using Piece = Vector<IO, LANES>;  // 16 bytes of a row

// log2 of exp(x - largest), for shift = largest * LOG2_E.
__device__ __forceinline__ float exponent(float x, float shift) { return fmaf(x, LOG2_E, -shift); }

// A softmax under way: sum = sum of exp(x - largest) over the x seen so far. All terms are made with the same rounded
// shift, so that its rounding is a common factor, which cancels.
struct Softmax {
  float shift = LOWEST, sum = 0.0f;

  __device__ __forceinline__ void raise(float higher) {
    sum *= exp2_approx(shift - higher);
    shift = higher;
  }

  __device__ __forceinline__ void add(const float (&x)[LANES]) {
    float largest = x[0];
#pragma unroll
    for (int i = 1; i < LANES; i++) largest = fmaxf(largest, x[i]);
    raise(fmaxf(shift, largest * LOG2_E));
#pragma unroll
    for (int i = 0; i < LANES; i++) sum += exp2_approx(exponent(x[i], shift));
  }

  __device__ __forceinline__ void add(Softmax other) {
    const float higher = fmaxf(shift, other.shift);
    raise(higher);
    other.raise(higher);
    sum += other.sum;
  }
};

// The parts of all threads together, in every thread.
__device__ __forceinline__ Softmax of_block(Softmax mine) {
  __shared__ float shifts[WARPS], sums[WARPS];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    Softmax other;
    other.shift = __shfl_xor_sync(0xffffffff, mine.shift, distance);
    other.sum = __shfl_xor_sync(0xffffffff, mine.sum, distance);
    mine.add(other);
  }
  if (threadIdx.x % 32 == 0) {
    shifts[threadIdx.x / 32] = mine.shift;
    sums[threadIdx.x / 32] = mine.sum;
  }
  __syncthreads();
  Softmax all;
#pragma unroll
  for (int warp = 0; warp < WARPS; warp++) {
    Softmax part;
    part.shift = shifts[warp];
    part.sum = sums[warp];
    all.add(part);
  }
  return all;
}

// Numbers past the end of the row, in its last 16 bytes, count as exp(-infinity) = 0.
__device__ __forceinline__ void widen(float (&x)[LANES], const Piece& packed, int64 first, int64 vocab) {
  unpack(x, packed);
  if (first + LANES > vocab) {
#pragma unroll
    for (int i = 0; i < LANES; i++) x[i] = first + i < vocab ? x[i] : __int_as_float(0xff800000);
  }
}

// logits: (rows, stride), stride a multiple of LANES; targets, losses: (rows,). kept: pieces of a row that the
// dynamic shared memory holds; a thread takes those that it copied.
extern "C" __global__ void __launch_bounds__(THREADS, 2) cross_entropy(
    IO* logits, const int64* targets, float* losses, int64 vocab, int64 stride, int64 ignore_index, int64 kept) {
  extern __shared__ Piece row_kept[];
  const int64 row = blockIdx.x, target = targets[row];
  const int64 count = (vocab + LANES - 1) / LANES;
  logits += row * stride;

  // A row that does not count adds nothing; one whose target is no class makes loss and gradients nan.
  if (target == ignore_index || target < 0 || target >= vocab) {
    const float fill = target == ignore_index ? 0.0f : __int_as_float(0x7fc00000);
    if (threadIdx.x == 0) losses[row] = fill;
    if (GRADIENTS) {
      float same[LANES];
#pragma unroll
      for (int i = 0; i < LANES; i++) same[i] = fill;
      for (int64 v = threadIdx.x; v < count; v += THREADS) write(logits + v * LANES, same);
    }
    return;
  }

  for (int64 v = threadIdx.x; v < kept; v += THREADS) copy_own<16>(row_kept + v, logits + v * LANES);
  commit_copies();
  const float of_target = to_float(logits[target]);
  Softmax mine;
  for (int64 first = kept + threadIdx.x; first < count; first += BATCH * THREADS) {
    Piece batch[BATCH];
#pragma unroll
    for (int j = 0; j < BATCH; j++) {
      const int64 v = first + j * THREADS;
      if (v < count) batch[j] = read<LANES>(logits + v * LANES);
    }
#pragma unroll
    for (int j = 0; j < BATCH; j++) {
      const int64 v = first + j * THREADS;
      if (v >= count) break;
      float x[LANES];
      widen(x, batch[j], v * LANES, vocab);
      mine.add(x);
    }
  }
  await_copies<0>();
  for (int64 v = threadIdx.x; v < kept; v += THREADS) {
    float x[LANES];
    widen(x, row_kept[v], v * LANES, vocab);
    mine.add(x);
  }
  const Softmax all = of_block(mine);
  const float target_exponent = exponent(of_target, all.shift);
  if (threadIdx.x == 0) losses[row] = logf(all.sum) - target_exponent * LN_2;
  if (!GRADIENTS) return;

  // All threads have read the target's logit: the barrier in of_block stands between.
  const float scale = 1.0f / all.sum;
#pragma unroll 2
  for (int64 v = threadIdx.x; v < count; v += THREADS) {
    float x[LANES];
    widen(x, v < kept ? row_kept[v] : read<LANES>(logits + v * LANES), v * LANES, vocab);
#pragma unroll
    for (int i = 0; i < LANES; i++) x[i] = exp2_approx(exponent(x[i], all.shift)) * scale;
    write(logits + v * LANES, x);
  }
  // By the thread that wrote the 16 bytes around it: its writes keep their order.
  if (threadIdx.x == target / LANES % THREADS)
    logits[target] = from_float<IO>(exp2_approx(target_exponent) * scale - 1.0f);
}
