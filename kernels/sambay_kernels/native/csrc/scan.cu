// The selective scan on a GPU, forward and backward, over packed documents cut into segments (segments.py).
//
// A block of four warps takes one segment and walks through its tokens. A lane is one channel and holds its 16 states
// in registers; with more than 16 states, several lanes share a channel ("slabs" of 16 states each, zeros at the end).
// B and C are the same for all channels: they are brought to shared memory as float32, kKeep tokens at a time.
//
// A document that is one segment takes one pass. Longer ones take three: scan_forward_kernel with kLocal runs each
// segment but the last from zero, scan_carry_kernel adds up the states at the cuts, scan_forward_kernel runs from
// those. The backward mirrors this from the end. It gets the states before every kKeep-th token from the forward pass
// and computes the others again, kBlock tokens at a time, into shared memory.
//
// Sums over channels (the gradients of B and C) and over segments (those of A, D, bias) leave as partial sums and are
// added in a fixed order by sum_parts_kernel: no atomics, the same input gives the same bits.

#include <type_traits>

#include "scan_backward.cuh"
#include "scan_carry.cuh"
#include "scan_forward.cuh"

namespace sambay {
namespace {

template <bool kBackward, typename T>
cudaError_t carry(const ScanArgs<T>& in, const float* edge, const float* local, const float* elapsed, float* carried,
                  void* stream) {
  const Carry args{in.channels, in.states, in.first, in.A, edge, local, elapsed, carried};
  const int64_t blocks = divide_up(in.channels * in.states, kThreads);
  return launch(scan_carry_kernel<kBackward>, in.documents, blocks, kThreads, 0, args, stream);
}

template <bool kOne>
using One = std::integral_constant<bool, kOne>;

template <typename T, bool kOne>
cudaError_t scan_forward(const ScanForward<T>& args, One<kOne>, void* stream) {
  const ScanArgs<T>& in = args.in;
  const size_t shared = maps_shared(in.slabs);
  cudaError_t error = cudaSuccess;
  if (args.carried) {
    error = launch(scan_forward_kernel<T, kOne, true>, in.segments, in.tiles, kThreads, shared, args, stream);
    if (error == cudaSuccess) error = carry<false>(in, in.initial, args.local, args.elapsed, args.carried, stream);
  }
  if (error != cudaSuccess) return error;
  return launch(scan_forward_kernel<T, kOne, false>, in.segments, in.tiles, kThreads, shared, args, stream);
}

template <typename T, bool kOne>
cudaError_t scan_backward(const ScanBackward<T>& args, One<kOne>, void* stream) {
  const ScanArgs<T>& in = args.in;
  cudaError_t error = cudaSuccess;
  if (args.carried) {
    error = launch(scan_local_backward_kernel<T, kOne>, in.segments, in.tiles, kThreads, maps_shared(in.slabs), args,
                   stream);
    if (error == cudaSuccess) error = carry<true>(in, args.grad_final, args.local, args.elapsed, args.carried, stream);
  }
  if (error != cudaSuccess) return error;
  const size_t shared = backward_shared(in.slabs, MapSums<kOne>::kTokens);
  return launch(scan_backward_kernel<T, kOne>, in.segments, in.tiles, kThreads, shared, args, stream);
}

// Half-precision kernels exist for 16 states, as the published models have; others are given float32.
template <template <typename> class Args, typename Run>
int with_type(const void* args, size_t size, int type, int device, const Run& run) {
  static_assert(sizeof(Args<float>) == sizeof(Args<__half>));
  if (size != sizeof(Args<float>)) return cudaErrorInvalidValue;
  if (const cudaError_t error = cudaSetDevice(device)) return error;
  const auto& single = *static_cast<const Args<float>*>(args);
  if (type == kFloat32) return single.in.states == kStates ? run(single, One<true>()) : run(single, One<false>());
  if (single.in.states != kStates) return cudaErrorInvalidValue;
  if (type == kBfloat16) return run(*static_cast<const Args<__nv_bfloat16>*>(args), One<true>());
  if (type == kFloat16) return run(*static_cast<const Args<__half>*>(args), One<true>());
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace sambay

// The C interface: a structure, its size as the caller knows it, the type of the tensors by token, device, stream.

extern "C" int sambay_cuda_scan_forward(const void* args, size_t size, int type, int device, void* stream) {
  return sambay::with_type<sambay::ScanForward>(args, size, type, device, [=](const auto& given, auto one) {
    return sambay::scan_forward(given, one, stream);
  });
}

extern "C" int sambay_cuda_scan_backward(const void* args, size_t size, int type, int device, void* stream) {
  return sambay::with_type<sambay::ScanBackward>(args, size, type, device, [=](const auto& given, auto one) {
    return sambay::scan_backward(given, one, stream);
  });
}

extern "C" int sambay_cuda_sum_parts(const void* args, size_t size, int type, int device, void* stream) {
  using namespace sambay;
  if (size != sizeof(SumParts) || type != kFloat32) return cudaErrorInvalidValue;
  if (const cudaError_t error = cudaSetDevice(device)) return error;
  const auto& given = *static_cast<const SumParts*>(args);
  return launch(sum_parts_kernel, divide_up(given.size, kThreads), 1, kThreads, 0, given, stream);
}

// Whether this library's kernels can run on a device: the driver is new enough, the architecture is the device's.
extern "C" int sambay_cuda_check(int device) {
  if (const cudaError_t error = cudaSetDevice(device)) return error;
  cudaFuncAttributes found;
  return cudaFuncGetAttributes(&found, sambay::sum_parts_kernel);
}

extern "C" const char* sambay_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
