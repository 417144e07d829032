// B and C of a tile of steps in shared memory, and how a lane gets its STATES states of a step.
#pragma once
#include "tensor_cores.cuh"

template <class W, bool IN_WORDS> struct RowsOf;

// Half precision stays as it is in memory, and tensor cores hand it out as floats: a lane reads 16 bytes once in four steps, not 32 in
// each. As an operand A (16 x 8) two of its words are of step t = lane % 4 of the four and of its part, in row lane / 4: two states
// each. A constant operand B takes one step's: the first of each pair of states in even columns, the second in odd ones. So each
// lane gets all four states, of its row and of the row 8 below.
//
// A number that is not finite makes the three other steps of its four not finite, too.
template <class W> struct RowsOf<W, true> {
  struct Tile {
    uint4 of[TILE / 4][16];  // for each part and step of four: four states of B, and of C

    FORCE_INLINE W& at(int which, int step, int n) { return ((W*)&of[step / 4][n / 4 * 4 + step % 4])[which * 4 + n % 4]; }
    FORCE_INLINE void put(int which, const Fetch<TILE>& rows) {
      rows.put([&](int step, int n, W w) { at(which, step, n) = w; });
    }
  };
  // Of COUNT steps.
  template <int COUNT> struct Run {
    uint4 words[COUNT / 4];

    FORCE_INLINE Run(const Tile& tile, int first, const Place& at) {
#pragma unroll
      for (int q = 0; q < COUNT / 4; q++) words[q] = tile.of[first / 4 + q][at.part * 4 + threadIdx.x % 4];
    }
    FORCE_INLINE States of(const RowsOf& rows, int which, int step) const {
      const uint4 w = words[step / 4];
      float d[4] = {};
      multiply_add<W>(d, which ? w.z : w.x, which ? w.w : w.y, rows.take[step % 4]);
      return States{{d[0], d[1], d[2], d[3]}};
    }
  };

  unsigned take[4];

  FORCE_INLINE RowsOf() {
#pragma unroll
    for (int s = 0; s < 4; s++) take[s] = opaque(threadIdx.x % 4 == s ? (unsigned)from_float<W>(1.0f).bits << 16 * (threadIdx.x / 4 % 2) : 0u);
  }
};

// Others are there as they are computed with.
template <class W> struct RowsOf<W, false> {
  struct Tile {
    alignas(16) Number of[2][TILE][PADDED];

    FORCE_INLINE Number& at(int which, int step, int n) { return of[which][step][n]; }
    FORCE_INLINE void put(int which, const Fetch<TILE>& rows) { rows.put(of[which]); }
  };
  template <int COUNT> struct Run {
    const States *B, *C;

    FORCE_INLINE Run(const Tile& tile, int first, const Place& at)
        : B((const States*)&tile.of[0][first][at.part * STATES]), C((const States*)&tile.of[1][first][at.part * STATES]) {}
    FORCE_INLINE States of(const RowsOf&, int which, int step) const { return (which ? C : B)[step * SPREAD]; }
  };
};

constexpr bool IN_WORDS = ChannelSums::ON_TENSOR_CORES && sizeof(IO) == 2;
typedef RowsOf<Weight, IN_WORDS> WeightRows;
