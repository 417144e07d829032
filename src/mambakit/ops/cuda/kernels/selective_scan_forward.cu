// The selective scan, forward: h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t,  y_t = (sum_n C_t h_t + D x_t) silu(z_t).
//
// A warp walks its channels through time, the states in registers. When there are too few channels to fill the GPU, time
// is cut in chunks, one a block, and each direction takes two launches. The constant MODE says which this is:
//     CHUNK_STATES    for all chunks but the last: the final state from a start of zero, and the sum of dt. (The decay
//                     over a chunk is exp(A sum dt), so this one number a channel tells all of it.)
//     OUTPUTS         every chunk combines what the chunks before it left into its start, and makes the outputs
//     CHUNK_ADJOINTS  the first launch of the backward, for all chunks but the first: the recurrence of the adjoint,
//                     m_t = exp(dt_t A)* (m_{t+1} + C_t* dy_t), backwards in time from zero, and the sum of dt; `x` is dout
//                     there, dy = dout silu(z), and C takes the place of B
//
// SEGMENT: steps between two exchanges within a warp. TILE: steps whose B and C are in shared memory at a time. SAVE_EVERY:
// steps between the states that are kept for the backward, if `saved` is given.
#include "selective_scan.cuh"

enum { CHUNK_STATES, OUTPUTS, CHUNK_ADJOINTS };

constexpr int ROUNDS = SEGMENT > SPREAD ? SEGMENT / SPREAD : 1;  // steps of a segment that a lane prepares
static_assert(SAVE_EVERY % SEGMENT == 0 && TILE % SAVE_EVERY == 0, "states are saved between segments");

struct Shared {
  Step steps[WARPS][SEGMENT][SLOTS];
  Floats y[WARPS][SEGMENT][(SPREAD + 1) * SLOTS];  // parts of sum C h; a gap after each row, against bank conflicts
  Number B[2][TILE][PADDED], C[2][TILE][PADDED];
  float restarts[WARPS][SEGMENT];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "ops/cuda/selective_scan.py counts the same bytes");

FORCE_INLINE float gate(float z) { return HAS_Z ? z * logistic(z) : 1.0f; }

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS) scan_forward(
    const IO* x, const IO* dt, const Number* A, const void* B, const void* C, const float* D, const IO* z,
    const float* dt_bias, const Number* initial_state, const unsigned char* restart,
    IO* y, Number* final_state, Number* saved, Number* ends, Sum* sums,
    int64 seqlen, int64 d_inner, int64 d_state_, int64 groups, int64 chunk, int64 chunks,
    int64 x_batch, int64 x_time, int64 dt_batch, int64 dt_time, int64 z_batch, int64 z_time,
    int64 B_batch, int64 B_time, int64 B_group, int64 B_groups, int64 C_batch, int64 C_time, int64 C_group, int64 C_groups) {
  extern __shared__ __align__(16) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);

  const int d_state = (int)d_state_;
  const Place at = place(groups, d_inner / groups);
  const int first_state = at.part * STATES;
  const int64 this_chunk = blockIdx.y + (MODE == CHUNK_ADJOINTS ? 1 : 0), start = this_chunk * chunk;
  const int64 stop = start + chunk < seqlen ? start + chunk : seqlen;
  const int64 state_row = at.batch * d_inner + at.channel;  // of (B, D)

  States a[CHANNELS], h[CHANNELS], B_fixed[CHANNELS], C_fixed[CHANNELS];
  float bias[CHANNELS], skip[CHANNELS];
  Sum sum_dt[CHANNELS];
  bool is_cut = false;  // the state started afresh in this chunk
#pragma unroll
  for (int j = 0; j < CHANNELS; j++) {
    const bool exists = j < at.count;
    const int held = exists ? d_state : 0;
    a[j] = read_states(A + (at.channel + j) * d_state, first_state, held);
    if (!B_VARIES) B_fixed[j] = read_states((const Number*)B + (at.channel + j) * d_state, first_state, held);
    if (!C_VARIES && MODE == OUTPUTS) C_fixed[j] = read_states((const Number*)C + (at.channel + j) * d_state, first_state, held);
    bias[j] = exists && dt_bias ? dt_bias[at.channel + j] : 0.0f;
    skip[j] = exists && D ? D[at.channel + j] : 0.0f;
    h[j] = read_states(initial_state + (state_row + j) * d_state, first_state, MODE == OUTPUTS && initial_state ? held : 0);
#pragma unroll
    for (int n = 0; n < STATES; n++) {
      a[j].of[n] = scaled(A_UNIT, a[j].of[n]);
      if (MODE == CHUNK_ADJOINTS) a[j].of[n] = conj(a[j].of[n]);
    }
  }
  if (MODE == OUTPUTS) {
    for (int64 before = 0; before < this_chunk; before++) {
#pragma unroll
      for (int j = 0; j < CHANNELS; j++) {
        if (j >= at.count) continue;
        const int64 row = (at.batch * chunks + before) * d_inner + at.channel + j;
        const Sum sum = sums[row];  // infinite if the state started afresh within the chunk
        const States end = *(const States*)(ends + row * PADDED + first_state);
#pragma unroll
        for (int n = 0; n < STATES; n++) {
          const Number carried = multiply(decay(sum.total, a[j].of[n], -sum.lost), h[j].of[n]);
          h[j].of[n] = HAS_RESTART && isinf(sum.total) ? end.of[n] : scale_add(1.0f, carried, end.of[n]);
        }
      }
    }
  }

  // The step visited first, and the direction of time.
  const int64 first = MODE == CHUNK_ADJOINTS ? stop - 1 : start, forward = MODE == CHUNK_ADJOINTS ? -1 : 1;
  int left = (int)(stop - start);  // steps from the current segment on
  x_time *= forward, dt_time *= forward, z_time *= forward, B_time *= forward, C_time *= forward;

  const Weight* B_rows = (const Weight*)B + at.batch * B_batch + at.group * B_groups / groups * B_group;
  const Weight* C_rows = (const Weight*)C + at.batch * C_batch + at.group * C_groups / groups * C_group;
  B_rows += forward * first * B_time, C_rows += forward * first * C_time;
  Fetch<TILE> B_next, C_next;
  if (B_VARIES) B_next.get(B_rows, B_time, left, d_state), B_next.put(shared.B[0]);
  if (C_VARIES && MODE == OUTPUTS) C_next.get(C_rows, C_time, left, d_state), C_next.put(shared.C[0]);
  __syncthreads();

  // Pointers to the lane's own steps, which move on by a segment at a time.
  x += at.batch * x_batch + (forward * first + at.part) * x_time + at.channel;
  dt += at.batch * dt_batch + (forward * first + at.part) * dt_time + at.channel;
  if (HAS_Z) z += at.batch * z_batch + (forward * first + at.part) * z_time + at.channel;
  y += (at.batch * seqlen + start + at.part) * d_inner + at.channel;
  if (HAS_RESTART) restart += at.batch * seqlen + first;
  if (MODE == OUTPUTS && saved) {
    const int64 tiles = (seqlen + SAVE_EVERY - 1) / SAVE_EVERY;
    saved += ((at.batch * tiles + start / SAVE_EVERY) * d_inner + at.channel) * PADDED + first_state;
  }

  // The inputs of the next segment, on their way from memory while this one is computed.
  Channels x_next[ROUNDS], dt_next[ROUNDS], z_next[ROUNDS];
  const bool is_own = SPREAD <= SEGMENT || at.part < SEGMENT;  // has a step in every round
  auto fetch = [&](int steps_left) {
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
      const int count = is_own && r * SPREAD + at.part < steps_left ? at.count : 0;
      x_next[r] = read(x + r * SPREAD * x_time, count);
      dt_next[r] = read(dt + r * SPREAD * dt_time, count);
      if (HAS_Z && MODE != CHUNK_STATES) z_next[r] = read(z + r * SPREAD * z_time, count);
    }
    x += SEGMENT * x_time, dt += SEGMENT * dt_time;
    if (HAS_Z && MODE != CHUNK_STATES) z += SEGMENT * z_time;
  };
  fetch(left);

  int buffer = 0;
  for (; left > 0; buffer ^= 1) {
    B_rows += TILE * B_time, C_rows += TILE * C_time;
    const int left_then = left - TILE;
    auto fetch_weights = [&]() {
      if (B_VARIES) B_next.get(B_rows, B_time, left_then, d_state);
      if (C_VARIES && MODE == OUTPUTS) C_next.get(C_rows, C_time, left_then, d_state);
    };
    if (Fetch<TILE>::EARLY) fetch_weights();

#pragma unroll 1
    for (int from = 0; from < TILE && left > 0; from += SEGMENT, left -= SEGMENT) {
      // The lane prepares its own steps and keeps what finishing them needs, in few registers.
      Channels x_now[ROUNDS], z_now[ROUNDS];
#pragma unroll
      for (int r = 0; r < ROUNDS; r++) {
        const int i = r * SPREAD + at.part;
        x_now[r] = x_next[r], z_now[r] = z_next[r];
        Step step;
#pragma unroll
        for (int j = 0; j < CHANNELS; j++) {
          step.dt[j] = time_step(dt_next[r].value(j) + bias[j], i < left);
          step.dx[j] = x_now[r].value(j) * (MODE == CHUNK_ADJOINTS ? gate(z_now[r].value(j)) : step.dt[j]);
        }
        if (is_own) shared.steps[at.warp][i][at.slot] = step;
      }
      if (HAS_RESTART) {
        const int i = threadIdx.x % 32;
        if (i < SEGMENT) shared.restarts[at.warp][i] = i < left && restart[forward * i] ? 0.0f : 1.0f;
        restart += forward * SEGMENT;
      }
      __syncwarp();
      fetch(left - SEGMENT);

      if (MODE == OUTPUTS && saved && from % SAVE_EVERY == 0) {
#pragma unroll
        for (int j = 0; j < CHANNELS; j++)
          if (j < at.count) *(States*)(saved + j * PADDED) = h[j];
        saved += d_inner * PADDED;
      }

      // What a step needs is read a step ahead: the compiler does not move it across the writes of sums.
      Step step_next = shared.steps[at.warp][0][at.slot];
      States B_ahead = *(const States*)&shared.B[buffer][from][first_state];
#pragma unroll
      for (int i = 0; i < SEGMENT; i++) {
        const Step step = step_next;
        const States B_now = B_ahead, C_now = *(const States*)&shared.C[buffer][from + i][first_state];
        if (i + 1 < SEGMENT) {
          step_next = shared.steps[at.warp][i + 1][at.slot];
          B_ahead = *(const States*)&shared.B[buffer][from + i + 1][first_state];
        }
        const float kept = HAS_RESTART ? shared.restarts[at.warp][i] : 1.0f;
        Floats sum;
#pragma unroll
        for (int j = 0; j < CHANNELS; j++) {
          sum.of[j] = 0.0f;
          if (MODE != OUTPUTS) {
            if (COMPLEX) sum_dt[j].add(step.dt[j]);  // of a real decay the last bits do not count
            else sum_dt[j].total += step.dt[j];
            if (HAS_RESTART && kept == 0.0f) is_cut = true;
          }
#pragma unroll
          for (int n = 0; n < STATES; n++) {
            const Number b = B_VARIES ? B_now.of[n] : B_fixed[j].of[n];
            const Number c = C_VARIES ? C_now.of[n] : C_fixed[j].of[n];
            Number factor = decay(step.dt[j], a[j].of[n]);
            if (HAS_RESTART) factor = scaled(kept, factor);
            if (MODE == CHUNK_ADJOINTS) h[j].of[n] = multiply(factor, scale_add(step.dx[j], conj(b), h[j].of[n]));
            else h[j].of[n] = scale_add(step.dx[j], b, multiply(factor, h[j].of[n]));
            if (MODE == OUTPUTS) sum.of[j] = real_product(c, h[j].of[n], sum.of[j]);
          }
        }
        if (MODE == OUTPUTS) shared.y[at.warp][i][at.part * SLOTS + at.slot] = sum;
      }
      __syncwarp();

      if (MODE == OUTPUTS) {
#pragma unroll
        for (int r = 0; r < ROUNDS; r++) {
          const int i = r * SPREAD + at.part;
          float out[CHANNELS];
#pragma unroll
          for (int j = 0; j < CHANNELS; j++) out[j] = skip[j] * x_now[r].value(j);
#pragma unroll 8
          for (int part = 0; part < SPREAD; part++) {
            const Floats sum = shared.y[at.warp][i % SEGMENT][part * SLOTS + at.slot];
#pragma unroll
            for (int j = 0; j < CHANNELS; j++) out[j] += sum.of[j];
          }
#pragma unroll
          for (int j = 0; j < CHANNELS; j++) out[j] *= gate(z_now[r].value(j));
          write(y + r * SPREAD * d_inner, out, is_own && i < left ? at.count : 0);
        }
        y += SEGMENT * d_inner;
      }
    }
    if (!Fetch<TILE>::EARLY) fetch_weights();
    if (B_VARIES) B_next.put(shared.B[buffer ^ 1]);
    if (C_VARIES && MODE == OUTPUTS) C_next.put(shared.C[buffer ^ 1]);
    __syncthreads();
  }

#pragma unroll
  for (int j = 0; j < CHANNELS; j++) {
    if (j >= at.count) continue;
    if (MODE != OUTPUTS) {
      const int64 row = (at.batch * chunks + this_chunk) * d_inner + at.channel + j;
      *(States*)(ends + row * PADDED + first_state) = h[j];
      if (HAS_RESTART && is_cut) sum_dt[j] = Sum{1.0f / 0.0f, 0.0f};
      if (at.part == 0) sums[row] = sum_dt[j];
    } else if (this_chunk == chunks - 1) {
#pragma unroll
      for (int n = 0; n < STATES; n++)
        if (first_state + n < d_state) final_state[(state_row + j) * d_state + first_state + n] = h[j].of[n];
    }
  }
}
