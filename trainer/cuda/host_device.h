#pragma once

/// Marks a function that is compiled for CPU and GPU alike, so that its arithmetic is tested on
/// machines without a GPU.
#ifdef __CUDACC__
#define TAILOR_HOST_DEVICE __host__ __device__
#else
#define TAILOR_HOST_DEVICE
#endif
