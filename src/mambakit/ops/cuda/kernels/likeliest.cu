// The first of the largest logits of each row, or -1 if it is not finite; NaN counts as infinite. A block has a row: all of it is on
// its way at once, and a step of decoding waits for little more than one access.
//
// IO: type of the logits. LANES: neighbours in an access, which begins rows. WARPS: of a block.
#include "vectors.cuh"

struct Candidate {
  float logit;
  int id;

  __device__ __forceinline__ void meet(float other, int other_id) {
    if (other > logit || (other == logit && other_id < id)) logit = other, id = other_id;
  }
  // The best of the lanes of a warp, in all of them.
  __device__ __forceinline__ void meet_lanes() {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
      meet(__shfl_xor_sync(~0u, logit, distance), __shfl_xor_sync(~0u, id, distance));
  }
};

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    likeliest(const IO* __restrict__ logits, int64 stride, int64* __restrict__ tokens, int64 size) {
  const IO* const row = logits + blockIdx.x * stride;
  const float infinity = __int_as_float(0x7f800000);
  Candidate best{-infinity, (int)size};
  auto look = [&](float logit, int id) { best.meet(logit == logit ? logit : infinity, id); };
  const int count = size, whole = count / LANES * LANES;
#pragma unroll 8
  for (int id = threadIdx.x * LANES; id < whole; id += 32 * WARPS * LANES) {
    float some[LANES];
    unpack(some, read<LANES>(row + id));
#pragma unroll
    for (int i = 0; i < LANES; ++i) look(some[i], id + i);
  }
  if (whole + threadIdx.x < count) look(to_float(row[whole + threadIdx.x]), whole + threadIdx.x);
  best.meet_lanes();
  __shared__ Candidate of_warps[WARPS];
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = best;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  best = of_warps[threadIdx.x % WARPS];
  best.meet_lanes();
  if (threadIdx.x == 0) tokens[blockIdx.x] = fabsf(best.logit) < infinity ? best.id : -1;
}
