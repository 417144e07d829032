// Codes of eight or four bits, sixteen bytes at a time. BITS: of a code. GROUP: codes that share a scale.
//
// Sixteen bytes are RUNS runs of RUN neighbouring codes: one of sixteen with eight bits; with four bits half of a block of
// 64, four of eight codes, sixteen apart, since bits 4k to 4k + 3 of word i of the block are its code 16 k + i.
#pragma once
#include "vectors.cuh"

constexpr int RUN = BITS == 8 ? 16 : 8, RUNS = BITS == 8 ? 1 : 4;
constexpr int CODES = RUN * RUNS;

// Column of the first code of a run, of the piece with this number in its row.
__device__ __forceinline__ int64 column_of(int64 piece, int run) {
  if constexpr (BITS == 8) return piece * 16;
  return piece / 2 * 64 + run * 16 + piece % 2 * 8;
}

// A byte as a float, by its place in the mantissa of 2^23: conversions run at a fraction of the speed of additions.
template <int BYTE> __device__ __forceinline__ float byte_of(unsigned word, float zero) {
  return __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440 + BYTE)) - zero;
}

// The codes of a run, from the four words that hold the piece.
__device__ __forceinline__ void decode(float (&codes)[RUN], const unsigned (&words)[4], int run) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (BITS == 8) {
      const unsigned bytes = words[i] ^ 0x80808080u;  // from 0 to 255
      constexpr float zero = 8388608.0f + 128.0f;
      codes[4 * i] = byte_of<0>(bytes, zero);
      codes[4 * i + 1] = byte_of<1>(bytes, zero);
      codes[4 * i + 2] = byte_of<2>(bytes, zero);
      codes[4 * i + 3] = byte_of<3>(bytes, zero);
    } else {
      const unsigned nibbles = ((words[i] >> 4 * run) & 0x000f000fu) ^ 0x00080008u;  // from 0 to 15
      constexpr float zero = 8388608.0f + 8.0f;
      codes[2 * i] = byte_of<0>(nibbles, zero);
      codes[2 * i + 1] = byte_of<2>(nibbles, zero);
    }
  }
}

struct Piece { unsigned words[4]; };

__device__ __forceinline__ Piece read_piece(const char* codes, int64 piece) {
  Piece out;
  const uint4 words = __ldcs(reinterpret_cast<const uint4*>(codes) + piece);  // read once: other data stay in the cache
  out.words[0] = words.x, out.words[1] = words.y, out.words[2] = words.z, out.words[3] = words.w;
  return out;
}
