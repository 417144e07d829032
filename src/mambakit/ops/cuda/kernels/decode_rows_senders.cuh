// The warps of a block of `decode_rows.cu` that nobody waits for: they send weights, states and x, and prepare small things.
#pragma once
#include "counts.cuh"
#include "decode_rows_model.cuh"

// Slots of out_proj that are sent before this block has handed on its y. More would keep y waiting, behind them in the memory's queues.
constexpr int BEFORE_Y = BATCH > 64 ? 1 : 2;

// The weights and states of this block, in the order of their use.
__device__ __forceinline__ void send_weights(Sender<SLOTS, SLOT, IN_FLIGHT * SLOT> ring, Shared& shared, const Model& model, const Place& at) {
  const int lane = threadIdx.x % 32, k = at.rank * (WIDTH / CLUSTER), long_k = at.rank * (CHANNELS / CLUSTER);
#pragma unroll 1
  for (int l = 0; l < LAYERS; ++l) {
    const Layer& layer = model.layers[l];
    const auto half_of_in_proj = [&](int row) {
#pragma unroll 1
      for (int i = 0; i < BOXES; ++i)
        ring.send(at.own * 128, [&](BlockBarrier& full, char* to) {
          if (lane < at.own / 16) full.copy_box(to + lane * 16 * 128, model.in_proj[l], k + i * BOX, row + lane * 16);
        });
    };
    half_of_in_proj(at.channel);
    for (int from = 0; from < OWN; from += PART) {  // states, taps and offsets of the convolution
      const int count = min(PART, at.own - from), state = count * PAST * 2;
      ring.send(at.rows * state + count * (TAPS + 1) * 2, [&](BlockBarrier& full, char* to) {
        if (count == 0) return;  // a slot all the same
#pragma unroll 1
        for (int row = lane; row < at.rows; row += 32)
          full.copy(to + row * state, layer.conv_state + (at.first + row) * model.conv_batch + (at.channel + from) * PAST, state);
        to += at.rows * state;
        if (lane == 0) full.copy(to, layer.conv + (at.channel + from) * TAPS, count * TAPS * 2);
        if (lane == 1) full.copy(to + count * TAPS * 2, layer.conv_bias + at.channel + from, count * 2);
      });
    }
#pragma unroll 1
    for (int first = 0; first < STEERING; first += few_rows(OWN))
      ring.send(few_rows(OWN) * line_of(OWN), [&](BlockBarrier& full, char* to) {
        if (lane == 0) full.copy_box(to, model.x_proj[l], at.channel, first);
      });
    half_of_in_proj(CHANNELS + at.channel);
    ring.send(at.own * ((D_STATE + 2) * 4 + 1), [&](BlockBarrier& full, char* to) {
      const IO* const norm = l + 1 < LAYERS ? model.layers[l + 1].norm : model.norm_f;
      if (lane == 0) full.copy(to, layer.A_log + at.channel * D_STATE, at.own * D_STATE * 4);
      if (lane == 1) full.copy(to + at.own * D_STATE * 4, layer.D + at.channel, at.own * 4);
      if (lane == 2) full.copy(to + at.own * (D_STATE + 1) * 4, layer.dt_bias + at.channel, at.own * 4);
      if (lane == 3) full.copy(to + at.own * (D_STATE + 2) * 4, norm + at.column(), at.own);
    });
    const auto send_states = [&](int i) {
      const int count = min(STATE_ROWS, at.rows - i * STATE_ROWS);
      ring.send(count * at.own * D_STATE * 4, [&](BlockBarrier& full, char* to) {
        if (lane < count)
          full.copy(to + lane * (at.own * D_STATE * 4),
                    layer.ssm_state + (at.first + i * STATE_ROWS + lane) * model.ssm_batch + (int64)at.channel * D_STATE,
                    at.own * D_STATE * 4);
      });
    };
    if (DEFERS)
      ring.send(2 * KEPT_BYTES, [&](BlockBarrier& full, char* to) {
        if (lane < 2) full.copy_box(to + lane * KEPT_BYTES, model.kept, at.channel, at.first, 2 * l + lane);
      });
    if (at.rows > 0) send_states(0);  // which wait for dt in registers
#pragma unroll 1
    for (int first = 0; first < at.own; first += few_rows(RANK)) {  // in eight pieces: a copy of each row would take too long
      const int count = min(few_rows(RANK), at.own - first), piece = count / 8 * RANK * 2;
      ring.send(8 * piece, [&](BlockBarrier& full, char* to) {
        if (lane < 8) full.copy(to + lane * (piece + 16), layer.dt_proj + (int64)(at.channel + first + lane * (count / 8)) * RANK, piece);
      });
    }
#pragma unroll 1
    for (int i = 1; i < at.state_slots(); ++i) send_states(i);
#pragma unroll 1
    for (int i = 0; i < CHANNELS / CLUSTER / (2 * BOX); ++i) {
      if (i == BEFORE_Y) shared.counted.await(l & 1);
      ring.send(at.own * 128, [&](BlockBarrier& full, char* to) {
        const int unit = lane / 2, box = lane % 2;
        if (unit >= at.own / 16) return;
        full.copy_box(to + box * (SLOT / 2) + unit * 8 * 128, model.out_proj[l], long_k + (2 * i + box) * BOX, at.column() + unit * 8);
      });
    }
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

// All blocks of these clusters have come so many times. A whole warp.
__device__ __forceinline__ void await_clusters(const Count* counts, int times, int from, int to) {
  if (const int cluster = from + threadIdx.x % 32; cluster < to) await_count_alone(counts[cluster], CLUSTER * times);
  __syncwarp();
}

// x of each product, for which other blocks are waited for.
__device__ __forceinline__ void send_x(Sender<X_SLOTS, X_SLOT, X_SLOTS * X_SLOT> ring, const Model& model, const Place& at) {
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
    await_clusters(model.counts->streams, l + 1, from, to);
    fence_for_copies();
    for (int half = 0; half < 2; ++half) send(model.x, at.rank * (WIDTH / CLUSTER), WIDTH / CLUSTER / BOX);
    await_clusters(model.counts->ys, l + 1, from, to);
    fence_for_copies();
    send(model.y, at.rank * (CHANNELS / CLUSTER), CHANNELS / CLUSTER / BOX);
  }
  await_clusters(model.counts->streams, LAYERS + 1, 0, CLUSTERS);
  fence_for_copies();
  for (int first = 0; first < at.head_count; first += OWN) send(model.x, 0, WIDTH / BOX);
}

// Scales of the norm, of `rows` rows from `first` on: a warp, a lane a row. All parts of its sum of squares are read at once, since
// each read waits behind what is on its way to the block.
__device__ __forceinline__ void find_scales(Shared& shared, const Model& model, int l, int first, int rows) {
  const int lane = threadIdx.x % 32;
  for (int r = lane; r < rows; r += 32) {
    uint4 parts[(CLUSTERS + 3) / 4];
    const uint4* const from = reinterpret_cast<const uint4*>(model.squares + (first + r) * 32);
#pragma unroll
    for (int i = 0; i < (CLUSTERS + 3) / 4; ++i) parts[i] = read_fresh(from + i);
    const float prior = l < LAYERS ? shared.prior[r] : read_fresh(model.priors + r);
    float sum = 0.0f;
#pragma unroll
    for (int c = 0; c < CLUSTERS; ++c) {
      const uint4& four = parts[c / 4];
      sum += __uint_as_float(c % 4 == 0 ? four.x : c % 4 == 1 ? four.y : c % 4 == 2 ? four.z : four.w);
    }
    const float scale = 1.0f / sqrtf(sum / WIDTH + (float)model.eps[l]);
    shared.scales[r] = scale, shared.factors[r] = scale / prior;
  }
  __syncwarp();
  if (lane == 0) shared.scaled.arrive();
}

// Warps that do what nobody should wait for: scales, and sums over all clusters of what steers the scan.
__device__ __forceinline__ void help(Shared& shared, const Model& model, const Place& at, int helper) {
  const int lane = threadIdx.x % 32;
  const int pairs = at.rows * (STEERING / 2), mine = HELPERS * at.cluster + helper;
  const int begin = pairs * mine / (HELPERS * CLUSTERS), end = pairs * (mine + 1) / (HELPERS * CLUSTERS);
  const int64 start = (int64)at.first * STEERING;
#pragma unroll 1
  for (int l = 0; l <= LAYERS; ++l) {
    if (helper == 0) {
      await_clusters(model.counts->streams, l + 1, 0, CLUSTERS);
      if (l < LAYERS) find_scales(shared, model, l, at.first, at.rows);
      else find_scales(shared, model, l, 0, at.batch);
    }
    if (l == LAYERS) break;
    if (helper == 1) {
      shared.projected.await(l & 1);
      if (lane == 0) count_up(model.counts->partials[at.rank]);
    }
    await_count(model.counts->partials[at.rank], CLUSTERS * (l + 1));
#pragma unroll 1
    for (int i = begin + lane; i < end; i += 32) {  // all parts of a pair are read at once, since each read waits behind what is on its way
      float2 parts[CLUSTERS], sum = {};
#pragma unroll
      for (int c = 0; c < CLUSTERS; ++c)
        parts[c] = read_fresh(reinterpret_cast<const float2*>(model.partials + (int64)c * at.batch * STEERING + start) + i);
#pragma unroll
      for (int c = 0; c < CLUSTERS; ++c) sum.x += parts[c].x, sum.y += parts[c].y;
      reinterpret_cast<unsigned*>(model.steering + start)[i] = pack<IO>(sum.x, sum.y);
    }
    __syncwarp();
    if (lane == 0) count_up(model.counts->steering[at.rank]);
  }
}
