// The selective scan, backward. With dy the gradient of the sum before the gate, and * the conjugate (of complex A):
//
//     l_t = C_t* dy_t + exp(dt_{t+1} A)* l_{t+1}          the adjoint of h_t, backwards in time
//     dC_t = dy_t h_t*       dB_t = dt_t x_t l_t          sums over the channels of a group
//     dx_t = dt_t Re(sum_n B_t* l_t) + D dy_t
//     q_t = exp(dt_t A)* l_t h_{t-1}*
//     dA = sum_t dt_t q_t    ddt_t = Re(sum_n A* q_t) + x_t Re(sum_n B_t* l_t),  then through the softplus
//
// The states h are not stored: the forward saved one every TILE steps. From it a warp first walks to each SEGMENT of the tile
// and leaves the state there in shared memory; then, from the last segment to the first, it walks the segment again with
// exp(dt A) and h in registers, and back with the adjoint. Lanes and channels are as in selective_scan.cuh.
//
// Sums over channels: lanes to warp within a segment (channel_sums.cuh), warps to block through shared memory at the end of a
// tile, and one row a block to global memory. Sums over time are those of a batch row's chunk. scan_add_parts adds both in
// order. So every sum has one order, and no atomics.
//
// Constants beside those of selective_scan.cuh:
//     SEGMENT                 4, or 8 where few blocks leave each the registers for it
//     COPIED                  neighbouring channels that can be copied at a time
//     WEIGHTS_ALIGNED         whether four neighbouring states of B and C can
#include "selective_scan.cuh"

constexpr int TILE = SAVE_EVERY;
#include "channel_sums.cuh"
#include "weight_rows.cuh"

constexpr bool ON_TENSOR_CORES = ChannelSums::ON_TENSOR_CORES;
constexpr bool COPIES_WEIGHTS = IN_WORDS && WEIGHTS_ALIGNED;
constexpr int SEGMENTS = TILE / SEGMENT;
constexpr int TILE_ROUNDS = (TILE + SPREAD - 1) / SPREAD;         // steps of a tile that are a lane's own
constexpr int ROUNDS = SEGMENT > SPREAD ? SEGMENT / SPREAD : 1;   // and of a segment
constexpr int COPIES = BLOCK_CHANNELS / COPIED;                   // of a step of the block's channels
constexpr int ROW = 32 + (ON_TENSOR_CORES ? 0 : SLOTS);           // lanes; with a gap, against bank conflicts

// A part of the sums over n: Re(B* l) and Re(A* q).
struct alignas(CHANNELS == 1 ? 8 : 16) Sums { float B[CHANNELS], A[CHANNELS]; };

struct alignas(8 * CHANNELS) Two { Floats of[2]; };          // of two steps
struct alignas(8 * CHANNELS) Fixed { Floats bias, skip; };   // of all steps

// The states of a warp, in an order in which neither the lanes that use them nor those that copy them, row after row, have bank
// conflicts.
struct WarpStates {
  States of[ON_TENSOR_CORES ? 36 + 32 : CHANNELS * 32];

  static FORCE_INLINE int place(int j, int part, int slot) {
    return ON_TENSOR_CORES ? j * 36 + part * 8 + (slot ^ part) : j * 32 + part * SLOTS + slot;
  }
};

// What is left of a segment: the states before it, until it is walked again, and then its sums over channels.
union Left {
  WarpStates before;
  ChannelSums::Totals sums;
};

// What a warp has for itself.
struct Scratch {
  Step steps[TILE][SLOTS];
  alignas(16) Channels x[2][TILE][SLOTS], dt[2][TILE][SLOTS], z[2][TILE][SLOTS], dout[2][TILE][SLOTS];  // of this tile and the next
  Fixed fixed[SLOTS];
  Two dy[SEGMENT / 2][SLOTS];
  WarpStates start[2];                                // before this tile and the next
  Left left[SEGMENTS];
  Two y[SEGMENT / 2][ROW];                            // parts of sum C h
  Sums sums[SEGMENT][ROW];
  Sum dD[CHANNELS][SLOTS], dbias[CHANNELS][SLOTS];    // over all time
  float restarts[TILE];
  const IO* next[4][32];                              // what a lane copies for the next tile: addresses, for which registers are short
  int64 out[SLOTS];                                   // and where its outputs are, of the first step of time
  ChannelSums::Scratch to_sum;
};

// Of the whole block.
struct Shared {
  Scratch scratch[WARPS];
  WeightRows::Tile weights[2];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "ops/cuda/selective_scan.py counts the same bytes");

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS) scan_backward(
    const IO* dout, const IO* x, const IO* dt, const Number* A, const void* B, const void* C, const float* D, const IO* z,
    const float* dt_bias, const unsigned char* restart, const Number* saved, const Number* dfinal_state,
    const Number* adjoints, const Sum* sums_dt,
    IO* dx, IO* ddt, IO* dz, Number* dA_parts, Number* dB_parts, Number* dC_parts, float* dD_parts, float* dbias_parts,
    Number* dinitial_state, int64 out_time,
    int64 seqlen, int64 d_inner, int64 d_state_, int64 groups, int64 chunk, int64 chunks,
    int64 dout_batch, int64 dout_time, int64 x_batch, int64 x_time, int64 dt_batch, int64 dt_time, int64 z_batch,
    int64 z_time,
    int64 B_batch, int64 B_time, int64 B_group, int64 B_groups, int64 C_batch, int64 C_time, int64 C_group, int64 C_groups) {
  extern __shared__ __align__(16) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);

  const int d_state = (int)d_state_;
  const unsigned lane = threadIdx.x % 32;
  const Place at = place(groups, d_inner / groups);
  Scratch& own = shared.scratch[at.warp];
  const bool is_own = SPREAD <= SEGMENT || at.part < SEGMENT;  // has a step in every round
  const int first_state = at.part * STATES;
  const int start = (int)(blockIdx.y * chunk), stop = (int)(start + chunk < seqlen ? start + chunk : seqlen);
  const int64 state_row = at.batch * d_inner + at.channel;  // of (B, D)
  const int64 tiles = (seqlen + TILE - 1) / TILE, batch_size = gridDim.x / at.blocks;

  States a[CHANNELS], adjoint[CHANNELS], dA[CHANNELS], B_fixed[CHANNELS], C_fixed[CHANNELS], dB_fixed[CHANNELS], dC_fixed[CHANNELS];
  ChannelSums channel_sums;
  const WeightRows weight_rows;
  // adjoint holds exp(dt_{t+1} A)* l_{t+1}. After the last step that is the gradient of the final state.
#pragma unroll
  for (int j = 0; j < CHANNELS; j++) {
    const int held = j < at.count ? d_state : 0;
    a[j] = read_states(A + (at.channel + j) * d_state, first_state, held);
    if (!B_VARIES) B_fixed[j] = read_states((const Number*)B + (at.channel + j) * d_state, first_state, held);
    if (!C_VARIES) C_fixed[j] = read_states((const Number*)C + (at.channel + j) * d_state, first_state, held);
    adjoint[j] = read_states(dfinal_state + (state_row + j) * d_state, first_state, held);
#pragma unroll
    for (int n = 0; n < STATES; n++) {
      a[j].of[n] = scaled(A_UNIT, a[j].of[n]);
      dA[j].of[n] = zero(), dB_fixed[j].of[n] = zero(), dC_fixed[j].of[n] = zero();
    }
    if (at.part != 0) continue;
    own.fixed[at.slot].bias.of[j] = dt_bias && j < at.count ? dt_bias[at.channel + j] : 0.0f;
    own.fixed[at.slot].skip.of[j] = D && j < at.count ? D[at.channel + j] : 0.0f;
    own.dD[j][at.slot] = own.dbias[j][at.slot] = Sum{};
  }
  for (int64 after = chunks - 1; after > blockIdx.y; after--) {
#pragma unroll
    for (int j = 0; j < CHANNELS; j++) {
      if (j >= at.count) continue;
      const int64 row = (at.batch * chunks + after) * d_inner + at.channel + j;
      const Sum sum = sums_dt[row];  // infinite if the state started afresh within the chunk
      const States end = *(const States*)(adjoints + row * PADDED + first_state);
#pragma unroll
      for (int n = 0; n < STATES; n++) {
        const Number carried = multiply(decay(sum.total, conj(a[j].of[n]), -sum.lost), adjoint[j].of[n]);
        adjoint[j].of[n] = HAS_RESTART && isinf(sum.total) ? end.of[n] : scale_add(1.0f, carried, end.of[n]);
      }
    }
  }

  if (HAS_RESTART) restart += at.batch * seqlen;

  const Weight* B_rows = (const Weight*)B + at.batch * B_batch + at.group * B_groups / groups * B_group;
  const Weight* C_rows = (const Weight*)C + at.batch * C_batch + at.group * C_groups / groups * C_group;
  Fetch<TILE> B_next, C_next;
  int t0 = start + (stop - start - 1) / TILE * TILE;  // of the tile
  auto get = [&](int which, int from) {
    if (which == 0 ? !B_VARIES : !C_VARIES) return;
    if (which == 0) B_next.get(B_rows + from * B_time, B_time, stop - from, d_state);
    else C_next.get(C_rows + from * C_time, C_time, stop - from, d_state);
  };
  auto put = [&](int which, int to) {
    if (which == 0 ? B_VARIES : C_VARIES) shared.weights[to].put(which, which == 0 ? B_next : C_next);
  };
  // Or without registers on the way, four states a thread.
  static_assert(!COPIES_WEIGHTS || 2 * TILE * SPREAD == 32 * WARPS, "a thread has four states of B or C");
  const unsigned step_copied = threadIdx.x / SPREAD % TILE, state_copied = threadIdx.x % SPREAD * 4;
  const bool is_C = threadIdx.x / SPREAD >= TILE, is_copied = COPIES_WEIGHTS && (is_C ? C_VARIES : B_VARIES) && state_copied < d_state;
  const Weight* weight_from = (is_C ? C_rows + (t0 + step_copied) * C_time : B_rows + (t0 + step_copied) * B_time) + state_copied;
  auto copy_weights = [&](int from, int to) {
    if (is_copied) copy<4>((IO*)&shared.weights[to].at(is_C, step_copied, state_copied), (const IO*)weight_from, from + (int)step_copied < stop);
    weight_from -= TILE * (is_C ? C_time : B_time);
  };

  // Copies of the block's steps of a tile, COPIED channels of a step a thread, and of each warp's states before it.
  const int64 block_channel = at.channel - at.slot * CHANNELS - at.warp * WARP_CHANNELS;
  const int64 left = (at.group + 1) * (d_inner / groups) - block_channel;
  const int channels_left = left < BLOCK_CHANNELS ? (int)left : BLOCK_CHANNELS;
  {
    const int64 step = t0 + threadIdx.x / COPIES, channel = block_channel + threadIdx.x % COPIES * COPIED;
    own.next[0][lane] = x + at.batch * x_batch + step * x_time + channel;
    own.next[1][lane] = dt + at.batch * dt_batch + step * dt_time + channel;
    own.next[2][lane] = dout + at.batch * dout_batch + step * dout_time + channel;
    if (HAS_Z) own.next[3][lane] = z + at.batch * z_batch + step * z_time + channel;
  }
  struct Next { const IO* of[4]; };
  auto read_next = [&]() {
    Next next;
#pragma unroll
    for (int i = 0; i < 4; i++) next.of[i] = own.next[i][lane];
    return next;
  };
  auto copy_steps = [&](int from, int to, const Next& next) {
#pragma unroll
    for (int item = 0; item < TILE * COPIES; item += 32 * WARPS) {
      const int steps = item / COPIES, channels = item % COPIES * COPIED;  // after those of the thread's first
      const int i = threadIdx.x / COPIES + steps, within = threadIdx.x % COPIES * COPIED + channels;
      if (TILE * COPIES % (32 * WARPS) != 0 && i >= TILE) continue;
      Scratch& scratch = shared.scratch[within / WARP_CHANNELS];
      const int slot = within % WARP_CHANNELS / CHANNELS, j = within % CHANNELS;
      const bool exists = from + i < stop && within < channels_left;
      copy<COPIED>(scratch.x[to][i][slot].of + j, next.of[0] + steps * x_time + channels, exists);
      copy<COPIED>(scratch.dt[to][i][slot].of + j, next.of[1] + steps * dt_time + channels, exists);
      copy<COPIED>(scratch.dout[to][i][slot].of + j, next.of[2] + steps * dout_time + channels, exists);
      if (HAS_Z) copy<COPIED>(scratch.z[to][i][slot].of + j, next.of[3] + steps * z_time + channels, exists);
    }
    own.next[0][lane] = next.of[0] - TILE * x_time;
    own.next[1][lane] = next.of[1] - TILE * dt_time;
    own.next[2][lane] = next.of[2] - TILE * dout_time;
    if (HAS_Z) own.next[3][lane] = next.of[3] - TILE * z_time;
  };
  auto copy_start = [&](int from, int to) {
    States* const before = own.start[to].of;
    const int64 row = (at.batch * tiles + from / TILE) * d_inner;
    if constexpr (ON_TENSOR_CORES) {  // neighbouring lanes copy neighbours in memory
      const Number* states = saved + (row + block_channel + at.warp * WARP_CHANNELS) * PADDED;
#pragma unroll
      for (int item = lane; item < WARP_CHANNELS * SPREAD; item += 32) {
        const int part = item % SPREAD, channel = item / SPREAD;
        const bool exists = at.warp * WARP_CHANNELS + channel < channels_left;
        copy_async(&before[WarpStates::place(channel % CHANNELS, part, channel / CHANNELS)], states + item * STATES, exists);
      }
    } else {
#pragma unroll
      for (int j = 0; j < CHANNELS; j++) {
        const Number* states = saved + (row + opaque(at.channel) + (j < at.count ? j : 0)) * PADDED + first_state;
#pragma unroll
        for (int i = 0; i < sizeof(States); i += 16)
          if (at.count) copy((char*)&before[WarpStates::place(j, at.part, at.slot)] + i, (const char*)states + i);
      }
    }
  };
  if (!ON_TENSOR_CORES && !at.count) {
#pragma unroll
    for (int j = 0; j < 2 * CHANNELS; j++) own.start[j % 2].of[WarpStates::place(j / 2, at.part, at.slot)] = States{};
  }
  if (at.part == 0) own.out[at.slot] = at.batch * seqlen * out_time + at.channel;
  if (COPIES_WEIGHTS) copy_weights(t0, 0);
  else get(0, t0), put(0, 0), get(1, t0), put(1, 0);
  copy_steps(t0, 0, read_next()), copy_start(t0, 0);
  await_copies();
  __syncthreads();

  float dD_run[CHANNELS] = {}, dbias_run[CHANNELS] = {};

  int buffer = 0;
  for (; t0 >= start; t0 -= TILE, buffer ^= 1) {
    const int count = stop - t0 < TILE ? stop - t0 : TILE;  // steps of the tile that exist
    if (!COPIES_WEIGHTS && Fetch<TILE>::EARLY && t0 > start) get(0, t0 - TILE), get(1, t0 - TILE);

    // The lane prepares its own steps. All it needs is read before the first is written, behind which the compiler would not go.
    const Next next = read_next();
    const Fixed fixed = own.fixed[at.slot];
    Channels x_raw[TILE_ROUNDS], dt_raw[TILE_ROUNDS];
#pragma unroll
    for (int k = 0; k < TILE_ROUNDS; k++) {
      const int i = k * SPREAD + at.part;
      if (TILE % SPREAD != 0 && i >= TILE) continue;
      x_raw[k] = own.x[buffer][i][at.slot], dt_raw[k] = own.dt[buffer][i][at.slot];
    }
#pragma unroll
    for (int k = 0; k < TILE_ROUNDS; k++) {
      const int i = k * SPREAD + at.part;
      if (TILE % SPREAD != 0 && i >= TILE) continue;
      Step step;
#pragma unroll
      for (int j = 0; j < CHANNELS; j++) {
        step.dt[j] = time_step(dt_raw[k].value(j) + fixed.bias.of[j], i < count);
        step.dx[j] = step.dt[j] * x_raw[k].value(j);
      }
      own.steps[i][at.slot] = step;
    }
    if (HAS_RESTART && lane < TILE) own.restarts[lane] = lane < count && restart[t0 + lane] ? 0.0f : 1.0f;
    __syncwarp();
    if (t0 > start) {
      copy_steps(t0 - TILE, buffer ^ 1, next), copy_start(t0 - TILE, buffer ^ 1);
      if (COPIES_WEIGHTS) copy_weights(t0 - TILE, buffer ^ 1);
    }
    States h[CHANNELS];
#pragma unroll
    for (int j = 0; j < CHANNELS; j++) h[j] = own.start[buffer].of[WarpStates::place(j, at.part, at.slot)];

    // One step of the recurrence.
    auto carry = [&](int i, int j, int n, Number& factor, const Step& step, const States& B_now) {
      factor = decay(step.dt[j], a[j].of[n]);
      if (HAS_RESTART) factor = scaled(own.restarts[i], factor);
      h[j].of[n] = multiply_add(factor, h[j].of[n], scaled(step.dx[j], B_VARIES ? B_now.of[n] : B_fixed[j].of[n]));
    };

    // To the start of each segment.
#pragma unroll 1
    for (int s = 0; s < SEGMENTS - 1; s++) {
      const WeightRows::Run<SEGMENT> weights(shared.weights[buffer], s * SEGMENT, at);
#pragma unroll
      for (int k = 0; k < SEGMENT; k++) {
        const int i = s * SEGMENT + k;
        const Step step = own.steps[i][at.slot];
        const States B_now = weights.of(weight_rows, 0, k);
        Number factor;
#pragma unroll
        for (int j = 0; j < CHANNELS; j++)
#pragma unroll
          for (int n = 0; n < STATES; n++) carry(i, j, n, factor, step, B_now);
      }
#pragma unroll
      for (int j = 0; j < CHANNELS; j++) own.left[s + 1].before.of[WarpStates::place(j, at.part, at.slot)] = h[j];
    }

#pragma unroll 1
    for (int s = SEGMENTS - 1; s >= 0; s--) {
      const WarpStates& begin = s > 0 ? own.left[s].before : own.start[buffer];
#pragma unroll
      for (int j = 0; j < CHANNELS; j++) h[j] = begin.of[WarpStates::place(j, at.part, at.slot)];
      // dy of the lane's own steps, and the factor that makes dz of y.
      Floats dy_own[ROUNDS];
      float gate_slope[ROUNDS][CHANNELS];
#pragma unroll
      for (int r = 0; r < ROUNDS; r++) {
        const int k = r * SPREAD + at.part, i = s * SEGMENT + k % SEGMENT;
        const Channels dout_raw = own.dout[buffer][i][at.slot], z_raw = own.z[buffer][i][at.slot];
#pragma unroll
        for (int j = 0; j < CHANNELS; j++) {
          const float g = HAS_Z ? z_raw.value(j) : 0.0f, sig = logistic(g), d = dout_raw.value(j);
          dy_own[r].of[j] = HAS_Z ? d * g * sig : d;
          gate_slope[r][j] = d * sig * fmaf(g, 1.0f - sig, 1.0f);
        }
        if (is_own) own.dy[k / 2][at.slot].of[k % 2] = dy_own[r];
      }
      __syncwarp();

      // The segment again, forwards.
      States factor[SEGMENT][CHANNELS], before[SEGMENT][CHANNELS];
      // What a step needs is read a step ahead: the compiler does not move it across the writes of sums.
      Step step_next = own.steps[s * SEGMENT][at.slot];
      const WeightRows::Run<SEGMENT> weights(shared.weights[buffer], s * SEGMENT, at);
      States B_ahead = weights.of(weight_rows, 0, 0);
      Two y;
#pragma unroll
      for (int k = 0; k < SEGMENT; k++) {
        const int i = s * SEGMENT + k;
        const Step step = step_next;
        const Floats dy = C_VARIES && ON_TENSOR_CORES ? dy_own[k / SPREAD] : own.dy[k / 2][at.slot].of[k % 2];
        const States B_now = B_ahead, C_now = weights.of(weight_rows, 1, k);
        if (k + 1 < SEGMENT) {
          step_next = own.steps[i + 1][at.slot];
          B_ahead = weights.of(weight_rows, 0, k + 1);
        }
        States dC_terms[CHANNELS];
#pragma unroll
        for (int j = 0; j < CHANNELS; j++) {
          float sum = 0.0f;
#pragma unroll
          for (int n = 0; n < STATES; n++) {
            before[k][j].of[n] = h[j].of[n];
            carry(i, j, n, factor[k][j].of[n], step, B_now);
            sum = real_product(C_VARIES ? C_now.of[n] : C_fixed[j].of[n], h[j].of[n], sum);
            dC_terms[j].of[n] = conj(h[j].of[n]);
            if (!C_VARIES) dC_fixed[j].of[n] = scale_add(dy.of[j], dC_terms[j].of[n], dC_fixed[j].of[n]);
          }
          y.of[k % 2].of[j] = sum;
        }
        if (HAS_Z && k % 2 == 1) own.y[k / 2][lane] = y;
        if (C_VARIES) channel_sums.add(own.to_sum, own.left[s].sums, at, k, 1, dy, dC_terms);
      }

      // And back.
      // Read again, or the compiler would hold B and C of all steps, for which there are no registers.
      const WeightRows::Run<SEGMENT> weights_again(shared.weights[buffer], s * SEGMENT, at);
      Two dy_now, dy_next = own.dy[SEGMENT / 2 - 1][at.slot];
      States C_ahead = weights_again.of(weight_rows, 1, SEGMENT - 1);
#pragma unroll
      for (int k = SEGMENT - 1; k >= 0; k--) {
        const int i = s * SEGMENT + k;
        const Step step = own.steps[i][at.slot];
        if (k % 2 == 1) {
          dy_now = dy_next;
          if (k > 1) dy_next = own.dy[k / 2 - 1][at.slot];
        }
        const Floats dy = dy_now.of[k % 2];
        const States B_now = weights_again.of(weight_rows, 0, k), C_now = C_ahead;
        if (k > 0) C_ahead = weights_again.of(weight_rows, 1, k - 1);
        Sums sums;
        Floats dx;
        States l[CHANNELS];
#pragma unroll
        for (int j = 0; j < CHANNELS; j++) {
          sums.A[j] = sums.B[j] = 0.0f, dx.of[j] = step.dx[j];
#pragma unroll
          for (int n = 0; n < STATES; n++) {
            const Number b = B_VARIES ? B_now.of[n] : B_fixed[j].of[n], c = C_VARIES ? C_now.of[n] : C_fixed[j].of[n];
            l[j].of[n] = scale_add(dy.of[j], conj(c), adjoint[j].of[n]);
            adjoint[j].of[n] = multiply(conj(factor[k][j].of[n]), l[j].of[n]);
            const Number q = multiply(adjoint[j].of[n], conj(before[k][j].of[n]));
            sums.B[j] = real_product(l[j].of[n], conj(b), sums.B[j]);
            sums.A[j] = real_product(q, conj(a[j].of[n]), sums.A[j]);
            dA[j].of[n] = scale_add(step.dt[j], q, dA[j].of[n]);
            if (!B_VARIES) dB_fixed[j].of[n] = scale_add(step.dx[j], l[j].of[n], dB_fixed[j].of[n]);
          }
        }
        own.sums[k][lane] = sums;
        if (B_VARIES) channel_sums.add(own.to_sum, own.left[s].sums, at, k, 0, dx, l);
      }
      __syncwarp();

      // The lane finishes its own steps.
#pragma unroll
      for (int r = 0; r < ROUNDS; r++) {
        const int k = (r * SPREAD + at.part) % SEGMENT, i = s * SEGMENT + k, channels = is_own && i < count ? at.count : 0;
        const Step step = own.steps[i][at.slot];
        float y[CHANNELS], sum_B[CHANNELS], sum_A[CHANNELS], dx_now[CHANNELS], ddt_now[CHANNELS], dz_now[CHANNELS];
#pragma unroll
        for (int j = 0; j < CHANNELS; j++) y[j] = sum_B[j] = sum_A[j] = 0.0f;
#pragma unroll 8
        for (int part = 0; part < SPREAD; part++) {
          const int from = part * SLOTS + at.slot;
          const Sums sums = own.sums[k][from];
          const Floats y_part = own.y[k / 2][from].of[k % 2];
#pragma unroll
          for (int j = 0; j < CHANNELS; j++) y[j] += y_part.of[j], sum_B[j] += sums.B[j], sum_A[j] += sums.A[j];
        }
        const Fixed fixed = own.fixed[at.slot];
#pragma unroll
        for (int j = 0; j < CHANNELS; j++) {
          const float dy = is_own ? dy_own[r].of[j] : 0.0f, input = own.x[buffer][i][at.slot].value(j);
          const float slope = SOFTPLUS ? logistic(own.dt[buffer][i][at.slot].value(j) + fixed.bias.of[j]) : 1.0f;
          dx_now[j] = fmaf(step.dt[j], sum_B[j], fixed.skip.of[j] * dy);
          ddt_now[j] = fmaf(input, sum_B[j], sum_A[j] * (1.0f / A_UNIT)) * slope;
          dz_now[j] = fmaf(fixed.skip.of[j], input, y[j]) * gate_slope[r][j];
          dD_run[j] = fmaf(dy, input, dD_run[j]);
          dbias_run[j] += channels ? ddt_now[j] : 0.0f;
        }
        const int64 here = own.out[at.slot] + (unsigned)(t0 + i) * (uint64)(unsigned)out_time;
        write(dx + here, dx_now, channels);
        write(ddt + here, ddt_now, channels);
        if (HAS_Z) write(dz + here, dz_now, channels);
      }
      // And the warp its sums over channels.
      if (B_VARIES || C_VARIES) channel_sums.finish(own.to_sum, own.left[s].sums, at);
      __syncwarp();
    }

    if ((t0 - start) % (8 * TILE) == 0) {
#pragma unroll
      for (int j = 0; j < CHANNELS; j++) {
#pragma unroll
        for (int other = SLOTS; other < 32; other *= 2) {
          dD_run[j] += __shfl_xor_sync(~0u, dD_run[j], other);
          dbias_run[j] += __shfl_xor_sync(~0u, dbias_run[j], other);
        }
        if (at.part == 0) own.dD[j][at.slot].add(dD_run[j]), own.dbias[j][at.slot].add(dbias_run[j]);
        dD_run[j] = dbias_run[j] = 0.0f;
      }
    }
    if (!COPIES_WEIGHTS && t0 > start) {
#pragma unroll
      for (int which = 0; which < 2; which++) {
        if (!Fetch<TILE>::EARLY) get(which, t0 - TILE);
        put(which, buffer ^ 1);
      }
    }
    __syncthreads();
    // The block's rows of dB and dC: (blocks of a batch row, B, L, PADDED).
    auto sums_of = [&](int warp, int segment) -> const ChannelSums::Totals& { return shared.scratch[warp].left[segment].sums; };
#pragma unroll 1
    for (int round = 0; round < (2 * TILE * SPREAD + 32 * WARPS - 1) / (32 * WARPS); round++) {
      const unsigned item = round * 32 * WARPS + threadIdx.x;
      if (2 * TILE * SPREAD % (32 * WARPS) != 0 && item >= 2 * TILE * SPREAD) continue;
      const int which = item / (TILE * SPREAD), i = item / (4 * SPREAD) % (TILE / 4) * 4 + item % 4, part = item / 4 % SPREAD;
      if (i >= count || (which == 0 ? !B_VARIES : !C_VARIES)) continue;
      States sum = ChannelSums::total(sums_of, 0, i, which, part);
#pragma unroll
      for (int warp = 1; warp < WARPS; warp++) add(sum, ChannelSums::total(sums_of, warp, i, which, part));
#pragma unroll
      for (int n = 0; n < STATES; n++) sum.of[n] = scaled(ChannelSums::made_up(which), sum.of[n]);
      const int64 row = ((int64)at.block * batch_size + at.batch) * seqlen + t0;
      *(States*)((which == 0 ? dB_parts : dC_parts) + row * PADDED + (i * PADDED + part * STATES)) = sum;
    }
    await_copies();
    __syncthreads();
  }

  // Sums over the time of this chunk: (B, chunks, D, PADDED) and (B, chunks, D).
#pragma unroll
  for (int j = 0; j < CHANNELS; j++) {
    if (j >= at.count) continue;
    const int64 row = (at.batch * chunks + blockIdx.y) * d_inner + at.channel + j;
    *(States*)(dA_parts + row * PADDED + first_state) = dA[j];
    if (!B_VARIES) *(States*)(dB_parts + row * PADDED + first_state) = dB_fixed[j];
    if (!C_VARIES) *(States*)(dC_parts + row * PADDED + first_state) = dC_fixed[j];
    if (at.part == 0) dD_parts[row] = own.dD[j][at.slot].total, dbias_parts[row] = own.dbias[j][at.slot].total;
    if (blockIdx.y == 0) {
#pragma unroll
      for (int n = 0; n < STATES; n++)
        if (first_state + n < d_state) dinitial_state[(state_row + j) * d_state + first_state + n] = adjoint[j].of[n];
    }
  }
}

FORCE_INLINE float exchanged(float v, int mask) { return __shfl_xor_sync(~0u, v, mask); }
FORCE_INLINE float2 exchanged(float2 v, int mask) { return make_float2(exchanged(v.x, mask), exchanged(v.y, mask)); }

// Sums of parts (blocks of a group, rows, PADDED), put by their place in (rows, groups, N). A lane has STATES states and every
// fourth part, so that many reads are under way.
template <class Put>
FORCE_INLINE void add_parts(const Number* parts, int64 rows, int64 d_state, int64 groups, int64 blocks, Put put) {
  const unsigned lane = threadIdx.x % 32;
  const int64 i = ((int64)blockIdx.x * blockDim.x + threadIdx.x) / 32 * 8 + lane % 8;
  const bool exists = i < rows * groups * SPREAD;
  const int64 first = i % SPREAD * STATES, group = i / SPREAD % groups, row = i / SPREAD / groups;
  const Number* from = parts + (group * blocks * rows + row) * PADDED + first;
  States sum = {};
#pragma unroll 8
  for (int64 block = lane / 8; block < (exists ? blocks : 0); block += 4) add(sum, *(const States*)(from + block * rows * PADDED));
#pragma unroll
  for (int n = 0; n < STATES; n++) {
#pragma unroll
    for (int other = 8; other < 32; other *= 2) sum.of[n] = scale_add(1.0f, exchanged(sum.of[n], other), sum.of[n]);
    if (exists && lane < 8 && first + n < d_state) put((row * groups + group) * d_state + first + n, sum.of[n]);
  }
}

// All sums of what the blocks of scan_backward left: dA, (D, N); dB and dC, (B, L, G, N), or (D, N) if they do not vary; and, of
// every channel, dD and the gradient of the bias, (D). `rows` is B L, `blocks` those of a batch row, `chunks` those of all.
extern "C" __global__ void scan_add_parts(
    const Number* dA_parts, const Number* dB_parts, const Number* dC_parts, const float* dD_parts, const float* dbias_parts,
    Number* dA, void* dB, void* dC, float* dD, float* dbias,
    int64 rows, int64 d_inner, int64 d_state, int64 B_groups, int64 C_groups, int64 blocks, int64 chunks) {
  auto of_channels = [&](const Number* parts, Number* sums) {
    add_parts(parts, d_inner, d_state, 1, chunks, [&](int64 at, Number sum) { sums[at] = sum; });
  };
  auto of_steps = [&](const Number* parts, Weight* sums, int64 groups) {
    add_parts(parts, rows, d_state, groups, blocks / groups, [&](int64 at, Number sum) { sums[at] = to_weight(sum); });
  };
  if (blockIdx.y == 0) {
    if (B_VARIES) of_steps(dB_parts, (Weight*)dB, B_groups);
    else of_channels(dB_parts, (Number*)dB);
  } else if (blockIdx.y == 1) {
    if (C_VARIES) of_steps(dC_parts, (Weight*)dC, C_groups);
    else of_channels(dC_parts, (Number*)dC);
  } else if (blockIdx.y == 2) {
    of_channels(dA_parts, dA);
  } else {
    const int64 channel = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    if (channel >= d_inner) return;
    float D_sum = 0.0f, bias_sum = 0.0f;
#pragma unroll 8
    for (int64 chunk = 0; chunk < chunks; chunk++) {
      D_sum += dD_parts[chunk * d_inner + channel];
      bias_sum += dbias_parts[chunk * d_inner + channel];
    }
    dD[channel] = D_sum, dbias[channel] = bias_sum;
  }
}
