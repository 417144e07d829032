// Functions of one number in a step of the scan; as in softplus.cuh.
#pragma once
#include "softplus.cuh"

__device__ __forceinline__ float sigmoid_of(float x) { return sizeof(IO) == 2 ? sigmoid(x) : 1.0f / (1.0f + expf(-x)); }
