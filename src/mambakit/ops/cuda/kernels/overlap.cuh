// Kernels that begin while the one before them in the stream still runs (programmatic dependent launch, from compute
// capability 9.0 on; before it, and where the launch does not ask for it, these are no more than comments).
#pragma once

// The next kernel may begin as soon as all blocks have come here. It may read what no kernel of the step writes.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// The kernel before has ended, and with it all that were before it, and what they wrote is there. Every thread has to come
// here before it writes anything or reads what they write.
__device__ __forceinline__ void await_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
