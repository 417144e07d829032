// The selective scan, backward. With dy the gradient of the sum before the gate, and * the conjugate (of complex A):
//
//     l_t = C_t* dy_t + exp(dt_{t+1} A)* l_{t+1}          the adjoint of h_t, backwards in time
//     dC_t = dy_t h_t*       dB_t = dt_t x_t l_t          sums over the channels of a group
//     dx_t = dt_t Re(sum_n B_t* l_t) + D dy_t
//     q_t = l_t (exp(dt_t A) h_{t-1})*
//     dA = sum_t dt_t q_t    ddt_t = Re(sum_n A* q_t) + x_t Re(sum_n B_t* l_t),  then through the softplus
//
// The states h are not stored: the forward saved one every TILE steps. From it a warp first walks to each SEGMENT of the tile
// and leaves the state there in shared memory; then, from the last segment to the first, it walks the segment again with
// exp(dt A) and exp(dt A) h in registers, and back with the adjoint. Lanes and channels are as in selective_scan.cuh.
//
// SEGMENT: 4, or 8 where few blocks leave each the registers for it.
//
// Sums over channels go through shared memory: lanes to warp at the end of a segment, warps to block at the end of a tile,
// and one row a block to global memory, which scan_add_parts adds in order. So every sum has one order, and no atomics.
#include "selective_scan.cuh"

constexpr int TILE = SAVE_EVERY;
#include "channel_sums.cuh"

constexpr int ROUNDS = SEGMENT > SPREAD ? SEGMENT / SPREAD : 1;  // steps of a segment that a lane prepares
constexpr int SEGMENTS = TILE / SEGMENT;

// A part of the sums over n: Re(B* l) and Re(A* q).
struct alignas(CHANNELS == 1 ? 8 : 16) Sums { float B[CHANNELS], A[CHANNELS]; };

// What a warp has for itself.
struct Scratch {
  Step steps[TILE][SLOTS];
  Channels x[2][TILE][SLOTS], dt[2][TILE][SLOTS], z[2][TILE][SLOTS], dout[2][TILE][SLOTS];  // of this tile and the next
  float bias[CHANNELS][32], skip[CHANNELS][32];
  Floats dy[SEGMENT][SLOTS];
  States start[CHANNELS][32];                         // the state before the tile
  States starts[SEGMENTS - 1][CHANNELS][32];          // and before each segment but the first
  Floats y[SEGMENT][(SPREAD + 1) * SLOTS];            // parts of sum C h; a gap after each row, against bank conflicts
  Sums sums[SEGMENT][(SPREAD + 1) * SLOTS];
  Sum dD[CHANNELS][32], dbias[CHANNELS][32];          // over all time, of the steps of each lane
  float restarts[TILE];
  ChannelSums::Scratch weights;
};

// Of the whole block.
struct Shared {
  Scratch scratch[WARPS];
  Number B[2][TILE][PADDED], C[2][TILE][PADDED];
  Number weights[WARPS][TILE][2][PADDED];             // dB and dC, summed over the channels of each warp
};
static_assert(sizeof(Shared) == SHARED_BYTES, "ops/cuda/selective_scan.py counts the same bytes");

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS) scan_backward(
    const IO* dout, const IO* x, const IO* dt, const Number* A, const void* B, const void* C, const float* D, const IO* z,
    const float* dt_bias, const unsigned char* restart, const Number* saved, const Number* dfinal_state,
    const Number* adjoints, const Sum* sums_dt,
    IO* dx, IO* ddt, IO* dz, Number* dA_parts, Number* dB_parts, Number* dC_parts, float* dD_parts, float* dbias_parts,
    Number* dinitial_state,
    int64 seqlen, int64 d_inner, int64 d_state_, int64 groups, int64 chunk, int64 chunks,
    int64 dout_batch, int64 dout_time, int64 x_batch, int64 x_time, int64 dt_batch, int64 dt_time, int64 z_batch,
    int64 z_time,
    int64 B_batch, int64 B_time, int64 B_group, int64 B_groups, int64 C_batch, int64 C_time, int64 C_group, int64 C_groups) {
  extern __shared__ __align__(16) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);

  const int d_state = (int)d_state_, lane = threadIdx.x % 32;
  const Place at = place(groups, d_inner / groups);
  Scratch& own = shared.scratch[at.warp];
  const bool is_own = SPREAD <= SEGMENT || at.part < SEGMENT;  // has a step in every round
  const int first_state = at.part * STATES;
  const int start = (int)(blockIdx.y * chunk), stop = (int)(start + chunk < seqlen ? start + chunk : seqlen);
  const int64 state_row = at.batch * d_inner + at.channel;  // of (B, D)
  const int64 tiles = (seqlen + TILE - 1) / TILE, batch_size = gridDim.x / at.blocks;

  States a[CHANNELS], adjoint[CHANNELS], dA[CHANNELS], B_fixed[CHANNELS], C_fixed[CHANNELS], dB_fixed[CHANNELS], dC_fixed[CHANNELS];
  ChannelSums channel_sums;
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
    own.bias[j][lane] = dt_bias && j < at.count ? dt_bias[at.channel + j] : 0.0f;
    own.skip[j][lane] = D && j < at.count ? D[at.channel + j] : 0.0f;
    own.dD[j][lane] = own.dbias[j][lane] = Sum{};
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
  if (B_VARIES) B_next.get(B_rows + t0 * B_time, B_time, stop - t0, d_state), B_next.put(shared.B[0]);
  if (C_VARIES) C_next.get(C_rows + t0 * C_time, C_time, stop - t0, d_state), C_next.put(shared.C[0]);
  __syncthreads();

  // Copies of the lane's own steps of a tile, and of the state before it.
  auto copy_steps = [&](int from, int to) {
    const int64 channel = opaque(at.channel), first = from + at.part;
    const IO* dout_from = dout + at.batch * dout_batch + first * dout_time + channel;
    const IO* x_from = x + at.batch * x_batch + first * x_time + channel;
    const IO* dt_from = dt + at.batch * dt_batch + first * dt_time + channel;
    const IO* z_from = z + at.batch * z_batch + first * z_time + channel;
#pragma unroll
    for (int k = 0; k < (TILE + SPREAD - 1) / SPREAD; k++) {
      const int i = k * SPREAD + at.part;
      if (TILE % SPREAD != 0 && i >= TILE) continue;
      const int channels = from + i < stop ? at.count : 0;
      copy(own.x[to][i][at.slot], x_from + k * SPREAD * x_time, channels);
      copy(own.dt[to][i][at.slot], dt_from + k * SPREAD * dt_time, channels);
      copy(own.dout[to][i][at.slot], dout_from + k * SPREAD * dout_time, channels);
      if (HAS_Z) copy(own.z[to][i][at.slot], z_from + k * SPREAD * z_time, channels);
    }
  };
  auto copy_start = [&](int from) {
    const Number* rows = saved + ((at.batch * tiles + from / TILE) * d_inner + opaque(at.channel)) * PADDED + first_state;
#pragma unroll
    for (int j = 0; j < CHANNELS; j++) {
      const Number* row = rows + (j < at.count ? j : 0) * PADDED;
#pragma unroll
      for (int i = 0; i < sizeof(States); i += 16)
        if (at.count) copy((char*)&own.start[j][lane] + i, (const char*)row + i);
    }
  };
  if (!at.count) {
#pragma unroll
    for (int j = 0; j < CHANNELS; j++) own.start[j][lane] = States{};
  }
  copy_steps(t0, 0), copy_start(t0);

  int buffer = 0;
  for (; t0 >= start; t0 -= TILE, buffer ^= 1) {
    const int count = stop - t0 < TILE ? stop - t0 : TILE;  // steps of the tile that exist
    auto fetch_weights = [&]() {
      if (B_VARIES) B_next.get(B_rows + (t0 - TILE) * B_time, B_time, TILE, d_state);
      if (C_VARIES) C_next.get(C_rows + (t0 - TILE) * C_time, C_time, TILE, d_state);
    };
    if (Fetch<TILE>::EARLY && t0 > start) fetch_weights();

    // The lane prepares its own steps.
    await_copies();
#pragma unroll
    for (int k = 0; k < (TILE + SPREAD - 1) / SPREAD; k++) {
      const int i = k * SPREAD + at.part;
      if (TILE % SPREAD != 0 && i >= TILE) continue;
      Step step;
#pragma unroll
      for (int j = 0; j < CHANNELS; j++) {
        step.dt[j] = time_step(own.dt[buffer][i][at.slot].value(j) + own.bias[j][lane], i < count);
        step.dx[j] = step.dt[j] * own.x[buffer][i][at.slot].value(j);
      }
      own.steps[i][at.slot] = step;
    }
    if (HAS_RESTART && lane < TILE) own.restarts[lane] = lane < count && restart[t0 + lane] ? 0.0f : 1.0f;
    __syncwarp();
    if (t0 > start) copy_steps(t0 - TILE, buffer ^ 1);
    States h[CHANNELS];
#pragma unroll
    for (int j = 0; j < CHANNELS; j++) h[j] = own.start[j][lane];

    // One step of the recurrence: exp(dt A) h_{t-1}, and then h_t.
    auto carry = [&](int i, int j, int n, Number& factor, Number& carried, const Step& step, const States& B_now) {
      factor = decay(step.dt[j], a[j].of[n]);
      if (HAS_RESTART) factor = scaled(own.restarts[i], factor);
      carried = multiply(factor, h[j].of[n]);
      h[j].of[n] = scale_add(step.dx[j], B_VARIES ? B_now.of[n] : B_fixed[j].of[n], carried);
    };

    // To the start of each segment.
#pragma unroll 1
    for (int s = 0; s < SEGMENTS - 1; s++) {
#pragma unroll
      for (int k = 0; k < SEGMENT; k++) {
        const int i = s * SEGMENT + k;
        const Step step = own.steps[i][at.slot];
        const States B_now = *(const States*)&shared.B[buffer][i][first_state];
        Number factor, carried;
#pragma unroll
        for (int j = 0; j < CHANNELS; j++)
#pragma unroll
          for (int n = 0; n < STATES; n++) carry(i, j, n, factor, carried, step, B_now);
      }
#pragma unroll
      for (int j = 0; j < CHANNELS; j++) own.starts[s][j][lane] = h[j];
    }

    float dD_tile[CHANNELS] = {}, dbias_tile[CHANNELS] = {};
#pragma unroll 1
    for (int s = SEGMENTS - 1; s >= 0; s--) {
      // dy, and the factor that makes dz of y.
      float gate_slope[ROUNDS][CHANNELS], dy_own[ROUNDS][CHANNELS];
#pragma unroll
      for (int r = 0; r < ROUNDS; r++) {
        const int k = r * SPREAD + at.part, i = s * SEGMENT + k % SEGMENT;
        const Channels dout_raw = own.dout[buffer][i][at.slot], z_raw = own.z[buffer][i][at.slot];
        Floats dy;
#pragma unroll
        for (int j = 0; j < CHANNELS; j++) {
          const float g = HAS_Z ? z_raw.value(j) : 0.0f, sig = logistic(g), d = dout_raw.value(j);
          dy.of[j] = dy_own[r][j] = HAS_Z ? d * g * sig : d;
          gate_slope[r][j] = d * sig * fmaf(g, 1.0f - sig, 1.0f);
        }
        if (is_own) own.dy[k][at.slot] = dy;
      }
      __syncwarp();
      channel_sums.start();

      // The segment again, forwards.
      States factor[SEGMENT][CHANNELS], carried[SEGMENT][CHANNELS];
#pragma unroll
      for (int j = 0; j < CHANNELS; j++) h[j] = s > 0 ? own.starts[s - 1][j][lane] : own.start[j][lane];
      if (s == 0 && t0 > start) copy_start(t0 - TILE);
      // What a step needs is read a step ahead: the compiler does not move it across the writes of sums.
      Step step_next = own.steps[s * SEGMENT][at.slot];
      States B_ahead = *(const States*)&shared.B[buffer][s * SEGMENT][first_state];
#pragma unroll
      for (int k = 0; k < SEGMENT; k++) {
        const int i = s * SEGMENT + k;
        const Step step = step_next;
        const Floats dy = own.dy[k][at.slot];
        const States B_now = B_ahead;
        const States C_now = *(const States*)&shared.C[buffer][i][first_state];
        if (k + 1 < SEGMENT) {
          step_next = own.steps[i + 1][at.slot];
          B_ahead = *(const States*)&shared.B[buffer][i + 1][first_state];
        }
        Floats y;
        States dC;
#pragma unroll
        for (int j = 0; j < CHANNELS; j++) {
          y.of[j] = 0.0f;
#pragma unroll
          for (int n = 0; n < STATES; n++) {
            carry(i, j, n, factor[k][j].of[n], carried[k][j].of[n], step, B_now);
            y.of[j] = real_product(C_VARIES ? C_now.of[n] : C_fixed[j].of[n], h[j].of[n], y.of[j]);
            Number& sum = C_VARIES ? dC.of[n] : dC_fixed[j].of[n];
            sum = C_VARIES && j == 0 ? scaled(dy.of[j], conj(h[j].of[n])) : scale_add(dy.of[j], conj(h[j].of[n]), sum);
          }
        }
        if (HAS_Z) own.y[k][at.part * SLOTS + at.slot] = y;
        if (C_VARIES) channel_sums.add(own.weights, at, k, 1, dC);
      }

      // And back.
      Floats dy_next = own.dy[SEGMENT - 1][at.slot];
      States C_ahead = *(const States*)&shared.C[buffer][s * SEGMENT + SEGMENT - 1][first_state];
#pragma unroll
      for (int k = SEGMENT - 1; k >= 0; k--) {
        const int i = s * SEGMENT + k;
        const Step step = own.steps[i][at.slot];
        const Floats dy = dy_next;
        const States B_now = *(const States*)&shared.B[buffer][i][first_state];
        const States C_now = C_ahead;
        if (k > 0) {
          dy_next = own.dy[k - 1][at.slot];
          C_ahead = *(const States*)&shared.C[buffer][i - 1][first_state];
        }
        Sums sums;
        States dB;
#pragma unroll
        for (int j = 0; j < CHANNELS; j++) {
          sums.A[j] = sums.B[j] = 0.0f;
#pragma unroll
          for (int n = 0; n < STATES; n++) {
            const Number b = B_VARIES ? B_now.of[n] : B_fixed[j].of[n], c = C_VARIES ? C_now.of[n] : C_fixed[j].of[n];
            const Number l = scale_add(dy.of[j], conj(c), adjoint[j].of[n]);
            const Number q = multiply(l, conj(carried[k][j].of[n]));
            sums.B[j] = real_product(l, conj(b), sums.B[j]);
            sums.A[j] = real_product(q, conj(a[j].of[n]), sums.A[j]);
            dA[j].of[n] = scale_add(step.dt[j], q, dA[j].of[n]);
            Number& sum = B_VARIES ? dB.of[n] : dB_fixed[j].of[n];
            sum = B_VARIES && j == 0 ? scaled(step.dx[j], l) : scale_add(step.dx[j], l, sum);
            adjoint[j].of[n] = multiply(conj(factor[k][j].of[n]), l);
          }
        }
        own.sums[k][at.part * SLOTS + at.slot] = sums;
        if (B_VARIES) channel_sums.add(own.weights, at, k, 0, dB);
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
          const Sums sums = own.sums[k][part * SLOTS + at.slot];
          const Floats y_part = own.y[k][part * SLOTS + at.slot];
#pragma unroll
          for (int j = 0; j < CHANNELS; j++) y[j] += y_part.of[j], sum_B[j] += sums.B[j], sum_A[j] += sums.A[j];
        }
#pragma unroll
        for (int j = 0; j < CHANNELS; j++) {
          const float dy = is_own ? dy_own[r][j] : 0.0f, input = own.x[buffer][i][at.slot].value(j);
          const float slope = SOFTPLUS ? logistic(own.dt[buffer][i][at.slot].value(j) + own.bias[j][lane]) : 1.0f;
          dx_now[j] = fmaf(step.dt[j], sum_B[j], own.skip[j][lane] * dy);
          ddt_now[j] = fmaf(input, sum_B[j], sum_A[j] * (1.0f / A_UNIT)) * slope;
          dz_now[j] = fmaf(own.skip[j][lane], input, y[j]) * gate_slope[r][j];
          dD_tile[j] = fmaf(dy, input, dD_tile[j]);
          dbias_tile[j] += channels ? ddt_now[j] : 0.0f;
        }
        const int64 here = (at.batch * seqlen + t0 + i) * d_inner + at.channel;
        write(dx + here, dx_now, channels);
        write(ddt + here, ddt_now, channels);
        if (HAS_Z) write(dz + here, dz_now, channels);
      }
      // And the warp its sums over channels.
      if (B_VARIES || C_VARIES) channel_sums.finish(own.weights, at, &shared.weights[at.warp][s * SEGMENT]);
      __syncwarp();
    }

#pragma unroll
    for (int j = 0; j < CHANNELS; j++) own.dD[j][lane].add(dD_tile[j]), own.dbias[j][lane].add(dbias_tile[j]);
    if (t0 > start) {
      if (!Fetch<TILE>::EARLY) fetch_weights();
      if (B_VARIES) B_next.put(shared.B[buffer ^ 1]);
      if (C_VARIES) C_next.put(shared.C[buffer ^ 1]);
    }
    __syncthreads();
    // The block's rows of dB and dC: (blocks of a batch row, B, L, PADDED).
    for (int item = threadIdx.x; item < TILE * 2 * SPREAD; item += 32 * WARPS) {
      const int i = item / (2 * SPREAD), which = item / SPREAD % 2, part = item % SPREAD;
      if (i >= count || (which == 0 ? !B_VARIES : !C_VARIES)) continue;
      States sum = *(const States*)&shared.weights[0][i][which][part * STATES];
#pragma unroll
      for (int warp = 1; warp < WARPS; warp++) {
        const States more = *(const States*)&shared.weights[warp][i][which][part * STATES];
#pragma unroll
        for (int n = 0; n < STATES; n++) sum.of[n] = scale_add(1.0f, more.of[n], sum.of[n]);
      }
      Number* parts = which == 0 ? dB_parts : dC_parts;
      *(States*)(parts + (((int64)at.block * batch_size + at.batch) * seqlen + t0 + i) * PADDED + part * STATES) = sum;
    }
    __syncthreads();
  }

  // Sums over the time of this chunk: (B, chunks, D, PADDED) and (B, chunks, D).
#pragma unroll
  for (int j = 0; j < CHANNELS; j++) {
    float dD_sum = own.dD[j][lane].total, dbias_sum = own.dbias[j][lane].total;
#pragma unroll
    for (int other = SLOTS; other < 32; other *= 2) {
      dD_sum += __shfl_xor_sync(~0u, dD_sum, other);
      dbias_sum += __shfl_xor_sync(~0u, dbias_sum, other);
    }
    if (j >= at.count) continue;
    const int64 row = (at.batch * chunks + blockIdx.y) * d_inner + at.channel + j;
    *(States*)(dA_parts + row * PADDED + first_state) = dA[j];
    if (!B_VARIES) *(States*)(dB_parts + row * PADDED + first_state) = dB_fixed[j];
    if (!C_VARIES) *(States*)(dC_parts + row * PADDED + first_state) = dC_fixed[j];
    if (at.part == 0) dD_parts[row] = dD_sum, dbias_parts[row] = dbias_sum;
    if (blockIdx.y == 0) {
#pragma unroll
      for (int n = 0; n < STATES; n++)
        if (first_state + n < d_state) dinitial_state[(state_row + j) * d_state + first_state + n] = adjoint[j].of[n];
    }
  }
}

// dB or dC, (B, L, G, N): the sums of the parts that the blocks of a group left, (blocks of a batch row, B, L, PADDED).
extern "C" __global__ void scan_add_parts(
    const Number* parts, Weight* sums, int64 rows, int64 d_state, int64 groups, int64 blocks) {
  const int64 i = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= rows * groups * d_state) return;
  const int64 n = i % d_state, group = i / d_state % groups, row = i / d_state / groups;
  Number sum = zero();
  for (int64 block = group * blocks; block < (group + 1) * blocks; block++)
    sum = scale_add(1.0f, parts[(block * rows + row) * PADDED + n], sum);
  sums[i] = to_weight(sum);
}
