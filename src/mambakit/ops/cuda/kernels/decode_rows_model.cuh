// What the warps of `decode_rows.cu` share: the model, who does what, and a block's shared memory.
#pragma once
#include "counts.cuh"
#include "ring.cuh"
#include "vectors.cuh"

constexpr int CLUSTER = 4;                       // blocks, each with a part of k
constexpr int WARPS = 8, THREADS = 32 * WARPS;   // that take
constexpr int HELPERS = 2;                       // warps that prepare
constexpr int BOX = 64;                          // numbers along k of a box: the 128 bytes of a swizzle
constexpr int UNITS = CHANNELS / 16;             // of 16 channels and 8 columns of the stream, of which a cluster has some
constexpr int OWN = 16 * ((UNITS + CLUSTERS - 1) / CLUSTERS), COLUMNS = OWN / 2;  // of a cluster at most: channels, columns
constexpr int SLOT = OWN * 128, X_SLOT = BATCH * 128;  // bytes: a box of all rows
constexpr int TILES = BATCH > 64 ? 2 : 1;        // of 64 rows of the batch
constexpr int SHARE = BATCH / CLUSTER;           // rows of the batch that a block ends, at most
constexpr int TILE_ROWS = SHARE < 16 ? 16 : SHARE;  // of these in products of single warps

constexpr int STEERING = RANK + 2 * D_STATE;
constexpr int LANE_STATES = 4, SPREAD = D_STATE / LANE_STATES;  // states of a lane of the scan, and lanes that share a channel
constexpr int PAST = TAPS - 1;
constexpr int STATE_ROWS = SLOT / (OWN * D_STATE * 4);  // of the batch, in a slot
static_assert(STATE_ROWS == 2 && SPREAD == 4 && CHANNELS == 2 * WIDTH && RANK % 16 == 0 && CLUSTERS <= 32);

// Bytes of a row of a small matrix in a slot, with a gap that keeps eight of them in different banks, and how many rows there are.
__device__ constexpr int line_of(int columns) { return columns * 2 + 16; }
__device__ constexpr int few_rows(int columns) { return SLOT / line_of(columns) / 8 * 8; }

// Sums of in_proj are exchanged for PART channels at a time: half of them where there are many rows, or there would be no room.
constexpr int ROUNDS = TILES, PART = OWN / ROUNDS;
__device__ constexpr int pitch_of(int columns) { return (columns + 15) / 32 * 32 + 16; }  // neighbouring rows in different banks
constexpr int PITCH = pitch_of(PART), HALF_PITCH = pitch_of(COLUMNS);  // of in_proj and of out_proj
constexpr int SOURCES = TILES > 1 ? CLUSTER : 2 * CLUSTER;             // of sums of out_proj: warpgroups
constexpr int SUMS = SHARE * (CLUSTER * PITCH > SOURCES * HALF_PITCH ? CLUSTER * PITCH : SOURCES * HALF_PITCH);
static_assert(PART * (SHARE * PAST + TAPS + 1) * 2 <= SLOT);

struct Layer {
  const IO *norm, *conv, *conv_bias, *dt_proj;
  const float *dt_bias, *A_log, *D;
  IO* conv_state;     // (B, D, W - 1)
  float* ssm_state;   // (B, D, N), contiguous in D and N
};

constexpr int BOXES = WIDTH / CLUSTER / BOX;  // of in_proj, along k

// How often blocks have written: those of each cluster, those of the same rank in all clusters, and their helpers.
struct Counts { Count streams[32], partials[32], steering[32], ys[32]; };

// What a step does with the states of a row, where it DEFERS: keeps what they are made of, and does not write them; repeats the step
// before and writes them; or writes them, as the first time for half of the rows, so that each step writes half. Then another turn.
enum StateTurn { KEEPS, REPEATS, WRITES };

struct Model {
  // Boxes of 16, 8, few_rows(OWN), 16, BATCH, BATCH and SHARE rows.
  TensorMap in_proj[LAYERS], out_proj[LAYERS], x_proj[LAYERS], head, x, y, kept;
  Layer layers[LAYERS];
  const TOKEN* tokens;
  const IO *embedding, *norm_f;
  IO* logits;                             // (B, V)
  IO *x_memory, *y_memory, *steering;     // (B, M), (B, D), (B, R + 2 N)
  float *partials, *squares, *priors;     // (clusters, B, R + 2 N), (B, 32), (B)
  Counts* counts;                         // zero at first
  IO *kept_inputs, *kept_B;               // (layers, 2, rows, D), dt and x; (layers, rows, N); if the kernel DEFERS
  int* turns;                             // (B), StateTurn
  int64 kept_rows;                        // of these, not fewer than of the batch
  int64 batch, vocab, conv_batch, ssm_batch;  // rows, and strides of the states of a row
  double eps[LAYERS + 1];
};

// What steers the scan of a layer.
struct Steering {
  alignas(16) IO low[TILE_ROWS][RANK + 8];
  alignas(16) float bc[SHARE][2 * D_STATE];
  IO dt[SHARE][OWN + 2];                  // so that a warp of dt_proj, with 8 rows and every 16th channel, writes to 32 banks
  alignas(16) IO kept[2][SHARE][OWN], kept_B[SHARE][D_STATE];  // dt and x, and B, of the step before
};

constexpr int KEPT_BYTES = SHARE * OWN * 2;  // of dt or x
static_assert(2 * KEPT_BYTES <= SLOT);

struct Shared {
  union {                                 // steering: from the last sums of z to the end of the scan
    alignas(16) float sums[SUMS];         // of the blocks of the cluster, for the rows that this block ends
    Steering steering;
  };
  alignas(16) IO x[TILE_ROWS][OWN + 8];
  alignas(16) IO z[SHARE][OWN + 8];       // and then y
  float biases[OWN];                      // of dt
  float scales[BATCH], factors[BATCH];    // of the norm, and by which sums are multiplied
  float prior[SHARE];                     // by which x has been multiplied
  int turns[SHARE];                       // StateTurn
  RingBarriers<SLOTS> weights;
  RingBarriers<X_SLOTS> xs;
  BlockBarrier received, freed, scaled;  // sums, the room for them, scales
  BlockBarrier projected, counted;       // this block's part of what steers, and y, which has been counted up
};
constexpr int RINGS = SLOTS * SLOT + X_SLOTS * X_SLOT;
static_assert(RINGS + sizeof(Shared) <= SHARED && RINGS + 64 * 128 <= SHARED);  // 64 rows of x are read, whatever is there

// The barrier of those that take.
__device__ __forceinline__ void meet() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }

// What a block has to do.
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
