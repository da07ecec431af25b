#pragma once

/// Marks a function that is compiled for CPU and GPU alike, so that its arithmetic is tested on
/// machines without a GPU.
#ifdef __CUDACC__
#define TAILOR_HOST_DEVICE __host__ __device__
#else
#define TAILOR_HOST_DEVICE
#endif

/// Before a loop of fixed length over a small array, which then lives in registers; and before one
/// that is seldom run, whose code stays small.
#ifdef __CUDA_ARCH__
#define TAILOR_UNROLL _Pragma("unroll")
#define TAILOR_ROLLED _Pragma("unroll 1")
#else
#define TAILOR_UNROLL
#define TAILOR_ROLLED
#endif
