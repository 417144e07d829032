// A matrix of codes made whole: weight = scale * code, rounded to X. A thread takes sixteen bytes of codes.
//
// X: type of the weight. WHOLE: eight divides the columns, so that runs are written in accesses of up to sixteen bytes.
// BITS, GROUP: see quantised.cuh.
#include "quantised.cuh"

extern "C" __global__ void __launch_bounds__(256) dequantise(
    const char* __restrict__ codes, int64 pieces, const bfloat16* __restrict__ scales, int64 groups,
    X* __restrict__ weight, int64 outputs, int64 columns) {
  const int64 all = outputs * pieces;
  for (int64 piece = (int64)blockIdx.x * 256 + threadIdx.x; piece < all; piece += (int64)gridDim.x * 256) {
    const Piece held = read_piece(codes, piece);
    const int64 output = piece / pieces;
#pragma unroll
    for (int run = 0; run < RUNS; ++run) {
      const int64 column = column_of(piece % pieces, run);
      const float scale = to_float(scales[output * groups + column / GROUP]);
      float numbers[RUN];
      decode(numbers, held.words, run);
#pragma unroll
      for (int i = 0; i < RUN; ++i) numbers[i] *= scale;
      X* to = weight + output * columns + column;
#pragma unroll
      for (int first = 0; first < RUN; first += 8) {
        if constexpr (WHOLE) {
          float part[8];
#pragma unroll
          for (int i = 0; i < 8; ++i) part[i] = numbers[first + i];
          if (column + first < columns) write(to + first, part);
        } else {
#pragma unroll
          for (int i = first; i < first + 8; ++i)
            if (column + i < columns) to[i] = from_float<X>(numbers[i]);
        }
      }
    }
  }
}
