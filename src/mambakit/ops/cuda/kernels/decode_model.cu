// A decoding step of a whole model for up to eight rows: one kernel, a block a multiprocessor, all at the same time. One warp of
// each block sends its rows of all matrices, in the order of their use, through a ring of shared memory; weights depend on
// nothing, so it never waits for another block. Other warps multiply what has come, and hand other blocks what these need
// (`exchange.cuh`). So the memory goes on being read while they wait.
//
// A block has the same channels of x, z and the scan in all layers, and the same part of the residual stream, which stays
// in its shared memory. z is multiplied while x, and what is made of it, are on their way to the other blocks.
//
// IO: bfloat16 or float16. TOKEN: type of tokens. LAYERS: of the model. WIDTH (M), CHANNELS (D), RANK (R), D_STATE (N), TAPS (W).
// BATCH: 1, 2, 4 or 8, not less than the rows. WARPGROUPS: of a block, 3; the last one sends, and needs few registers. PART: a
// divisor of M and D, and a multiple of WARPS * 32. SHARED: bytes of shared memory. Otherwise as in row_sender.cuh.
constexpr int WARPS = 4 * (WARPGROUPS - 1), THREADS = 32 * WARPS;  // that take
constexpr int SLOT = 8 * (PART * 2 + 64);

#include "decode_functions.cuh"
#include "ring_product.cuh"
#include "vectors.cuh"

constexpr int STEERING = RANK + 2 * D_STATE;
constexpr int LANE_STATES = 4;                   // neighbouring states of a lane of the scan
constexpr int SPREAD = D_STATE / LANE_STATES;     // lanes that share a channel
constexpr int PAST = TAPS - 1;
constexpr int ENDERS = BATCH < WARPS ? 2 : 1;     // neighbouring warps that end a row of the batch
constexpr int TURNS = MOST_ROWS / 32 / ENDERS;   // rows of a matrix, or channels, of one of their lanes
static_assert(BATCH * ENDERS <= WARPS && MOST_ROWS == 64);

struct Layer {
  const IO *norm, *in_proj, *conv, *conv_bias, *x_proj, *dt_proj;
  const float *dt_bias, *A_log, *D;
  const IO* out_proj;
  IO* conv_state;     // (B, D, W - 1)
  float* ssm_state;   // (B, D, N), with neighbouring states side by side
};

// Places of even and of odd layers. Not an array: an index that is not known would be looked up in a cache that is seldom warm.
template <class T> struct InTurn {
  T *even, *odd;
  __device__ __forceinline__ T* of(int l) const { return l % 2 == 0 ? even : odd; }
};

struct Model {
  Layer layers[LAYERS];
  const TOKEN* tokens;                       // (B,)
  const IO *embedding, *norm_f, *head;       // (V, M), (M,), (V, M)
  IO* logits;                                // (B, V)
  InTurn<float> streams;                     // what blocks exchange, all ones at first: (B, M);
  float* steering;                           // (B, R + 2 N);
  IO* x;                                     // (B, D);
  InTurn<IO> ys;                             // (B, D)
  unsigned* arrived;                         // for the keeper, -1 at first
  int64 batch, vocab, conv_batch, conv_channel, conv_tap, ssm_batch, ssm_channel;
  double eps[LAYERS + 1];                    // of the norm of each layer, and of the last
};

struct Shared {
  RingBarriers<SLOTS> barriers;
  Keeper keeper;
  alignas(16) float steering[BATCH][STEERING];
  Sums sums, z_sums;
  float x[BATCH][MOST_ROWS], z[BATCH][MOST_ROWS], dt[BATCH][MOST_ROWS], residual[BATCH][MOST_ROWS], squares[WARPS][BATCH];
};
static_assert(SLOTS * SLOT + sizeof(Shared) <= SHARED);

// Neighbouring rows of a matrix.
struct Rows {
  int first, count;

  // Of n, those of one block of the grid.
  __device__ __forceinline__ Rows(int64 n, int block)
      : first((int)(n * block / gridDim.x)), count((int)(n * (block + 1) / gridDim.x) - first) {}
};

// Of a block. Who has a channel more should not have a row more of the stream: these are taken from the other end.
struct Own {
  Rows channels{CHANNELS, (int)blockIdx.x}, steering{STEERING, (int)blockIdx.x}, stream{WIDTH, (int)(gridDim.x - 1 - blockIdx.x)}, head;
  int early;  // channels of z before x_proj

  __device__ __forceinline__ explicit Own(int64 vocab)
      : head(vocab, blockIdx.x), early(min(channels.count, (channels.count + 15) / 16 * 8)) {}
};

__device__ __forceinline__ void send_all(RowSender sender, const Model& model, const Own& own) {
  const int channel = own.channels.first, count = own.channels.count;
  for (int l = 0; l < LAYERS; ++l) {
    const Layer& layer = model.layers[l];
    const IO* const z = layer.in_proj + (int64)(CHANNELS + channel) * WIDTH;
    sender.send_rows<WIDTH>(layer.norm, 1, WIDTH);
    sender.send_eights<PART, WIDTH>(layer.in_proj + (int64)channel * WIDTH, count);
    sender.send_eights<PART, WIDTH>(z, own.early);
    if (own.steering.count > 0)
      sender.send_rows<CHANNELS>(layer.x_proj + (int64)own.steering.first * CHANNELS, own.steering.count, CHANNELS);
    sender.send_eights<PART, WIDTH>(z + (int64)own.early * WIDTH, count - own.early);
    sender.send_rows<RANK>(layer.dt_proj + (int64)channel * RANK, count, RANK);
    sender.send_eights<PART, CHANNELS>(layer.out_proj + (int64)own.stream.first * CHANNELS, own.stream.count);
  }
  sender.send_rows<WIDTH>(model.norm_f, 1, WIDTH);
  sender.send_eights<PART, WIDTH>(model.head + (int64)own.head.first * WIDTH, own.head.count);
}

// The step of the convolution of some channels of one row of the batch, from own_first on, 32 ENDERS further each turn.
struct Convolution {
  IO* state[TURNS];
  IO inputs[TURNS][PAST + 1], filters[TURNS][TAPS], offsets[TURNS];

  __device__ __forceinline__ void read(const Model& model, const Layer& layer, Rows channels, int b, int own_first) {
#pragma unroll
    for (int i = 0; i < TURNS; ++i) {
      const int own = own_first + 32 * ENDERS * i;
      const int64 channel = channels.first + own;
      if (own >= channels.count) continue;
      state[i] = layer.conv_state + b * model.conv_batch + channel * model.conv_channel;
#pragma unroll
      for (int w = 0; w < PAST; ++w) inputs[i][w] = state[i][w * model.conv_tap];
#pragma unroll
      for (int w = 0; w < TAPS; ++w) filters[i][w] = layer.conv[channel * TAPS + w];
      offsets[i] = layer.conv_bias[channel];
    }
  }

  // Of turn i; the state moves on.
  __device__ __forceinline__ float step(int i, float sum_of_input, int64 tap) {
    inputs[i][PAST] = from_float<IO>(sum_of_input);
    float sum = to_float(offsets[i]);
#pragma unroll
    for (int w = 0; w < TAPS; ++w) sum = fmaf(to_float(filters[i][w]), to_float(inputs[i][w]), sum);
#pragma unroll
    for (int w = 0; w < PAST; ++w) state[i][w * tap] = inputs[i][w + 1];
    return sum / (1.0f + expf(-sum));
  }
};

// What the warps do that take.
struct Block {
  const Model& model;
  Shared& shared;
  Own own;
  RingProduct product;
  const int batch, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int ended = warp / ENDERS;  // row of the batch that this warp, with its neighbours, ends
  int first_ended = warp % ENDERS * 32 + lane;

  // What addresses are made of, so that the compiler makes them where they are used. Else it keeps all of them from layer to
  // layer, and spills them.
  __device__ __forceinline__ void forget_addresses() {
    Lane& at = product.lane;
    asm volatile("" : "+r"(own.channels.first), "+r"(own.steering.first), "+r"(own.stream.first), "+r"(ended), "+r"(first_ended));
    asm volatile("" : "+r"(at.warp), "+r"(at.row), "+r"(at.column));
  }

  // Does it for this lane's rows of a matrix.
  template <class Do> __device__ __forceinline__ void each(int count, Do do_for) const {
    if (ended >= batch) return;
#pragma unroll
    for (int i = 0; i < TURNS; ++i)
      if (const int row = first_ended + 32 * ENDERS * i; row < count) do_for(i, row);
  }

  __device__ __forceinline__ void embed() {
    if (ended >= batch) return;
    const int64 token = model.tokens[ended];
    if (token < 0 || token >= model.vocab) __trap();  // as PyTorch's own lookup does
    const IO* const row = model.embedding + token * WIDTH + own.stream.first;
    write_stream(model.streams.of(0), [&](int m) { return to_float(row[m]); });
  }

  // What this block has of the stream.
  template <class Value> __device__ __forceinline__ void write_stream(float* stream, Value value) {
    each(own.stream.count, [&](int, int m) {
      const float r = value(m);
      shared.residual[ended][m] = r;
      stream[ended * WIDTH + own.stream.first + m] = r;
    });
  }

  __device__ __forceinline__ void receive_normed(Factor<WIDTH / PART>& x, const float* stream, float eps) {
    constexpr int ALL = WIDTH / PART * CHUNKS;
    const Lane& at = product.lane;
    uint4 words[2 * ALL];
    receive<float>(
        words, stream + at.row * WIDTH + at.number(), [](int i) { return Lane::further(i / 2) + 4 * (i % 2); },
        [&](int) { return at.row < batch; });
    const auto number = [&](int i) {  // of this lane
      const uint4& four = words[i / 4];
      return __uint_as_float(i % 4 == 0 ? four.x : i % 4 == 1 ? four.y : i % 4 == 2 ? four.z : four.w);
    };
    float parts[4] = {};  // so that an addition need not wait for the one before
#pragma unroll
    for (int i = 0; i < 8 * ALL; ++i) parts[i % 4] = fmaf(number(i), number(i), parts[i % 4]);
    float square = (parts[0] + parts[1]) + (parts[2] + parts[3]);
    square += __shfl_xor_sync(0xffffffffu, square, 1);
    square += __shfl_xor_sync(0xffffffffu, square, 2);
    if (at.row < batch && at.column == 0) shared.squares[warp][at.row] = square;
    meet();
    float sum = 0.0f;
    if (at.row < batch)
#pragma unroll
      for (int w = 0; w < WARPS; ++w) sum += shared.squares[w][at.row];
    const float scale = 1.0f / sqrtf(sum / WIDTH + eps);
    const IO* const weights = reinterpret_cast<const IO*>(product.await_slot()) + at.number();
#pragma unroll
    for (int i = 0; i < ALL; ++i) {
      const Vector<IO, 8> weight = ::read<8>(weights + Lane::further(i));
      const auto two = [&](int j) {
        const auto normed = [&](int k) { return number(8 * i + k) * scale * to_float(weight.items[k]); };
        return pack<IO>(normed(j), normed(j + 1));
      };
      x.words[i] = factor(two(0), two(2), two(4), two(6));
    }
    product.release();
  }

  // x of in_proj, after the convolution, for all blocks; z; and between them what steers the scan.
  __device__ __forceinline__ void in_proj_and_x_proj(const Layer& layer, int l) {
    Convolution convolution;
    if (ended < batch) convolution.read(model, layer, own.channels, ended, first_ended);
    Factor<WIDTH / PART> normed;
    receive_normed(normed, model.streams.of(l), (float)model.eps[l]);
    product.eights(shared.sums, 0, own.channels.count, normed);
    meet();
    each(own.channels.count, [&](int i, int c) {
      const IO x = from_float<IO>(convolution.step(i, product.sum(shared.sums, ended, c), model.conv_tap));
      model.x[ended * CHANNELS + own.channels.first + c] = x;
      shared.x[ended][c] = to_float(x);
    });
    product.eights(shared.z_sums, 0, own.early, normed);

    forget_addresses();
    if (l > 0) shared.keeper.emptied_everywhere.await((l - 1) & 1);
    Factor<CHANNELS / PART> x;
    product.receive_x(x, model.x);
    product.few(shared.sums, own.steering.count, x);
    meet();
    each(own.steering.count, [&](int, int row) {
      model.steering[ended * STEERING + own.steering.first + row] = product.sum(shared.sums, ended, MOST_ROWS + row);
    });
    product.eights(shared.z_sums, own.early, own.channels.count - own.early, normed);
  }

  // dt = softplus(dt_proj(low) + bias)    h <- exp(-dt exp(A_log)) h + dt x B    y = (sum_n C_n h_n + D x) silu(z)
  __device__ __forceinline__ void scan(const Layer& layer, IO* y) {
    const int own_channel = threadIdx.x / SPREAD, part = threadIdx.x % SPREAD, n = part * LANE_STATES;
    const bool exists = own_channel < own.channels.count;
    const int64 channel = own.channels.first + (exists ? own_channel : 0);
    float* const state = layer.ssm_state + channel * model.ssm_channel + n;
    Vector<float, LANE_STATES> before[BATCH] = {};
#pragma unroll
    for (int b = 0; b < BATCH; ++b)
      if (exists && b < batch) before[b] = ::read<LANE_STATES>(state + b * model.ssm_batch);
    const Vector<float, LANE_STATES> log_rates = ::read<LANE_STATES>(layer.A_log + channel * D_STATE + n);
    const float bias = layer.dt_bias[channel], skip = layer.D[channel];
    float rates[LANE_STATES];
#pragma unroll
    for (int s = 0; s < LANE_STATES; ++s) rates[s] = -expf(log_rates.items[s]);

    receive_steering();
    meet();
    project_dt();
    each(own.channels.count, [&](int, int c) {
      shared.z[ended][c] = to_float(from_float<IO>(product.sum(shared.z_sums, ended, c)));
    });
    meet();
#pragma unroll
    for (int b = 0; b < BATCH; ++b) {
      if (b >= batch) break;
      const int c = exists ? own_channel : 0;
      const float step = softplus(shared.dt[b][c] + bias), u = shared.x[b][c], gate = shared.z[b][c];
      const float* const B = shared.steering[b] + RANK + n;
      const float* const C = B + D_STATE;
      float h[LANE_STATES], sum = 0.0f;
#pragma unroll
      for (int s = 0; s < LANE_STATES; ++s) {
        h[s] = fmaf(exponential(step * rates[s]), before[b].items[s], step * u * B[s]);
        sum = fmaf(C[s], h[s], sum);
      }
#pragma unroll
      for (int offset = SPREAD / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
      if (!exists) continue;
      write_whole(state + b * model.ssm_batch, h);
      if (part == 0) y[b * CHANNELS + channel] = from_float<IO>(fmaf(skip, u, sum) * gate * sigmoid_of(gate));
    }
  }

  __device__ __forceinline__ void receive_steering() {
    constexpr int EACH = (BATCH * STEERING / 4 + THREADS - 1) / THREADS;
    const auto at = [&](int i) { return 4 * (i * THREADS + (int)threadIdx.x); };
    uint4 words[EACH];
    receive<float>(
        words, model.steering + at(0), [](int i) { return 4 * THREADS * i; }, [&](int i) { return at(i) < batch * STEERING; });
#pragma unroll
    for (int i = 0; i < EACH; ++i)
      if (at(i) < batch * STEERING) *reinterpret_cast<uint4*>(&shared.steering[0][0] + at(i)) = words[i];
  }

  // Warp w has the channels of this block from 8 w on.
  __device__ __forceinline__ void project_dt() {
    const char* const rows = product.await_slot();
    const Lane& at = product.lane;
    const int first = 8 * warp, row = min(first + at.row, own.channels.count - 1);
    Eight eight;
#pragma unroll
    for (int c = 0; c < (RANK + CHUNK - 1) / CHUNK; ++c) {
      const int k = c * CHUNK + at.column;
      uint4 low = {0, 0, 0, 0}, w = {0, 0, 0, 0};
      if (k < RANK) w = *reinterpret_cast<const uint4*>(rows + row * (RANK * (int)sizeof(IO) + GAP) + k * sizeof(IO));
      if (k < RANK && at.row < batch) {
        const float* const x = shared.steering[at.row] + k;
        low = factor(pack<IO>(x[0], x[1]), pack<IO>(x[2], x[3]), pack<IO>(x[4], x[5]), pack<IO>(x[6], x[7]));
      }
      eight.add(low, w, c);
    }
    product.release();
    if (first < own.channels.count && at.row < batch)
#pragma unroll
      for (int i = 0; i < 2; ++i) shared.dt[at.row][first + at.column / 4 + i] = eight.sum(i);
  }

  __device__ __forceinline__ void out_proj(int l) {
    Factor<CHANNELS / PART> y;
    product.receive_x(y, model.ys.of(l));
    product.eights(shared.sums, 0, own.stream.count, y);
    meet();
    write_stream(model.streams.of(l + 1), [&](int m) { return shared.residual[ended][m] + product.sum(shared.sums, ended, m); });
    empty_places(l);
  }

  // All of y has come to this block: so all blocks have read what this layer's y is made of, and the last layer's y.
  __device__ __forceinline__ void empty_places(int l) {
    each(own.stream.count, [&](int, int m) { empty(model.streams.of(l) + ended * WIDTH + own.stream.first + m); });
    each(own.steering.count, [&](int, int row) { empty(model.steering + ended * STEERING + own.steering.first + row); });
    each(own.channels.count, [&](int, int c) {
      const int64 place = (int64)ended * CHANNELS + own.channels.first + c;
      empty(model.x + place), empty(model.ys.of(l + 1) + place);
    });
    __syncwarp();
    if (lane == 0) shared.keeper.emptied_here.arrive();
  }

  __device__ __forceinline__ void head() {
    Factor<WIDTH / PART> normed;
    receive_normed(normed, model.streams.of(LAYERS), (float)model.eps[LAYERS]);
    bool odd = false;
    for (int first = 0; first < own.head.count; first += MOST_ROWS, odd = !odd) {
      Sums& sums = odd ? shared.z_sums : shared.sums;  // in turn, so that they are read while the next ones come
      const int count = min(MOST_ROWS, own.head.count - first);
      product.eights(sums, 0, count, normed);
      meet();
      each(count, [&](int, int row) {
        model.logits[ended * model.vocab + own.head.first + first + row] = from_float<IO>(product.sum(sums, ended, row));
      });
    }
  }
};

extern "C" __global__ void __launch_bounds__(128 * WARPGROUPS, 1) decode_model(const __grid_constant__ Model model) {
  extern __shared__ __align__(128) char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory + SLOTS * SLOT);
  if (threadIdx.x == 0) {
    shared.barriers.make(WARPS);
    shared.keeper.make(WARPS);
    BlockBarrier::publish();
  }
  __syncthreads();
  const Own own(model.vocab);
  if (threadIdx.x >= THREADS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    if (threadIdx.x / 32 == WARPS) send_all(RowSender(memory, shared.barriers), model, own);
    if (threadIdx.x / 32 == WARPS + 1) shared.keeper.keep(model.arrived, LAYERS);
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
  Block block{model, shared, own, RingProduct(memory, shared.barriers, (int)model.batch), (int)model.batch};
  block.embed();
  for (int l = 0; l < LAYERS; ++l) {
    block.forget_addresses();
    block.in_proj_and_x_proj(model.layers[l], l);
    block.forget_addresses();
    block.scan(model.layers[l], model.ys.of(l));
    block.forget_addresses();
    block.out_proj(l);
  }
  block.head();
}
