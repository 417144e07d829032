// The states of the scan of all layers, of rows whose last step has been deferred: that step, as `decode_rows.cu` repeats it.
//
// IO: bfloat16 or float16. LAYERS: of the model. D_STATE (N). REPEATS: the turn of such rows.
#include "vectors.cuh"

constexpr int THREADS = 256, LANE_STATES = 4, SPREAD = D_STATE / LANE_STATES;  // states of a lane, and lanes that share a channel

struct Layer {
  const float* A_log;
  float* ssm_state;  // (B, D, N), contiguous in D and N
};

struct Model {
  Layer layers[LAYERS];
  const IO *inputs, *B;  // (layers, 2, rows, D), dt and x; (layers, rows, N)
  const int* turns;      // (B)
  int64 rows, batch, channels, ssm_batch;  // of the inputs, and of the states; the stride of a row of these
};

// A block has THREADS / SPREAD channels of a row of a layer.
extern "C" __global__ void __launch_bounds__(THREADS) settle_states(const __grid_constant__ Model model) {
  const int blocks = (int)((model.channels * SPREAD + THREADS - 1) / THREADS), batch = (int)model.batch;
  const int of_layer = blockIdx.x / blocks, l = of_layer / batch, row = of_layer % batch;
  if (model.turns[row] != REPEATS) return;
  const int place = blockIdx.x % blocks * THREADS + threadIdx.x, channel = place / SPREAD;
  if (channel >= model.channels) return;
  const IO* const dt = model.inputs + (2 * l * model.rows + row) * model.channels + channel;
  const IO* const B = model.B + (l * model.rows + row) * D_STATE + place % SPREAD * LANE_STATES;
  const float step = to_float(dt[0]), x = to_float(dt[model.rows * model.channels]);
  const auto log_rates = read<LANE_STATES>(model.layers[l].A_log + place * LANE_STATES);
  float* const at = model.layers[l].ssm_state + row * model.ssm_batch + place * LANE_STATES;
  auto h = read<LANE_STATES>(at);
#pragma unroll
  for (int s = 0; s < LANE_STATES; ++s) {
    const float rate = -expf(log_rates.items[s]) * LOG2_E;
    h.items[s] = fmaf(exp2_approx(step * rate), h.items[s], step * x * to_float(B[s]));
  }
  write(at, h.items);
}
