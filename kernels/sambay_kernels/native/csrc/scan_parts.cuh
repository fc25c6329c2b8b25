// What the kernels of the scan are made of: arguments, the place of a lane, rows of tokens, B and C in shared memory.
#pragma once

#include "cuda_common.cuh"

extern __shared__ float4 sambay_shared[];

namespace sambay {

template <typename T>
struct ScanArgs {
  int64_t tokens, channels, states, documents, segments;
  int64_t slabs, tiles;  // lanes of a channel, a power of two; blocks side by side for all channels
  const int32_t *start, *end, *document, *first, *borders;  // the plan of segments.py
  Rows<T> u, delta, B, C, z;
  const float *A, *D, *bias, *initial;  // D, bias, initial may be null
  int64_t softplus;
};

template <typename T>
struct ScanForward {
  ScanArgs<T> in;
  float *local, *elapsed, *carried;  // (n, N, D), (n, D), (n, N, D): scratch; null where no document is cut
  T* y;                              // (T, D)
  float *final_state, *kept;         // (S, D, N); (rows, N, D), may be null
};

template <typename T>
struct ScanBackward {
  ScanArgs<T> in;
  Rows<T> grad_y;                    // data may be null
  const float *grad_final, *kept;    // (S, D, N), may be null
  float *local, *elapsed, *carried;  // as in ScanForward
  T *u, *delta, *z;                  // gradients, (T, D); z may be null
  float *A, *D, *bias;               // partial sums (n, N, D), (n, D), (n, D); D, bias may be null
  float *B, *C;                      // partial sums (tiles, T, N)
  float* initial;                    // (S, D, N), may be null
};

namespace {

constexpr int kWarp = 32, kWarps = 4, kThreads = kWarp * kWarps;
constexpr int kStates = 16;  // of a lane
constexpr int kKeep = 16;    // tokens between kept states; CUDA_KEPT_EVERY in selective_scan/cuda_backend.py
constexpr int kBlock = 8;    // tokens whose states the backward holds in shared memory; divides kKeep
constexpr int kAhead = 4;    // tokens that are asked for before they are needed; divides kKeep
constexpr unsigned kAll = 0xffffffffu;
constexpr float kLn2 = 0.6931471805599453f;

// A lane's place. kOne: one lane a channel, with all of its 16 states.
template <bool kOne>
struct Lane {
  int slabs, width, warp, index, slab;  // width: channels of a warp
  int64_t channel;
  int states;  // how many of its 16 exist
  bool here;   // the channel exists
  bool writes;

  template <typename T>
  __device__ __forceinline__ explicit Lane(const ScanArgs<T>& in) {
    slabs = kOne ? 1 : static_cast<int>(in.slabs);
    width = kWarp / slabs;
    warp = threadIdx.x / kWarp;
    index = threadIdx.x % kWarp;
    slab = kOne ? 0 : index / width;
    channel = (static_cast<int64_t>(blockIdx.y) * kWarps + warp) * width + (kOne ? index : index % width);
    here = channel < in.channels;
    const int64_t left = in.states - slab * kStates;
    states = !here || left < 0 ? 0 : kOne || left > kStates ? kStates : static_cast<int>(left);
    writes = here && slab == 0;
  }

  __device__ __forceinline__ int padded() const { return slabs * kStates; }

  // Sum over the lanes of a channel.
  __device__ __forceinline__ float over_slabs(float value) const {
    if constexpr (!kOne) {
      for (int mask = width; mask < kWarp; mask *= 2) value += __shfl_xor_sync(kAll, value, mask);
    }
    return value;
  }

  // A lane's states of a (.., D, N) tensor.
  __device__ __forceinline__ void load_by_channel(float (&h)[kStates], const float* from, int64_t row, int64_t channels,
                                                  int64_t all) const {
    from += (row * channels + channel) * all + slab * kStates;
#pragma unroll
    for (int i = 0; i < kStates; ++i) h[i] = i < states ? from[i] : 0.f;
  }

  __device__ __forceinline__ void store_by_channel(float* to, const float (&h)[kStates], int64_t row, int64_t channels,
                                                   int64_t all) const {
    to += (row * channels + channel) * all + slab * kStates;
#pragma unroll
    for (int i = 0; i < kStates; ++i)
      if (i < states) to[i] = h[i];
  }

  // A lane's states of a (.., N, D) tensor: neighbours stand side by side.
  __device__ __forceinline__ void load_by_state(float (&h)[kStates], const float* from, int64_t row, int64_t channels,
                                                int64_t all) const {
    from += (row * all + slab * kStates) * channels + channel;
#pragma unroll
    for (int i = 0; i < kStates; ++i) h[i] = i < states ? from[i * channels] : 0.f;
  }

  __device__ __forceinline__ void store_by_state(float* to, const float (&h)[kStates], int64_t row, int64_t channels,
                                                 int64_t all) const {
    to += (row * all + slab * kStates) * channels + channel;
#pragma unroll
    for (int i = 0; i < kStates; ++i)
      if (i < states) to[i * channels] = h[i];
  }

  __device__ __forceinline__ float of_channel(const float* values) const {
    return values && here ? values[channel] : 0.f;
  }
};

// Rows of kCount tokens as one lane needs them; zeros outside [first, end).
template <typename T, int kCount>
struct Ahead {
  T value[kCount];

  __device__ __forceinline__ void load(const Rows<T>& rows, int token, int first, int end, int64_t channel, bool here) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const bool inside = here && token + j >= first && token + j < end;
      value[j] = inside ? rows.at(token + j)[channel] : from_float<T>(0.f);
    }
  }

  __device__ __forceinline__ float at(int j) const { return to_float(value[j]); }
};

// B and C of kKeep tokens in shared memory, (kKeep, 2, padded) float32, zeros beyond the segment and the last state.
template <typename T, bool kOne>
struct Maps {
  static constexpr int kEach = kOne ? kKeep * 2 * kStates / kThreads : 1;
  float* shared;
  int padded;
  T ahead[kEach];

  __device__ __forceinline__ T read(const ScanArgs<T>& in, int chunk, int end, int place) const {
    const int token = chunk + place / (2 * padded), n = place % padded;
    const Rows<T>& rows = place / padded % 2 ? in.C : in.B;
    return token < end && n < in.states ? rows.at(token)[n] : from_float<T>(0.f);
  }

  // Ask for a chunk's values, which `put` will write. (With many states `put` reads them itself.)
  __device__ __forceinline__ void ask(const ScanArgs<T>& in, int chunk, int end) {
    if constexpr (kOne) {
#pragma unroll
      for (int r = 0; r < kEach; ++r) ahead[r] = read(in, chunk, end, r * kThreads + threadIdx.x);
    }
  }

  __device__ __forceinline__ void put(const ScanArgs<T>& in, int chunk, int end) {
    __syncthreads();
    if constexpr (kOne) {
#pragma unroll
      for (int r = 0; r < kEach; ++r) shared[r * kThreads + threadIdx.x] = to_float(ahead[r]);
    } else {
      for (int place = threadIdx.x; place < kKeep * 2 * padded; place += kThreads)
        shared[place] = to_float(read(in, chunk, end, place));
    }
    __syncthreads();
  }

  __device__ __forceinline__ const float* B(int t, int slab) const { return shared + 2 * t * padded + slab * kStates; }
  __device__ __forceinline__ const float* C(int t, int slab) const { return B(t, slab) + padded; }
};

inline size_t maps_shared(int64_t slabs) { return sizeof(float) * kKeep * 2 * slabs * kStates; }

// 16 floats of shared memory, read four at a time.
__device__ __forceinline__ void load_states(float (&to)[kStates], const float* from) {
#pragma unroll
  for (int i = 0; i < kStates; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(from + i);
    to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
  }
}

// A log2(e), so that decays are powers of two.
template <bool kOne, typename T>
__device__ __forceinline__ void load_exponents(float (&a2)[kStates], const Lane<kOne>& lane, const ScanArgs<T>& in) {
  lane.load_by_channel(a2, in.A, 0, in.channels, in.states);
#pragma unroll
  for (int i = 0; i < kStates; ++i) a2[i] *= static_cast<float>(kLog2E);
}

// The step delta' of a token.
__device__ __forceinline__ float time_step(float raw, bool with_softplus) {
  return with_softplus ? softplus(raw) : raw;
}

}  // namespace

}  // namespace sambay
