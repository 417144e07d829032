constexpr int CLUSTER = 4;                       // blocks, each with a part of k
constexpr int WARPS = 8, THREADS = 32 * WARPS;   // that take
constexpr int BOX = 64;                          // numbers along k of a box, whose rows are 128 bytes, turned (a swizzle of 128 bytes)
constexpr int UNITS = CHANNELS / 16;             // of 16 channels and 8 columns of the stream, of which a cluster has some
constexpr int OWN = 16 * ((UNITS + CLUSTERS - 1) / CLUSTERS), COLUMNS = OWN / 2;  // of a cluster at most: channels, columns
constexpr int SLOT = OWN * 128, X_SLOT = BATCH * 128;
constexpr int TILES = BATCH > 64 ? 2 : 1;        // of 64 rows of the batch
constexpr int SHARE = BATCH / CLUSTER;           // rows of the batch that a block ends, at most

#include "clusters.cuh"
#include "decode_functions.cuh"
#include "stream.cuh"
#include "warpgroup_sums.cuh"

constexpr int STEERING = RANK + 2 * D_STATE;
constexpr int LANE_STATES = 4, SPREAD = D_STATE / LANE_STATES;
constexpr int PAST = TAPS - 1;
constexpr int STATE_ROWS = SLOT / (OWN * D_STATE * 4);
static_assert(STATE_ROWS >= 1 && SPREAD == 4 && CHANNELS == 2 * WIDTH && OWN % 16 == 0 && RANK % 16 == 0);

// Of in_proj, half of the channels at a time where there are many rows, or there would be no room.
constexpr int ROUNDS = TILES, PART = OWN / ROUNDS, PITCH = PART + 8;
static_assert(PART * (SHARE * PAST + TAPS + 1) * 2 <= SLOT);

struct Layer {
  const IO *norm, *conv, *conv_bias, *x_proj, *dt_proj;
  const float *dt_bias, *A_log, *D;
  IO* conv_state;     // (B, D, W - 1)
  float* ssm_state;   // (B, D, N), contiguous in D and N
};

// How many blocks have come to a point of the step: of each cluster, or of each rank. A line for each.
struct Counts { unsigned count[32][32]; };

struct Model {
  TensorMap in_proj[LAYERS], out_proj[LAYERS], head, x, y;  // boxes of OWN, COLUMNS, 16, BATCH and BATCH rows
  Layer layers[LAYERS];
  const TOKEN* tokens;
  const IO *embedding, *norm_f;
  IO* logits;                             // (B, V)
  IO *x_memory, *y_memory, *steering;     // (B, M), (B, D), (B, R + 2 N)
  float *partials, *squares, *priors;     // (32, B, R + 2 N), (B, 32), (B)
  Counts* counts;                         // of streams and ys, of each cluster; of partials and steering, of each rank
  int64 batch, vocab, conv_batch, conv_channel, conv_tap, ssm_batch;
  double eps[LAYERS + 1];
#ifdef PROFILE
  float* profile;
#endif
};

constexpr int HALF_PITCH = COLUMNS + 8, SOURCES = TILES > 1 ? CLUSTER : 2 * CLUSTER;  // of out_proj: warpgroups
constexpr int SUMS = SHARE * (CLUSTER * PITCH > SOURCES * HALF_PITCH ? CLUSTER * PITCH : SOURCES * HALF_PITCH);
constexpr int TILE_ROWS = SHARE < 16 ? 16 : SHARE;

struct Shared {
  alignas(16) float sums[SUMS];           // of the blocks of the cluster, for the rows that this block ends
  alignas(16) IO x[TILE_ROWS][OWN + 8];
  alignas(16) IO z[SHARE][OWN + 8];       // and then y
  alignas(16) IO low[TILE_ROWS][RANK + 8];
  alignas(16) float bc[SHARE][2 * D_STATE];
  IO dt[SHARE][OWN];
  float residual[SHARE][COLUMNS];
  float biases[OWN];                      // of dt
  float scales[BATCH], factors[BATCH];    // of the norm, and by which sums are multiplied
  float prior[SHARE];                     // by which x has been multiplied
  RingBarriers<SLOTS> weights;
  RingBarriers<X_SLOTS> xs;
  BlockBarrier received, freed, scaled, projected;
  float profile[24];
  long long last;
};
#ifdef PROFILE
#define MARK(i) if (threadIdx.x == 0) { const long long now = clock64(); shared.profile[i] += now - shared.last; shared.last = now; }
#else
#define MARK(i)
#endif
static_assert(SLOTS * SLOT + X_SLOTS * X_SLOT + sizeof(Shared) <= SHARED && SLOTS * SLOT + X_SLOTS * X_SLOT + 8192 <= SHARED);

// The barrier of those that take.
__device__ __forceinline__ void meet() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }

struct Place {
  int cluster = blockIdx.x / CLUSTER, rank = blockIdx.x % CLUSTER;
  int channel, own;               // of this cluster: the first channel, and how many
  int batch, share, first, rows;  // of the batch: rows; of a block; the first one of this block; how many it has
  int head_first, head_count;     // rows of the head of this block

  __device__ __forceinline__ Place(const Model& model) : batch((int)model.batch) {
    const int unit = UNITS * cluster / CLUSTERS;
    channel = 16 * unit, own = 16 * (UNITS * (cluster + 1) / CLUSTERS - unit);
    share = (batch + CLUSTER - 1) / CLUSTER;
    first = rank * share;
    rows = max(0, min(share, batch - first));
    const int units = (int)((model.vocab + 15) / 16), block = blockIdx.x, blocks = CLUSTER * CLUSTERS;
    head_first = (int)((int64)units * block / blocks) * 16;
    head_count = (int)((int64)units * (block + 1) / blocks) * 16 - head_first;
  }
  __device__ __forceinline__ int column() const { return channel / 2; }
  __device__ __forceinline__ int columns() const { return own / 2; }
  __device__ __forceinline__ int state_slots() const { return (rows + STATE_ROWS - 1) / STATE_ROWS; }
};

__device__ constexpr int few_rows(int columns) { return SLOT / (columns * 2 + 16) / 8 * 8; }  // in a slot, with a gap after each

// The weights and states of this block, in the order of their use.
__device__ __forceinline__ void send_weights(Sender<SLOTS, SLOT> ring, const Model& model, const Place& at) {
  const int lane = threadIdx.x % 32, k = at.rank * (WIDTH / CLUSTER), long_k = at.rank * (CHANNELS / CLUSTER);
#pragma unroll 1
  for (int l = 0; l < LAYERS; ++l) {
    const Layer& layer = model.layers[l];
    const auto half = [&](int row) {
#pragma unroll 1
      for (int i = 0; i < WIDTH / CLUSTER / BOX; ++i)
        ring.send(at.own * 128, [&](BlockBarrier& full, char* to) {
          if (lane < at.own / 16) full.copy_box(to + lane * 16 * 128, model.in_proj[l], k + i * BOX, row + lane * 16);
        });
    };
    const auto few = [&](const IO* from, int rows, int most_columns, int columns, int stride) {
#pragma unroll 1
      for (int first = 0; first < rows; first += few_rows(most_columns)) {
        const int count = min(few_rows(most_columns), rows - first);
        ring.send(count * columns * 2, [&](BlockBarrier& full, char* to) {
#pragma unroll 1
          for (int row = lane; row < count; row += 32)
            full.copy(to + row * (most_columns * 2 + 16), from + (int64)(first + row) * stride, columns * 2);
        });
      }
    };
    half(at.channel);
    for (int from = 0; from < at.own; from += PART) {
      const int count = min(PART, at.own - from), state = count * PAST * 2;
      ring.send(at.rows * state + count * (TAPS + 1) * 2, [&](BlockBarrier& full, char* to) {
#pragma unroll 1
        for (int row = lane; row < at.rows; row += 32)
          full.copy(to + row * state, layer.conv_state + (at.first + row) * model.conv_batch + (at.channel + from) * PAST, state);
        to += at.rows * state;
        if (lane == 0) full.copy(to, layer.conv + (at.channel + from) * TAPS, count * TAPS * 2);
        if (lane == 1) full.copy(to + count * TAPS * 2, layer.conv_bias + at.channel + from, count * 2);
      });
    }
    few(layer.x_proj + at.channel, STEERING, OWN, at.own, CHANNELS);
    half(CHANNELS + at.channel);
    ring.send(at.own * ((D_STATE + 2) * 4 + 1), [&](BlockBarrier& full, char* to) {
      const IO* const norm = l + 1 < LAYERS ? model.layers[l + 1].norm : model.norm_f;
      if (lane == 0) full.copy(to, layer.A_log + at.channel * D_STATE, at.own * D_STATE * 4);
      if (lane == 1) full.copy(to + at.own * D_STATE * 4, layer.D + at.channel, at.own * 4);
      if (lane == 2) full.copy(to + at.own * (D_STATE + 1) * 4, layer.dt_bias + at.channel, at.own * 4);
      if (lane == 3) full.copy(to + at.own * (D_STATE + 2) * 4, norm + at.column(), at.own);
    });
    few(layer.dt_proj + (int64)at.channel * RANK, at.own, RANK, RANK, RANK);
#ifndef NO_STATES
#pragma unroll 1
    for (int i = 0; i < at.state_slots(); ++i) {
      const int count = min(STATE_ROWS, at.rows - i * STATE_ROWS);
      ring.send(count * at.own * D_STATE * 4, [&](BlockBarrier& full, char* to) {
        if (lane < count)
          full.copy(to + lane * (at.own * D_STATE * 4),
                    layer.ssm_state + (at.first + i * STATE_ROWS + lane) * model.ssm_batch + (int64)at.channel * D_STATE,
                    at.own * D_STATE * 4);
      });
    }
#endif
#pragma unroll 1
    for (int i = 0; i < CHANNELS / CLUSTER / (2 * BOX); ++i)
      ring.send(at.own * 128, [&](BlockBarrier& full, char* to) {
        const int unit = lane / 2, box = lane % 2;
        if (unit < at.own / 16)
          full.copy_box(to + box * (SLOT / 2) + unit * 8 * 128, model.out_proj[l], long_k + (2 * i + box) * BOX, at.column() + unit * 8);
      });
  }
  for (int first = 0; first < at.head_count; first += OWN) {
    const int boxes = min(OWN, at.head_count - first) / 16;
#pragma unroll 1
    for (int i = 0; i < WIDTH / BOX; ++i)
      ring.send(boxes * 16 * 128, [&](BlockBarrier& full, char* to) {
        if (lane < boxes) full.copy_box(to + lane * 16 * 128, model.head, i * BOX, at.head_first + first + lane * 16);
      });
  }
}

// Clusters have come: a whole warp.
__device__ __forceinline__ void await_clusters(const Counts& counts, unsigned wanted, int from, int to) {
#ifndef NO_COUNTS
  if (const int cluster = from + threadIdx.x % 32; cluster < to) await_count_alone(counts.count[cluster], wanted);
  __syncwarp();
#endif
}

// x of each product, for which other blocks are waited for.
__device__ __forceinline__ void send_x(Sender<X_SLOTS, X_SLOT> ring, const Model& model, const Place& at) {
  const int lane = threadIdx.x % 32;
  int from = 0, to = 0;  // clusters that make this block's part of k
  for (int c = 0; c < CLUSTERS; ++c) {
    const int end = UNITS * (c + 1) / CLUSTERS * CLUSTER;
    if (end <= UNITS * at.rank) from = c + 1;
    if (end < UNITS * (at.rank + 1)) to = c + 1;
  }
  to += 1;
  const auto send = [&](const TensorMap& map, int k, int boxes) {
#pragma unroll 1
    for (int i = 0; i < boxes; ++i)
      ring.send(X_SLOT, [&](BlockBarrier& full, char* to) { if (lane == 0) full.copy_box(to, map, k + i * BOX, 0); });
  };
#pragma unroll 1
  for (int l = 0; l < LAYERS; ++l) {
    await_clusters(model.counts[0], 4 * (l + 1), from, to);
    fence_for_copies();
    for (int half = 0; half < 2; ++half) send(model.x, at.rank * (WIDTH / CLUSTER), WIDTH / CLUSTER / BOX);
    await_clusters(model.counts[3], 4 * (l + 1), from, to);
    fence_for_copies();
    send(model.y, at.rank * (CHANNELS / CLUSTER), CHANNELS / CLUSTER / BOX);
  }
  await_clusters(model.counts[0], 4 * (LAYERS + 1), 0, CLUSTERS);
  fence_for_copies();
  for (int first = 0; first < at.head_count; first += OWN) send(model.x, 0, WIDTH / BOX);
}

// Scales of the norm, of `rows` rows from `first` on: a warp, a lane a cluster's part of the sum of squares.
__device__ __forceinline__ void find_scales(Shared& shared, const Model& model, int l, int first, int rows) {
  const int lane = threadIdx.x % 32;
  for (int start = 0; start < rows; start += 8) {
    float parts[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) parts[i] = start + i < rows && lane < CLUSTERS ? read_fresh(model.squares + (first + start + i) * 32 + lane) : 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) parts[i] += __shfl_xor_sync(~0u, parts[i], offset);
      if (lane > 0 || start + i >= rows) continue;
      const float scale = 1.0f / sqrtf(parts[i] / WIDTH + (float)model.eps[l]);
      shared.scales[start + i] = scale;
      shared.factors[start + i] = scale / (l < LAYERS ? shared.prior[start + i] : read_fresh(model.priors + start + i));
    }
  }
  __syncwarp();
  if (lane == 0) shared.scaled.arrive();
}

// Two warps that do what nobody should wait for: scales, and sums over all clusters of what steers the scan.
__device__ __forceinline__ void help(Shared& shared, const Model& model, const Place& at, int helper) {
  const int lane = threadIdx.x % 32;
  const int all = at.rows * STEERING, begin = all * (2 * at.cluster + helper) / (2 * CLUSTERS), end = all * (2 * at.cluster + helper + 1) / (2 * CLUSTERS);
  const int64 start = (int64)at.first * STEERING;
#pragma unroll 1
  for (int l = 0; l <= LAYERS; ++l) {
    if (helper == 0) {
      await_clusters(model.counts[0], 4 * (l + 1), 0, CLUSTERS);
      if (l < LAYERS) find_scales(shared, model, l, at.first, at.rows);
      else find_scales(shared, model, l, 0, at.batch);
    }
    if (l == LAYERS) break;
    if (helper == 1) {
      shared.projected.await(l & 1);
      if (lane == 0) count_up(model.counts[1].count[at.rank]);
    }
    await_count(model.counts[1].count[at.rank], CLUSTERS * (l + 1));
#pragma unroll 1
    for (int i = begin + lane; i < end; i += 32) {
      float sum = 0.0f;
      const float* from = model.partials + start + i;
#pragma unroll 1
      for (int c0 = 0; c0 < CLUSTERS; c0 += 16) {
        float parts[16];
#pragma unroll
        for (int c = 0; c < 16; ++c, from += at.batch * STEERING) parts[c] = c0 + c < CLUSTERS ? read_fresh(from) : 0.0f;
#pragma unroll
        for (int c = 0; c < 16; ++c) sum += parts[c];
      }
      model.steering[start + i] = from_float<IO>(sum);
    }
    __syncwarp();
    if (lane == 0) count_up(model.counts[2].count[at.rank]);
  }
}

// What the warps do that take.
struct Block {
  const Model& model;
  Shared& shared;
  const Place at;
  Taker<SLOTS, SLOT> weights;
  Taker<X_SLOTS, X_SLOT> xs;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32, group = warp / 4, tile = TILES > 1 ? group : 0;
  unsigned turn = 0;  // of exchanges of sums
  static constexpr int TURNS = (OWN * SPREAD + THREADS - 1) / THREADS, COLUMN_TURNS = (COLUMNS + 31) / 32;
  float rates[TURNS][LANE_STATES], skips[TURNS];  // of the scan
  float norm[COLUMN_TURNS];                       // the weights of the next one

  __device__ __forceinline__ void arrive_everywhere(BlockBarrier& barrier) {
    __syncwarp();
    if (lane < CLUSTER) barrier.arrive_at(lane);
  }

  // To the blocks that end these rows of the batch.
  template <int FROM, int TO, int N> __device__ __forceinline__ void hand_out(const WarpgroupSums<N>& sums, int source, int pitch, int column) {
    shared.freed.await(turn ^ 1);
    unsigned to[2], heard[2];
    bool exists[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile * 64 + warp % 4 * 16 + lane / 4 + 8 * half, block = row / at.share;
      exists[half] = row < at.batch;
      to[half] = address_in(&shared.sums[(source * SHARE + row - block * at.share) * pitch + column + lane % 4 * 2], exists[half] ? block : 0);
      heard[half] = address_in(&shared.received, exists[half] ? block : 0);
    }
    sums.each([&](int half, int column, float first, float second) {
      if (exists[half] && column >= FROM && column < TO) write_async(to[half] + (column - FROM) * 4, first, second, heard[half]);
    });
  }
  // Of each block of the cluster so many bytes.
  __device__ __forceinline__ void await_sums(int bytes) {
    if (threadIdx.x == 0) shared.received.arrive_for(CLUSTER * bytes);
    shared.received.await(turn);
  }
  __device__ __forceinline__ void free_sums() {
    arrive_everywhere(shared.freed);
    turn ^= 1;
  }

  // Half of in_proj: x or z. do_for(which channels: from this one on, PART) when the sums are there.
  template <class Do> __device__ __forceinline__ void half_of_in_proj(Do do_for) {
    constexpr int N = TILES > 1 ? OWN : OWN / 2;
    const int column = TILES > 1 ? 0 : group * N;
    WarpgroupSums<N> sums;
#pragma unroll 1
    for (int i = 0; i < WIDTH / CLUSTER / BOX; ++i) {
      MARK(0)
      const char *const w = weights.await_slot();
      MARK(1)
      const char *const x = xs.await_slot();
      MARK(2 + (i == 0))
      sums.multiply(x + tile * 8192, w + column * 128);
      if (i == 0) continue;
      sums.template await<1>();
      weights.release(), xs.release();
    }
    sums.template await<0>();
    weights.release(), xs.release();
    MARK(0)
    hand_out<0, N / ROUNDS>(sums, at.rank, PITCH, column);
    do_for(0);
    if constexpr (ROUNDS > 1) {
      hand_out<N / 2, N>(sums, at.rank, PITCH, column);
      do_for(PART);
    }
  }
  // Of two neighbouring channels.
  __device__ __forceinline__ Vector<float, 2> sums_at(int r, int c) const {
    const auto part = [&](int block) { return *reinterpret_cast<const float2*>(&shared.sums[(block * SHARE + r) * PITCH + c]); };
    float2 sum = part(0);
#pragma unroll
    for (int block = 1; block < CLUSTER; ++block) sum.x += part(block).x, sum.y += part(block).y;
    return {sum.x * shared.factors[r], sum.y * shared.factors[r]};
  }

  __device__ __forceinline__ void in_proj_and_convolution(const Layer& layer, int l) {
    constexpr int PAIRS = PART / 2, TOGETHER = THREADS / PAIRS;
    const int c = threadIdx.x % PAIRS * 2, r0 = threadIdx.x / PAIRS;
    half_of_in_proj([&](int from) {
      MARK(4)
      const int count = min(PART, at.own - from), state = count * PAST;
      IO* const states = reinterpret_cast<IO*>(weights.await_slot());
      if (from == 0) shared.scaled.await(l & 1);
      await_sums(at.rows * PART * 4);
      MARK(5)
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
    MARK(6)
  }

  // Rows of a matrix that were sent whole, by rows of A in shared memory; end(row of A, row of the matrix, two sums).
  template <int COLUMNS_OF, class End> __device__ __forceinline__ void few(const IO* A, int rows, int columns, End end) {
    constexpr int LINE = COLUMNS_OF * 2 + 16;
    const int g = lane / 4, t = lane % 4;
    for (int first = 0; first < rows; first += few_rows(COLUMNS_OF)) {
      const char* const slot = weights.await_slot();
      const int count = min(few_rows(COLUMNS_OF), rows - first);
      for (int n = 8 * warp; n < count; n += 8 * WARPS)
#pragma unroll 1
        for (int m = 0; m < TILE_ROWS; m += 16) {
          const char* const a = reinterpret_cast<const char*>(A) + (m + g) * LINE + t * 4;
          const char* const b = slot + (n + g) * LINE + t * 4;
          const auto word = [](const char* from) { return *reinterpret_cast<const unsigned*>(from); };
          float sums[4] = {};
#pragma unroll 5
          for (int k = 0; k < columns * 2; k += 32)
            multiply_add<IO>(sums, uint4{word(a + k), word(a + 8 * LINE + k), word(a + k + 16), word(a + 8 * LINE + k + 16)}, word(b + k), word(b + k + 16));
          end(m + g, first + n + 2 * t, sums[0], sums[1]);
          end(m + g + 8, first + n + 2 * t, sums[2], sums[3]);
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
    MARK(8)
  }

  __device__ __forceinline__ void z() {
    half_of_in_proj([&](int from) {
      MARK(4)
      await_sums(at.rows * PART * 4);
      MARK(5)
#pragma unroll 2
      for (int i = threadIdx.x; i < at.rows * (PART / 2); i += THREADS) {
        const int r = i / (PART / 2), c = i % (PART / 2) * 2;
        const Vector<float, 2> sums = sums_at(r, c);
        *reinterpret_cast<unsigned*>(&shared.z[r][from + c]) = pack<IO>(sums.items[0], sums.items[1]);
      }
      free_sums();
    });
    MARK(9)
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
    await_count(model.counts[2].count[at.rank], 2 * CLUSTERS * (l + 1));
    MARK(10)
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
    MARK(11)
    few<RANK>(&shared.low[0][0], at.own, RANK, [&](int r, int c, float first, float second) {
      if (r >= at.rows) return;
      shared.dt[r][c] = from_float<IO>(softplus(first + shared.biases[c]));
      shared.dt[r][c + 1] = from_float<IO>(softplus(second + shared.biases[c + 1]));
    });
    meet();
  }

  __device__ __forceinline__ void scan(const Layer& layer) {
    MARK(12)
#ifndef NO_STATES
    for (int slot = 0; slot < at.state_slots(); ++slot) {
      MARK(13)
      const char* const states = weights.await_slot();
      MARK(14)
#pragma unroll
      for (int j = 0; j < STATE_ROWS; ++j) {
        const int r = slot * STATE_ROWS + j;
        if (r >= at.rows) break;
        float* const to = layer.ssm_state + (at.first + r) * model.ssm_batch + (int64)at.channel * D_STATE;
#pragma unroll
        for (int i = 0; i < TURNS; ++i) {
          const int place = i * THREADS + threadIdx.x, c = place / SPREAD, n = place % SPREAD * LANE_STATES;
          if (c >= at.own) continue;  // whole warps
          const Vector<float, LANE_STATES> before = ::read<LANE_STATES>(reinterpret_cast<const float*>(states) + j * (at.own * D_STATE) + place * LANE_STATES);
          const float step = to_float(shared.dt[r][c]), u = to_float(shared.x[r][c]);
          const Vector<float, LANE_STATES> B = ::read<LANE_STATES>(&shared.bc[r][n]), C = ::read<LANE_STATES>(&shared.bc[r][D_STATE + n]);
          float h[LANE_STATES], sum = 0.0f;
#pragma unroll
          for (int s = 0; s < LANE_STATES; ++s) {
            h[s] = fmaf(exp2_approx(step * rates[i][s]), before.items[s], step * u * B.items[s]);
            sum = fmaf(C.items[s], h[s], sum);
          }
          sum += __shfl_xor_sync(~0u, sum, 2);
          sum += __shfl_xor_sync(~0u, sum, 1);
          write(to + place * LANE_STATES, h);
          if (n == 0) {
            const float gate = to_float(shared.z[r][c]);
            shared.z[r][c] = from_float<IO>(fmaf(skips[i], u, sum) * gate * sigmoid_of(gate));
          }
        }
      }
      weights.release();
    }
#endif
    meet();
    MARK(13)
    for (int i = threadIdx.x; i < at.rows * (OWN / 8); i += THREADS) {
      const int r = i / (OWN / 8), c = i % (OWN / 8) * 8;
      if (c >= at.own) continue;
      *reinterpret_cast<uint4*>(model.y_memory + (int64)(at.first + r) * CHANNELS + at.channel + c) = *reinterpret_cast<const uint4*>(&shared.z[r][c]);
    }
    meet();
    if (threadIdx.x == 0) count_up(model.counts[3].count[at.cluster]);
    MARK(15)
  }

  // A warp has whole rows of what this block has of the stream: value(r, m).
  template <class Value> __device__ __forceinline__ void write_stream(Value value) {
    for (int r = warp; r < at.rows; r += WARPS) {
      const int b = at.first + r;
      float squares = 0.0f;
      const float prior = shared.prior[r];
#pragma unroll
      for (int i = 0; i < COLUMN_TURNS; ++i) {
        const int m = lane + 32 * i;
        if (m >= at.columns()) break;
        const float sum = value(r, m);
        shared.residual[r][m] = sum;
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
    if (threadIdx.x == 0) count_up(model.counts[0].count[at.cluster]);
  }

  __device__ __forceinline__ void embed() {
    if (threadIdx.x < at.rows) shared.prior[threadIdx.x] = 1.0f;
    meet();
#pragma unroll
    for (int i = 0; i < COLUMN_TURNS; ++i) norm[i] = to_float(model.layers[0].norm[at.column() + min(lane + 32 * i, at.columns() - 1)]);
    write_stream([&](int r, int m) {
      const int64 token = model.tokens[at.first + r];
      if (token < 0 || token >= model.vocab) __trap();  // as PyTorch's own lookup does
      return to_float(model.embedding[token * WIDTH + at.column() + m]);
    });
  }

  __device__ __forceinline__ void out_proj() {
    WarpgroupSums<COLUMNS> sums[TILES];
    for (int i = 0; i < CHANNELS / CLUSTER / (2 * BOX); ++i) {
      MARK(16)
      const char* const w = weights.await_slot();
      MARK(17)
#pragma unroll
      for (int box = 0; box < 2; ++box) {
        MARK(16)
        const char* const x = xs.await_slot();
        MARK(18 + (i == 0))
        WarpgroupSums<COLUMNS>& own = sums[box % TILES];
        if (TILES > 1 || group == box) {
          own.multiply(x + tile * 8192, w + box * (SLOT / 2));
          own.template await<0>();
        }
        xs.release();
      }
      weights.release();
    }
    MARK(16)
    if (TILES > 1) sums[0].add(sums[TILES - 1]);
    hand_out<0, COLUMNS>(sums[0], TILES > 1 ? at.rank : 2 * at.rank + group, HALF_PITCH, 0);
    if (threadIdx.x < at.rows) shared.prior[threadIdx.x] = shared.scales[threadIdx.x];
    meet();
    MARK(20)
    await_sums(at.rows * COLUMNS * 4 * (SOURCES / CLUSTER));
    MARK(21)
    write_stream([&](int r, int m) {
      float sum = shared.residual[r][m];
      const float* const from = &shared.sums[r * HALF_PITCH + m];
#pragma unroll
      for (int source = 0; source < SOURCES; source += SOURCES / CLUSTER) {
        float part = from[source * SHARE * HALF_PITCH];
        if (TILES == 1) part += from[(source + 1) * SHARE * HALF_PITCH];
        sum += part;
      }
      return sum;
    });
    free_sums();
    MARK(22)
  }

  __device__ __forceinline__ void head() {
    constexpr int N = TILES > 1 ? OWN : OWN / 2;
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
      for (int i = 0; i < WIDTH / BOX; ++i) {
        const char *const w = weights.await_slot(), *const x = xs.await_slot();
        sums.multiply(x + tile * 8192, w + column * 128);
        if (i == 0) continue;
        sums.template await<1>();
        weights.release(), xs.release();
      }
      sums.template await<0>();
      weights.release(), xs.release();
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

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS + 128, 1) decode_rows(const __grid_constant__ Model model) {
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
    asm volatile("setmaxnreg.dec.sync.aligned.u32 72;");
    const int warp = threadIdx.x / 32 - WARPS;
    if (warp == 0) send_weights(Sender<SLOTS, SLOT>(memory, shared.weights, IN_FLIGHT), model, at);
    else if (warp == 1) send_x(Sender<X_SLOTS, X_SLOT>(x_memory, shared.xs, X_SLOTS), model, at);
    else help(shared, model, at, warp - 2);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
    Block block{model, shared, at, {memory, shared.weights}, {x_memory, shared.xs}};
#ifdef PROFILE
    if (threadIdx.x == 0) { for (int i = 0; i < 24; ++i) shared.profile[i] = 0; shared.last = clock64(); }
#endif
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
    MARK(23)
#ifdef PROFILE
    if (threadIdx.x == 0) for (int i = 0; i < 24; ++i) model.profile[blockIdx.x * 24 + i] = shared.profile[i];
#endif
  }
  __syncwarp();
  cluster_arrive(), cluster_wait();  // no block leaves while others write to it
}
