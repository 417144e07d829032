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
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int group = warp / 4, tile = TILES > 1 ? group : 0;  // which warpgroup, and which 64 rows of the batch it multiplies
  unsigned turn = 0;  // of exchanges of sums
  static constexpr int SPAN = OWN / 2;  // rows of a matrix whose sums are handed out together
  static constexpr int TURNS = (OWN * SPREAD + THREADS - 1) / THREADS, COLUMN_TURNS = (COLUMNS + 31) / 32;
  static constexpr int ROW_TURNS = (SHARE + WARPS - 1) / WARPS;
  float rates[TURNS][LANE_STATES], skips[TURNS];  // of the scan
  float norm[COLUMN_TURNS];                       // the weights of the next one
  float stream[ROW_TURNS][COLUMN_TURNS] = {};     // of the residual stream, what this lane has

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
    if (threadIdx.x == 0) shared.received.arrive_for(CLUSTER * bytes);
    shared.received.await(turn);
  }
  __device__ __forceinline__ void free_sums() {
    arrive_everywhere(shared.freed);
    turn ^= 1;
  }

  static constexpr int N = TILES > 1 ? OWN : SPAN;  // rows of in_proj and the head of a warpgroup

  // Their products, so many boxes along k.
  __device__ __forceinline__ void product(WarpgroupSums<N>& sums, int boxes) {
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

  // Half of in_proj: x or z. do_for(which channels: from this one on, PART) when the sums are there.
  template <class Do> __device__ __forceinline__ void half_of_in_proj(Do do_for) {
    WarpgroupSums<N> sums;
    product(sums, WIDTH / CLUSTER / BOX);
    const int column = TILES > 1 ? 0 : group * N;
    hand_out<0, N / ROUNDS>(sums, at.rank, PITCH, column);
    do_for(0);
    if constexpr (ROUNDS > 1) {
      hand_out<N / 2, N>(sums, at.rank, PITCH, column);
      do_for(PART);
    }
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

  __device__ __forceinline__ void in_proj_and_convolution(const Layer& layer, int l) {
    constexpr int PAIRS = PART / 2, TOGETHER = THREADS / PAIRS;
    const int c = threadIdx.x % PAIRS * 2, r0 = threadIdx.x / PAIRS;
    half_of_in_proj([&](int from) {
      const int count = min(PART, at.own - from), state = count * PAST;
      IO* const states = reinterpret_cast<IO*>(weights.await_slot());
      if (from == 0) shared.scaled.await(l & 1);
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
      const int pieces = state * (int)sizeof(IO) / 16;
      for (int r = warp; r < at.rows; r += WARPS) {
        uint4* const to = reinterpret_cast<uint4*>(layer.conv_state + (at.first + r) * model.conv_batch + (at.channel + from) * PAST);
        for (int i = lane; i < pieces; i += 32) to[i] = reinterpret_cast<const uint4*>(states + r * state)[i];
      }
      weights.release();
    });
  }

  // Rows of a matrix that were sent whole, by rows of A in shared memory; end(row of A, row of the matrix, two sums).
  template <int COLUMNS_OF, class End> __device__ __forceinline__ void few(const IO* A, int rows, int columns, End end) {
    constexpr int LINE = COLUMNS_OF * 2 + 16;
    const int g = lane / 4, t = lane % 4;
    for (int start = 0; start < rows; start += few_rows(COLUMNS_OF)) {
      const char* const slot = weights.await_slot();
      const int count = min(few_rows(COLUMNS_OF), rows - start);
      for (int n = 8 * warp; n < count; n += 8 * WARPS)
#pragma unroll 1
        for (int m = 0; m < TILE_ROWS; m += 16) {
          const char* const a = reinterpret_cast<const char*>(A) + (m + lane % 16) * LINE + lane / 16 * 16;
          const char* const b = slot + (n + lane % 8) * LINE + lane / 8 * 16;
          float sums[4] = {}, odd[4] = {};
          const auto exists = [&](int k) { return k < 2 * COLUMNS_OF - 32 || k < 2 * columns; };  // at most sixteen are missing
#pragma unroll
          for (int k = 0; k < 2 * COLUMNS_OF; k += 64) {  // two products
            const uint4 words = read_matrices(b + k), first = read_matrices(a + k);
            if (exists(k)) multiply_add<IO>(sums, first, words.x, words.y);
            if (k + 32 >= 2 * COLUMNS_OF) break;
            const uint4 second = read_matrices(a + k + 32);
            if (exists(k + 32)) multiply_add<IO>(odd, second, words.z, words.w);
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[i] += odd[i];
          end(m + g, start + n + 2 * t, sums[0], sums[1]);
          end(m + g + 8, start + n + 2 * t, sums[2], sums[3]);
        }
      weights.release();
    }
  }

  __device__ __forceinline__ void x_proj() {
    float* const to = model.partials + ((int64)at.cluster * at.batch + at.first) * STEERING;
    few<OWN>(&shared.x[0][0], STEERING, at.own, [&](int r, int row, float first, float second) {
      if (r < at.rows) *reinterpret_cast<float2*>(to + r * STEERING + row) = float2{first, second};
    });
    __syncwarp();
    if (lane == 0) shared.projected.arrive();
  }

  __device__ __forceinline__ void z() {
    half_of_in_proj([&](int from) {
      await_sums(at.rows * PART * 4);
#pragma unroll 2
      for (int i = threadIdx.x; i < at.rows * (PART / 2); i += THREADS) {
        const int r = i / (PART / 2), c = i % (PART / 2) * 2;
        const Vector<float, 2> sums = sums_at(r, c);
        *reinterpret_cast<unsigned*>(&shared.z[r][from + c]) = pack<IO>(sums.items[0], sums.items[1]);
      }
      free_sums();
    });
  }

  // A slot of small things that are needed from now on.
  __device__ __forceinline__ void receive_parameters() {
    const float* const log_rates = reinterpret_cast<const float*>(weights.await_slot());
    const float* const others = log_rates + at.own * D_STATE;
#pragma unroll
    for (int i = 0; i < TURNS; ++i) {
      const int place = min(i * THREADS + (int)threadIdx.x, at.own * SPREAD - 1);
      const Vector<float, LANE_STATES> read = ::read<LANE_STATES>(log_rates + place * LANE_STATES);
#pragma unroll
      for (int s = 0; s < LANE_STATES; ++s) rates[i][s] = -expf(read.items[s]) * LOG2_E;
      skips[i] = others[place / SPREAD];
    }
    if (threadIdx.x < at.own) shared.biases[threadIdx.x] = others[at.own + threadIdx.x];
#pragma unroll
    for (int i = 0; i < COLUMN_TURNS; ++i)
      norm[i] = to_float(reinterpret_cast<const IO*>(others + 2 * at.own)[min(lane + 32 * i, at.columns() - 1)]);
    weights.release();
  }

  __device__ __forceinline__ void receive_steering(int l) {
    await_count(model.counts->steering[at.rank], HELPERS * CLUSTERS * (l + 1));
    constexpr int EACH = STEERING / 8;
    for (int i = threadIdx.x; i < at.rows * EACH; i += THREADS) {
      const int r = i / EACH, s = i % EACH * 8;
      const uint4 words = read_fresh(reinterpret_cast<const uint4*>(model.steering + (int64)(at.first + r) * STEERING + s));
      if (s < RANK) *reinterpret_cast<uint4*>(&shared.low[r][s]) = words;
      else {
        const unsigned word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int j = 0; j < 4; ++j)
          shared.bc[r][s - RANK + 2 * j] = low_float<IO>(word[j]), shared.bc[r][s - RANK + 2 * j + 1] = high_float<IO>(word[j]);
      }
    }
    meet();
  }

  __device__ __forceinline__ void dt_proj() {
    few<RANK>(&shared.low[0][0], at.own, RANK, [&](int r, int c, float first, float second) {
      if (r >= at.rows) return;
      shared.dt[r][c] = from_float<IO>(softplus(first + shared.biases[c]));
      shared.dt[r][c + 1] = from_float<IO>(softplus(second + shared.biases[c + 1]));
    });
    meet();
  }

  __device__ __forceinline__ void scan(const Layer& layer) {
    for (int slot = 0; slot < at.state_slots(); ++slot) {
      const char* const states = weights.await_slot();
      // All is read before anything is written, so that nothing has to be in order.
      Vector<float, LANE_STATES> before[STATE_ROWS][TURNS];
      float steps[STATE_ROWS][TURNS], us[STATE_ROWS][TURNS], gates[STATE_ROWS][TURNS];
      const int n = threadIdx.x % SPREAD * LANE_STATES;
#pragma unroll
      for (int j = 0; j < STATE_ROWS; ++j)
#pragma unroll
        for (int i = 0; i < TURNS; ++i) {
          const int r = min(slot * STATE_ROWS + j, at.rows - 1), place = min(i * THREADS + (int)threadIdx.x, at.own * SPREAD - 1);
          const int c = place / SPREAD;
          before[j][i] = ::read<LANE_STATES>(
              reinterpret_cast<const float*>(states) + (r - slot * STATE_ROWS) * (at.own * D_STATE) + place * LANE_STATES);
          steps[j][i] = to_float(shared.dt[r][c]), us[j][i] = to_float(shared.x[r][c]), gates[j][i] = to_float(shared.z[r][c]);
        }
      float ys[STATE_ROWS][TURNS];
#pragma unroll
      for (int j = 0; j < STATE_ROWS; ++j) {
        const int r = min(slot * STATE_ROWS + j, at.rows - 1);
        float* const to = layer.ssm_state + (at.first + r) * model.ssm_batch + (int64)at.channel * D_STATE;
        const Vector<float, LANE_STATES> B = ::read<LANE_STATES>(&shared.bc[r][n]), C = ::read<LANE_STATES>(&shared.bc[r][D_STATE + n]);
#pragma unroll
        for (int i = 0; i < TURNS; ++i) {
          float h[LANE_STATES], sum = 0.0f;
#pragma unroll
          for (int s = 0; s < LANE_STATES; ++s) {
            h[s] = fmaf(exp2_approx(steps[j][i] * rates[i][s]), before[j][i].items[s], steps[j][i] * us[j][i] * B.items[s]);
            sum = fmaf(C.items[s], h[s], sum);
          }
          sum += __shfl_xor_sync(~0u, sum, 2);
          sum += __shfl_xor_sync(~0u, sum, 1);
          ys[j][i] = fmaf(skips[i], us[j][i], sum) * gates[j][i] * sigmoid_of(gates[j][i]);
          const int place = i * THREADS + threadIdx.x;
          if (place < at.own * SPREAD && slot * STATE_ROWS + j < at.rows) write(to + place * LANE_STATES, h);
        }
      }
#pragma unroll
      for (int j = 0; j < STATE_ROWS; ++j)
#pragma unroll
        for (int i = 0; i < TURNS; ++i) {
          const int r = slot * STATE_ROWS + j, place = i * THREADS + threadIdx.x;
          if (n == 0 && place < at.own * SPREAD && r < at.rows) shared.z[r][place / SPREAD] = from_float<IO>(ys[j][i]);
        }
      weights.release();
    }
    meet();
    for (int i = threadIdx.x; i < at.rows * (OWN / 8); i += THREADS) {
      const int r = i / (OWN / 8), c = i % (OWN / 8) * 8;
      if (c >= at.own) continue;
      IO* const to = model.y_memory + (int64)(at.first + r) * CHANNELS + at.channel + c;
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(&shared.z[r][c]);
    }
    meet();
    if (threadIdx.x == 0) count_up(model.counts->ys[at.cluster]);
  }

  // A warp has whole rows of what this block has of the stream, to which add(r, m) is added.
  template <class Add> __device__ __forceinline__ void add_to_stream(Add add) {
#pragma unroll
    for (int turn = 0; turn < ROW_TURNS; ++turn) {
      const int r = warp + turn * WARPS, b = at.first + r;
      if (r >= at.rows) break;
      float squares = 0.0f;
      const float prior = shared.prior[r];
#pragma unroll
      for (int i = 0; i < COLUMN_TURNS; ++i) {
        const int m = lane + 32 * i;
        if (m >= at.columns()) break;
        const float sum = stream[turn][i] + add(r, m);
        stream[turn][i] = sum;
        squares = fmaf(sum, sum, squares);
        model.x_memory[(int64)b * WIDTH + at.column() + m] = from_float<IO>(sum * prior * norm[i]);
      }
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) squares += __shfl_xor_sync(~0u, squares, offset);
      if (lane == 0) {
        model.squares[b * 32 + at.cluster] = squares;
        if (at.cluster == 0) model.priors[b] = prior;
      }
    }
    meet();
    if (threadIdx.x == 0) count_up(model.counts->streams[at.cluster]);
  }

  __device__ __forceinline__ void embed() {
    if (threadIdx.x < at.rows) shared.prior[threadIdx.x] = 1.0f;
    meet();
#pragma unroll
    for (int i = 0; i < COLUMN_TURNS; ++i) norm[i] = to_float(model.layers[0].norm[at.column() + min(lane + 32 * i, at.columns() - 1)]);
    add_to_stream([&](int r, int m) {
      const int64 token = model.tokens[at.first + r];
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
    if (threadIdx.x < at.rows) shared.prior[threadIdx.x] = shared.scales[threadIdx.x];
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

  __device__ __forceinline__ void head() {
    const int column = TILES > 1 ? 0 : group * N;
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
        if (row < count) to[0] = from_float<IO>(one * scales[half]);
        if (row + 1 < count) to[1] = from_float<IO>(two * scales[half]);
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
    shared.received.make(1), shared.freed.make(CLUSTER * WARPS), shared.scaled.make(1), shared.projected.make(WARPS);
    BlockBarrier::publish();
  }
  __syncthreads();
  cluster_arrive(), cluster_wait();
  const Place at(model);
  if (threadIdx.x >= THREADS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 88;");
    const int warp = threadIdx.x / 32 - WARPS;
    if (warp == 0) send_weights({memory, shared.weights}, model, at);
    else if (warp == 1) send_x({x_memory, shared.xs}, model, at);
    else help(shared, model, at, warp - 2);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 208;");
    Block block{model, shared, at, {memory, shared.weights}, {x_memory, shared.xs}};
    block.embed();
#pragma unroll 1
    for (int l = 0; l < LAYERS; ++l) {
      const Layer& layer = model.layers[l];
      block.in_proj_and_convolution(layer, l);
      block.x_proj();
      block.z();
      block.receive_parameters();
      block.receive_steering(l);
      block.dt_proj();
      block.scan(layer);
      block.out_proj();
    }
    block.head();
  }
  __syncwarp();
  cluster_arrive(), cluster_wait();  // no block leaves while others write to it
}
