// A decoding step of a whole model for 9 to 128 rows: one kernel, a block a multiprocessor, all at the same time, in clusters of
// four. As in `decode_model.cu` one warp of each block sends weights through a ring of shared memory, and waits for no other
// block; here states and all small things of a layer come the same way, in the order of their use. Two warpgroups multiply
// (wgmma, 64 rows of the batch an instruction), and end what they have multiplied.
//
// A cluster has the same channels of x, z and the scan in all layers, and half as many columns of the residual stream. Each of its
// blocks has a quarter of k, of all its rows of a matrix and all rows of the batch; so no block needs more than a quarter
// of x. Then each block gets all sums of a quarter of the batch, and ends these: norm, convolution, scan, residual stream.
//
// Blocks exchange four things a layer, and count who has written: the stream, times the weight of the norm that is next (its scale
// comes after the product); of x only what steers the scan, first each cluster's part of the sum, then the sums; and y. Bits of
// a row depend neither on the other rows nor on how many there are.
//
// So that a float16 does not overflow, the stream is also multiplied by the scale of the norm before (`prior`).
//
// IO: bfloat16 or float16. TOKEN: type of tokens. LAYERS: of the model. WIDTH (M), CHANNELS (D), RANK (R), D_STATE (N), TAPS (W).
// DEFERS: whether states of the scan are written every second step only; see `StateTurn`.
// BATCH: 16, 32, 64 or 128, not less than the rows. CLUSTERS: of the grid, at most 32. WARPGROUPS: of a block, 3; the last one sends.
// SLOTS: of the ring of weights, IN_FLIGHT of which may be on their way. X_SLOTS: of the ring of x. SHARED: bytes of shared memory.
#include "clusters.cuh"
#include "decode_functions.cuh"
#include "decode_rows_senders.cuh"
#include "warpgroup_sums.cuh"

// What the warps do that take.
struct Block {
  const Model& model;
  Shared& shared;
  const Place at;
  Taker<SLOTS, SLOT> weights;
  Taker<X_SLOTS, X_SLOT> xs;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  int lane = threadIdx.x % 32, thread = threadIdx.x;
  const int group = warp / 4, tile = TILES > 1 ? group : 0;  // which warpgroup, and which 64 rows of the batch it multiplies
  unsigned turn = 0;  // of exchanges of sums
  static constexpr int SPAN = OWN / 2;  // rows of a matrix whose sums are handed out together
  static constexpr int TURNS = (OWN * SPREAD + 127) / 128, COLUMN_TURNS = (COLUMNS + 31) / 32;
  static constexpr int ROW_TURNS = (SHARE + WARPS - 1) / WARPS;
  static constexpr int ENDS = (TURNS + SPREAD - 1) / SPREAD;  // channels whose output a lane ends
  float rates[TURNS][LANE_STATES], skips[ENDS];  // of the scan
  Vector<float, LANE_STATES> states[TURNS];       // of the row that is scanned next
  float norm[COLUMN_TURNS];                       // the weights of the next one
  float stream[ROW_TURNS][COLUMN_TURNS] = {};     // of the residual stream, what this lane has

  // What addresses are made of, so that the compiler makes them where they are used. Else it keeps them from layer to layer, and
  // spills them. It has to know their range, or it divides as of negative numbers.
  __device__ __forceinline__ void forget_addresses() {
    asm volatile("" : "+r"(lane), "+r"(thread));
    lane &= 31, thread &= THREADS - 1;
  }

  __device__ __forceinline__ void arrive_everywhere(BlockBarrier& barrier) {
    __syncwarp();
    if (lane < CLUSTER) barrier.arrive_at(lane);
  }

  // Sums of rows FROM to TO of the matrix to the blocks that end these rows of the batch. A lane's numbers of two eights go
  // together, so they are neighbours there: see `place_of`.
  template <int FROM, int TO, int N>
  __device__ __forceinline__ void hand_out(const WarpgroupSums<N>& sums, int source, int pitch, int column) {
    shared.freed.await(turn ^ 1);
    unsigned to[2], heard[2];
    bool exists[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile * 64 + warp % 4 * 16 + lane / 4 + 8 * half, block = row / at.share;
      exists[half] = row < at.batch;
      to[half] = address_in(&shared.sums[(source * SHARE + row - block * at.share) * pitch + column], exists[half] ? block : 0);
      heard[half] = address_in(&shared.received, exists[half] ? block : 0);
    }
    float held[2][2];
    sums.each([&](int half, int column, float first, float second) {
      if (column < FROM || column >= TO) return;
      const int eight = (column - FROM) / 8;
      if (eight % 2 == 0 && column + 8 < TO) held[half][0] = first, held[half][1] = second;
      else if (exists[half] && eight % 2 == 0) write_async(to[half] + (eight * 8 + lane % 4 * 2) * 4, first, second, heard[half]);
      else if (exists[half])
        write_async(to[half] + ((eight - 1) * 8 + lane % 4 * 4) * 4, held[half][0], held[half][1], first, second, heard[half]);
    });
  }

  // Where the sum of an even row of the matrix is.
  __device__ __forceinline__ static int place_of(int row) {
    const int in_span = row % SPAN, place = in_span / 16 * 16 + in_span / 2 % 4 * 4 + in_span / 8 % 2 * 2;
    return row - in_span + (in_span / 16 * 16 + 8 < SPAN ? place : in_span);
  }
  // So many bytes from each block of the cluster.
  __device__ __forceinline__ void await_sums(int bytes) {
    if (thread == 0) shared.received.arrive_for(CLUSTER * bytes);
    shared.received.await(turn);
  }
  __device__ __forceinline__ void free_sums() {
    arrive_everywhere(shared.freed);
    turn ^= 1;
  }

  static constexpr int N = TILES > 1 ? OWN : SPAN;  // rows of in_proj and the head of a warpgroup

  // Their products, of so many boxes along k.
  __device__ __forceinline__ void product(WarpgroupSums<N>& sums, int boxes = BOXES) {
    const int offset = (TILES > 1 ? 0 : group * N) * 128;
    sums.multiply(xs.await_slot() + tile * 8192, weights.await_slot() + offset);
#pragma unroll 1
    for (int i = 1; i < boxes; ++i) {
      const char *const w = weights.await_next(), *const x = xs.await_next();
      sums.multiply(x + tile * 8192, w + offset);
      sums.template await<1>();
      weights.release(), xs.release();
    }
    sums.template await<0>();
    weights.release(), xs.release();
  }

  // Half of in_proj, x or z: the sums of its first or second part.
  template <int ROUND> __device__ __forceinline__ void hand_out_part(const WarpgroupSums<N>& sums) {
    hand_out<ROUND * (N / ROUNDS), (ROUND + 1) * (N / ROUNDS)>(sums, at.rank, PITCH, TILES > 1 ? 0 : group * N);
  }

  // Of two neighbouring channels.
  __device__ __forceinline__ Vector<float, 2> sums_at(int r, int c) const {
    const int place = place_of(c);
    const auto part = [&](int block) { return *reinterpret_cast<const float2*>(&shared.sums[(block * SHARE + r) * PITCH + place]); };
    float2 sum = part(0);
#pragma unroll
    for (int block = 1; block < CLUSTER; ++block) sum.x += part(block).x, sum.y += part(block).y;
    return {sum.x * shared.factors[r], sum.y * shared.factors[r]};
  }

  // States of the convolution, on their way from a slot to memory: they are written when no sums that others wait for are behind them.
  struct NewStates {
    uint4 words[(SHARE * PART * PAST / 8 + THREADS - 1) / THREADS];

    // do_for(row, piece of it, piece of all, its words) of this thread's pieces.
    template <class Do> __device__ __forceinline__ void each(int rows, int channels, Do do_for) {
      const int pieces = channels * PAST / 8;
      const unsigned inverse = pieces > 0 ? (1u << 20) / pieces + 1 : 0;  // place * inverse >> 20 is place / pieces
      static_assert(SHARE * (PART * PAST / 8) * (PART * PAST / 8) < 1 << 20);
      int place = threadIdx.x;
#pragma unroll
      for (uint4& piece : words) {
        const int row = place * inverse >> 20;
        if (place < rows * pieces) do_for(row, place - row * pieces, place, piece);
        place += THREADS;
      }
    }
  };
  __device__ __forceinline__ void write_states(const Layer& layer, int from, NewStates& new_states) {
    IO* const to = layer.conv_state + at.first * model.conv_batch + (at.channel + from) * PAST;
    new_states.each(at.rows, min(PART, at.own - from), [&](int r, int piece, int, const uint4& words) {
      reinterpret_cast<uint4*>(to + r * model.conv_batch)[piece] = words;
    });
  }

  // Of the channels of a part, whose sums have been handed out.
  __device__ __forceinline__ void convolution(int l, int from, NewStates& new_states) {
    constexpr int PAIRS = PART / 2, TOGETHER = THREADS / PAIRS;
    const int c = thread % PAIRS * 2, r0 = thread / PAIRS;
    const int count = min(PART, at.own - from), state = count * PAST;
    IO* const states = reinterpret_cast<IO*>(weights.await_slot());
    shared.scaled.await(l & 1);
    await_sums(at.rows * PART * 4);
    if (r0 < TOGETHER && c < count) {
      const IO* const taps = states + at.rows * state + c * TAPS;
      const IO* const offsets = states + at.rows * state + count * TAPS + c;
      float filters[2][TAPS];
#pragma unroll
      for (int w = 0; w < 2 * TAPS; ++w) filters[w / TAPS][w % TAPS] = to_float(taps[w]);
      for (int r = r0; r < at.rows; r += TOGETHER) {
        IO* const past = states + r * state + c * PAST;
        const Vector<float, 2> sums = sums_at(r, c);
        IO x[2], inputs[2][TAPS];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int w = 0; w < PAST; ++w) inputs[i][w] = past[i * PAST + w];
          inputs[i][PAST] = from_float<IO>(sums.items[i]);
          float sum = to_float(offsets[i]);
#pragma unroll
          for (int w = 0; w < TAPS; ++w) sum = fmaf(filters[i][w], to_float(inputs[i][w]), sum);
          x[i] = from_float<IO>(sum * sigmoid_of(sum));
        }
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int w = 0; w < PAST; ++w) past[i * PAST + w] = inputs[i][w + 1];
        *reinterpret_cast<unsigned*>(&shared.x[r][from + c]) = x[0].bits | (unsigned)x[1].bits << 16;
      }
    }
    free_sums();
    meet();
    new_states.each(at.rows, count, [&](int, int, int place, uint4& words) { words = reinterpret_cast<const uint4*>(states)[place]; });
    weights.release();
  }

  static constexpr int SIXTEENS = TILE_ROWS / 16;  // rows of this block's part of the batch
  using FewSums = float[SIXTEENS][4];
  // do_for(row, its two sums), without a branch between them.
  template <class Do> __device__ __forceinline__ void each_row(const FewSums& sums, Do do_for) const {
#pragma unroll
    for (int m = 0; m < SIXTEENS; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) do_for(16 * m + lane / 4 + 8 * half, sums[m][2 * half], sums[m][2 * half + 1]);
  }

  // Rows of a matrix that were sent whole, by rows of A in shared memory; end(two rows of the matrix, their sums). IN_PIECES: a slot
  // is eight pieces with gaps between them, and eight rows that are multiplied together are one of each.
  template <int COLUMNS_OF, bool IN_PIECES, class End>
  __device__ __forceinline__ void few(const IO* A, int rows, int columns, End end) {
    constexpr int LINE = line_of(COLUMNS_OF), STEPS = COLUMNS_OF / 16;
    constexpr bool HAS_ROOM = STEPS * SIXTEENS <= 18;  // in registers, for all of A
    uint4 factors[STEPS][SIXTEENS];
    const auto read_factors = [&] {
#pragma unroll
      for (int k = 0; k < STEPS; ++k)
#pragma unroll
        for (int m = 0; m < SIXTEENS; ++m)
          factors[k][m] = read_matrices(reinterpret_cast<const char*>(A) + (16 * m + lane % 16) * LINE + lane / 16 * 16 + 32 * k);
    };
    if constexpr (HAS_ROOM) read_factors();
    for (int start = 0; start < rows; start += few_rows(COLUMNS_OF)) {
      const char* const slot = weights.await_slot();
      const int count = min(few_rows(COLUMNS_OF), rows - start), piece = count / 8;
      for (int eight = warp; eight < piece; eight += WARPS) {
        const int row = lane % 8, at_row = IN_PIECES ? row * (piece * COLUMNS_OF * 2 + 16) + eight * COLUMNS_OF * 2 : (8 * eight + row) * LINE;
        const char* const b = slot + at_row + lane / 8 * 16;
        uint4 words[(STEPS + 1) / 2];  // of two products each
#pragma unroll
        for (int i = 0; i < (STEPS + 1) / 2; ++i) words[i] = read_matrices(b + 64 * i);
        if constexpr (!HAS_ROOM) read_factors();
        FewSums sums = {}, odd = {};
#pragma unroll
        for (int k = 0; k < STEPS; ++k) {
          const uint4& both = words[k / 2];
          if (k == STEPS - 1 && k * 16 >= columns) continue;  // at most sixteen are missing
#pragma unroll
          for (int m = 0; m < SIXTEENS; ++m)
            multiply_add<IO>((k % 2 ? odd : sums)[m], factors[k][m], k % 2 ? both.z : both.x, k % 2 ? both.w : both.y);
        }
#pragma unroll
        for (int m = 0; m < SIXTEENS; ++m)
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[m][i] += odd[m][i];
        const int first = lane % 4 * 2;
        if (IN_PIECES) end(start + first * piece + eight, start + (first + 1) * piece + eight, sums);
        else end(start + 8 * eight + first, start + 8 * eight + first + 1, sums);
      }
      weights.release();
    }
  }

  __device__ __forceinline__ void x_proj() {
    float* const to = model.partials + ((int64)at.cluster * at.batch + at.first) * STEERING;
    few<OWN, false>(&shared.x[0][0], STEERING, at.own, [&](int row, int, const FewSums& sums) {
      each_row(sums, [&](int r, float first, float second) {
        if (r < at.rows) *reinterpret_cast<float2*>(to + r * STEERING + row) = float2{first, second};
      });
    });
    __syncwarp();
    if (lane == 0) shared.projected.arrive();
  }

  // Of the channels of a part, whose sums have been handed out.
  __device__ __forceinline__ void receive_z(int from) {
    await_sums(at.rows * PART * 4);
#pragma unroll 2
    for (int i = thread; i < at.rows * (PART / 2); i += THREADS) {
      const int r = i / (PART / 2), c = i % (PART / 2) * 2;
      const Vector<float, 2> sums = sums_at(r, c);
      *reinterpret_cast<unsigned*>(&shared.z[r][from + c]) = pack<IO>(sums.items[0], sums.items[1]);
    }
  }

  // A slot of small things that are needed from now on.
  __device__ __forceinline__ void receive_parameters() {
    const float* const log_rates = reinterpret_cast<const float*>(weights.await_slot());
    const float* const others = log_rates + at.own * D_STATE;
#pragma unroll
    for (int i = 0; i < TURNS; ++i) {
      const int place = scanned(i);
      const Vector<float, LANE_STATES> read = ::read<LANE_STATES>(log_rates + place * LANE_STATES);
#pragma unroll
      for (int s = 0; s < LANE_STATES; ++s) rates[i][s] = -expf(read.items[s]) * LOG2_E;
    }
#pragma unroll
    for (int i = 0; i < ENDS; ++i) skips[i] = others[min(ended(i), at.own - 1)];
    if (thread < at.own) shared.biases[thread] = others[at.own + thread];
#pragma unroll
    for (int i = 0; i < COLUMN_TURNS; ++i)
      norm[i] = to_float(reinterpret_cast<const IO*>(others + 2 * at.own)[min(lane + 32 * i, at.columns() - 1)]);
    weights.release();
  }

  // What the states of the scan, as they were written, have not read.
  struct Kept {
    uint4 words[(2 * KEPT_BYTES / 16 + THREADS - 1) / THREADS];
  };
  __device__ __forceinline__ void take_kept(Kept& kept) {
    const uint4* const from = reinterpret_cast<const uint4*>(weights.await_slot());
    int place = thread;
#pragma unroll
    for (uint4& piece : kept.words) piece = from[min(place, 2 * KEPT_BYTES / 16 - 1)], place += THREADS;
    weights.release();
  }
  __device__ __forceinline__ void put_kept(const Kept& kept) {
    int place = thread;
#pragma unroll
    for (const uint4& piece : kept.words) {
      if (place < 2 * KEPT_BYTES / 16) reinterpret_cast<uint4*>(shared.steering.kept)[place] = piece;
      place += THREADS;
    }
  }

  __device__ __forceinline__ void receive_steering(int l, const Kept& kept) {
    IO* const kept_B = model.kept_B + (l * model.kept_rows + at.first) * D_STATE;
    constexpr int PIECES_OF_B = D_STATE / 8;
    const bool repeats = DEFERS && thread < at.rows * PIECES_OF_B && shared.turns[thread / PIECES_OF_B] == REPEATS;
    uint4 B_before;
    if (repeats) B_before = read_fresh(reinterpret_cast<const uint4*>(kept_B) + thread);
    await_count(model.counts->steering[at.rank], HELPERS * CLUSTERS * (l + 1));
    constexpr int EACH = STEERING / 8, COUNT = (SHARE * EACH + THREADS - 1) / THREADS;
    uint4 words[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const int place = min(thread + i * THREADS, max(at.rows * EACH - 1, 0));
      words[i] = read_fresh(reinterpret_cast<const uint4*>(model.steering + (int64)min(at.first, at.batch - 1) * STEERING) + place);
    }
    meet();  // all have read the sums of z
    if (DEFERS) put_kept(kept);
    if (repeats) reinterpret_cast<uint4*>(shared.steering.kept_B)[thread] = B_before;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const int place = thread + i * THREADS, r = place / EACH, s = place % EACH * 8;
      if (place >= at.rows * EACH) break;
      if (s < RANK) *reinterpret_cast<uint4*>(&shared.steering.low[r][s]) = words[i];
      else {
        if (DEFERS && at.cluster == 0 && s < RANK + D_STATE && shared.turns[r] == KEEPS)
          *reinterpret_cast<uint4*>(kept_B + r * D_STATE + s - RANK) = words[i];
        const unsigned word[4] = {words[i].x, words[i].y, words[i].z, words[i].w};
#pragma unroll
        for (int j = 0; j < 4; ++j)
          reinterpret_cast<float2*>(&shared.steering.bc[r][s - RANK])[j] = {low_float<IO>(word[j]), high_float<IO>(word[j])};
      }
    }
    meet();
  }

  __device__ __forceinline__ void dt_proj() {
    few<RANK, true>(&shared.steering.low[0][0], at.own, RANK, [&](int c, int d, const FewSums& sums) {
      const float bias = shared.biases[c], other = shared.biases[d];
      each_row(sums, [&](int r, float first, float second) {
        const IO dt = from_float<IO>(softplus(first + bias)), next = from_float<IO>(softplus(second + other));
        if (r < at.rows) shared.steering.dt[r][c] = dt, shared.steering.dt[r][d] = next;
      });
    });
  }

  // All that comes before the scan. While other blocks add what steers it, z is multiplied.
  __device__ __forceinline__ void steer(const Layer& layer, int l) {
    WarpgroupSums<N> x;
    product(x);
    hand_out_part<0>(x);
    NewStates new_states;
    if constexpr (ROUNDS > 1) {
      convolution(l, 0, new_states);
      hand_out_part<1>(x);
      write_states(layer, 0, new_states);
    }
    convolution(l, OWN - PART, new_states);
    forget_addresses();
    x_proj();
    WarpgroupSums<N> z;
    product(z);
    hand_out_part<0>(z);
    receive_parameters();
    receive_z(0);
    if constexpr (ROUNDS > 1) {
      free_sums();
      hand_out_part<1>(z);
      receive_z(PART);
    }
    Kept kept;
    if (DEFERS) take_kept(kept);
    if (at.rows > 0) take_states();
    receive_steering(l, kept);
    write_states(layer, OWN - PART, new_states);
    forget_addresses();
    dt_proj();
    meet();
  }

  // Which four states of a row: of each channel those of four neighbouring lanes. Past the end the last ones.
  __device__ __forceinline__ int scanned(int i) const {
    const int place = i * 128 + thread % 128;
    return all_have((i + 1) * 128 / SPREAD) ? place : min(place, at.own * SPREAD - 1);
  }
  __device__ __forceinline__ bool is_scanned(int i) const {
    return all_have((i + 1) * 128 / SPREAD) || i * 128 + thread % 128 < at.own * SPREAD;
  }
  // Whether all clusters have so many channels: they differ by sixteen at most.
  __device__ __forceinline__ static constexpr bool all_have(int channels) { return channels <= OWN - 16; }

  // Whose output this lane ends: each of four neighbours the channel of another turn.
  __device__ __forceinline__ int ended(int i) const { return (i * SPREAD + thread % SPREAD) * (128 / SPREAD) + thread % 128 / SPREAD; }
  // Of four neighbouring lanes: in lane i that of their sums i, if there are `count`, known to the compiler.
  __device__ __forceinline__ float sum_of_four(const float* sums, int count) const {
    const bool second = thread & 1, upper = thread & 2;
    const auto halved = [&](int i) {
      const float low = sums[i], high = i + 2 < count ? sums[i + 2] : low;
      return (upper ? high : low) + __shfl_xor_sync(~0u, upper ? low : high, 2);
    };
    const float first = halved(0), next = count > 1 ? halved(1) : first;
    return (second ? next : first) + __shfl_xor_sync(~0u, second ? first : next, 1);
  }

  // Of a slot, which has states of two rows: those of this warpgroup's.
  __device__ __forceinline__ void take_states() {
    const float* const from = reinterpret_cast<const float*>(weights.await_slot()) + group * (at.own * D_STATE);
#pragma unroll
    for (int i = 0; i < TURNS; ++i) states[i] = ::read<LANE_STATES>(from + scanned(i) * LANE_STATES);
    weights.release();
  }
  __device__ __forceinline__ int row_of_slot(int slot) const { return slot * STATE_ROWS + group; }

  // The states of this lane's i-th channel read x.
  __device__ __forceinline__ void advance(int i, float step, float x, const Vector<float, LANE_STATES>& B) {
#pragma unroll
    for (int s = 0; s < LANE_STATES; ++s) {
      float& h = states[i].items[s];
      h = fmaf(exp2_approx(step * rates[i][s]), h, step * x * B.items[s]);
    }
  }

  // The step before, of the states that were taken, which are those of row r.
  __device__ __forceinline__ void repeat_row(int r) {
    Vector<float, LANE_STATES> B;
#pragma unroll
    for (int s = 0; s < LANE_STATES; ++s) B.items[s] = to_float(shared.steering.kept_B[r][thread % SPREAD * LANE_STATES + s]);
#pragma unroll
    for (int i = 0; i < TURNS; ++i) {
      const int c = scanned(i) / SPREAD;
      advance(i, to_float(shared.steering.kept[0][r][c]), to_float(shared.steering.kept[1][r][c]), B);
    }
  }
  __device__ __forceinline__ void keep_inputs(int l, int r) const {
    IO* const to = model.kept_inputs + ((int64)2 * l * model.kept_rows + at.first + r) * CHANNELS + at.channel;
    const int pair = thread % 128;
    if (pair >= at.own / 2) return;
    reinterpret_cast<unsigned*>(to)[pair] = reinterpret_cast<const unsigned*>(shared.steering.dt[r])[pair];
    reinterpret_cast<unsigned*>(to + model.kept_rows * CHANNELS)[pair] = reinterpret_cast<const unsigned*>(shared.x[r])[pair];
  }

  // A step of the states that were taken, which are those of row r.
  __device__ __forceinline__ void scan_row(int l, int r) {
    if (r >= at.rows) return;
    if (DEFERS && shared.turns[r] == REPEATS) repeat_row(r);
    const int n = thread % SPREAD * LANE_STATES;
    float steps[TURNS], us[TURNS], gates[ENDS], ended_us[ENDS];
#pragma unroll
    for (int i = 0; i < TURNS; ++i) {
      const int c = scanned(i) / SPREAD;
      steps[i] = to_float(shared.steering.dt[r][c]), us[i] = to_float(shared.x[r][c]);
    }
#pragma unroll
    for (int i = 0; i < ENDS; ++i) {
      const int c = min(ended(i), at.own - 1);
      ended_us[i] = to_float(shared.x[r][c]), gates[i] = to_float(shared.z[r][c]);
    }
    const Vector<float, LANE_STATES> B = ::read<LANE_STATES>(&shared.steering.bc[r][n]), C = ::read<LANE_STATES>(&shared.steering.bc[r][D_STATE + n]);
    float sums[TURNS];
#pragma unroll
    for (int i = 0; i < TURNS; ++i) {
      advance(i, steps[i], us[i], B);
      sums[i] = 0.0f;
#pragma unroll
      for (int s = 0; s < LANE_STATES; ++s) sums[i] = fmaf(C.items[s], states[i].items[s], sums[i]);
    }
    float ys[ENDS];
#pragma unroll
    for (int i = 0; i < ENDS; ++i)
      ys[i] = fmaf(skips[i], ended_us[i], sum_of_four(sums + SPREAD * i, TURNS - SPREAD * i)) * gates[i] * sigmoid_of(gates[i]);
#pragma unroll
    for (int i = 0; i < ENDS; ++i)
      if (ended(i) < at.own) shared.z[r][ended(i)] = from_float<IO>(ys[i]);
    if (DEFERS && shared.turns[r] == KEEPS) keep_inputs(l, r);
  }
  __device__ __forceinline__ void write_states_of(const Layer& layer, int r) const {
    if (r >= at.rows || (DEFERS && shared.turns[r] == KEEPS)) return;
    float* const to = layer.ssm_state + (at.first + r) * model.ssm_batch + (int64)at.channel * D_STATE;
#pragma unroll
    for (int i = 0; i < TURNS; ++i)
      if (is_scanned(i)) write_whole(to + scanned(i) * LANE_STATES, states[i].items);
  }

  // The first states have been taken. Writing the last ones does not keep y waiting.
  __device__ __forceinline__ void scan(const Layer& layer, int l) {
    const int last = at.state_slots() - 1;
#pragma unroll 1
    for (int slot = 0; slot < last; ++slot) {
      scan_row(l, row_of_slot(slot));
      write_states_of(layer, row_of_slot(slot));
      take_states();
    }
    if (last >= 0) scan_row(l, row_of_slot(last));
    meet();
    free_sums();  // where what steered the scan was
    for (int i = thread; i < at.rows * (OWN / 8); i += THREADS) {
      const int r = i / (OWN / 8), c = i % (OWN / 8) * 8;
      if (c >= at.own) continue;
      IO* const to = model.y_memory + (int64)(at.first + r) * CHANNELS + at.channel + c;
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(&shared.z[r][c]);
    }
    meet();
    if (thread == 0) count_up(model.counts->ys[at.cluster]), shared.counted.arrive();
    if (last >= 0) write_states_of(layer, row_of_slot(last));
  }

  // A warp has whole rows of what this block has of the stream, to which add(r, m) is added. What does not exist adds what does, so
  // that all is read at once.
  template <class Add> __device__ __forceinline__ void add_to_stream(Add add) {
    float squares[ROW_TURNS] = {};
#pragma unroll
    for (int turn = 0; turn < ROW_TURNS; ++turn) {
      const int r = row_of(turn);
      const float prior = shared.prior[r];
#pragma unroll
      for (int i = 0; i < COLUMN_TURNS; ++i) {
        const int m = min(lane + 32 * i, at.columns() - 1);
        const float sum = stream[turn][i] + add(r, m);
        stream[turn][i] = sum;
        if (!is_mine(turn) || lane + 32 * i >= at.columns()) continue;
        squares[turn] = fmaf(sum, sum, squares[turn]);
        model.x_memory[(int64)(at.first + r) * WIDTH + at.column() + m] = from_float<IO>(sum * prior * norm[i]);
      }
    }
#pragma unroll
    for (int turn = 0; turn < ROW_TURNS; ++turn) {
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) squares[turn] += __shfl_xor_sync(~0u, squares[turn], offset);
      if (lane > 0 || !is_mine(turn)) continue;
      const int b = at.first + row_of(turn);
      model.squares[b * 32 + at.cluster] = squares[turn];
      if (at.cluster == 0) model.priors[b] = shared.prior[row_of(turn)];
    }
    meet();
    if (thread == 0) count_up(model.counts->streams[at.cluster]);
  }
  __device__ __forceinline__ bool is_mine(int turn) const { return warp + turn * WARPS < at.rows; }
  __device__ __forceinline__ int row_of(int turn) const { return is_mine(turn) ? warp + turn * WARPS : 0; }

  __device__ __forceinline__ void embed() {
    if (thread < at.rows) {
      shared.prior[thread] = 1.0f;
      if (DEFERS) shared.turns[thread] = model.turns[at.first + thread];
    }
    meet();
#pragma unroll
    for (int i = 0; i < COLUMN_TURNS; ++i) norm[i] = to_float(model.layers[0].norm[at.column() + min(lane + 32 * i, at.columns() - 1)]);
    add_to_stream([&](int r, int m) {
      const int64 token = model.tokens[min(at.first + r, at.batch - 1)];
      if (token < 0 || token >= model.vocab) __trap();  // as PyTorch's own lookup does
      return to_float(model.embedding[token * WIDTH + at.column() + m]);
    });
  }

  __device__ __forceinline__ void out_proj() {
    WarpgroupSums<COLUMNS> sums[TILES];
    for (int i = 0; i < CHANNELS / CLUSTER / (2 * BOX); ++i) {
      const char* const w = weights.await_slot();
#pragma unroll
      for (int box = 0; box < 2; ++box) {
        const char* const x = xs.await_slot();
        WarpgroupSums<COLUMNS>& own = sums[box % TILES];
        if (TILES > 1 || group == box) {
          own.multiply(x + tile * 8192, w + box * (SLOT / 2));
          own.template await<0>();
        }
        xs.release();
      }
      weights.release();
    }
    if (TILES > 1) sums[0].add(sums[TILES - 1]);
    hand_out<0, COLUMNS>(sums[0], TILES > 1 ? at.rank : 2 * at.rank + group, HALF_PITCH, 0);
    if (thread < at.rows) shared.prior[thread] = shared.scales[thread];
    meet();
    await_sums(at.rows * COLUMNS * 4 * (SOURCES / CLUSTER));
    add_to_stream([&](int r, int m) {
      float sum = 0.0f;
      const float* const from = &shared.sums[r * HALF_PITCH + place_of(m / 2 * 2) + m % 2];
#pragma unroll
      for (int source = 0; source < SOURCES; source += SOURCES / CLUSTER) {
        float part = from[source * SHARE * HALF_PITCH];
        if (TILES == 1) part += from[(source + 1) * SHARE * HALF_PITCH];
        sum += part;
      }
      return sum;
    });
    free_sums();
  }

  // By now all blocks have read whose turn it was.
  __device__ __forceinline__ void take_turns() {
    if (DEFERS && at.cluster == 0 && thread < at.rows) model.turns[at.first + thread] = shared.turns[thread] == KEEPS ? REPEATS : KEEPS;
  }

  __device__ __forceinline__ void head() {
    const int column = TILES > 1 ? 0 : group * N;
    const bool is_even = model.vocab % 2 == 0;  // neighbours are written together
    shared.scaled.await(LAYERS & 1);
    float scales[2];
    int64 rows[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      rows[half] = tile * 64 + warp % 4 * 16 + lane / 4 + 8 * half;
      if (rows[half] < at.batch) scales[half] = shared.factors[rows[half]];
    }
    for (int first = 0; first < at.head_count; first += OWN) {
      WarpgroupSums<N> sums;
      product(sums, WIDTH / BOX);
      const int count = (int)min((int64)min(OWN, at.head_count - first), model.vocab - at.head_first - first);
      sums.each([&](int half, int more, float one, float two) {
        const int row = column + more + lane % 4 * 2;
        if (rows[half] >= at.batch) return;
        IO* const to = model.logits + rows[half] * model.vocab + at.head_first + first + row;
        one *= scales[half], two *= scales[half];
        if (is_even && row < count) *reinterpret_cast<unsigned*>(to) = pack<IO>(one, two);
        if (is_even) return;
        if (row < count) to[0] = from_float<IO>(one);
        if (row + 1 < count) to[1] = from_float<IO>(two);
      });
    }
  }
};

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS + 128, 1)
decode_rows(const __grid_constant__ Model model) {
  extern __shared__ __align__(1024) char memory[];
  char* const x_memory = memory + SLOTS * SLOT;
  Shared& shared = *reinterpret_cast<Shared*>(x_memory + X_SLOTS * X_SLOT);
  if (threadIdx.x == 0) {
    shared.weights.make(WARPS), shared.xs.make(WARPS);
    shared.received.make(1), shared.freed.make(CLUSTER * WARPS), shared.scaled.make(1), shared.projected.make(WARPS), shared.counted.make(1);
    BlockBarrier::publish();
  }
  __syncthreads();
  cluster_arrive(), cluster_wait();
  const Place at(model);
  // Together no more registers than the block was launched with, 168 a thread, or those that ask for more wait for ever.
  if (threadIdx.x >= THREADS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 104;");
    const int warp = threadIdx.x / 32 - WARPS;
    if (warp == 0) send_weights({memory, shared.weights}, shared, model, at);
    else if (warp == 1) send_x({x_memory, shared.xs}, model, at);
    else help(shared, model, at, warp - 2);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 200;");
    Block block{model, shared, at, {memory, shared.weights}, {x_memory, shared.xs}};
    block.embed();
#pragma unroll 1
    for (int l = 0; l < LAYERS; ++l) {
      const Layer& layer = model.layers[l];
      block.forget_addresses();
      block.steer(layer, l);
      block.forget_addresses();
      block.scan(layer, l);
      block.forget_addresses();
      block.out_proj();
    }
    block.take_turns();
    block.head();
  }
  __syncwarp();
  cluster_arrive(), cluster_wait();  // no block leaves while others write to it
}
