// The launches of one kind of codes. linear_int8_w*.cu instantiate them, a few kernels each.
#pragma once
#include "linear_int8_decode.cuh"
#include "linear_int8_tile.cuh"

namespace qk {

template <class C>
cudaError_t launch_int8_codes(const Int8Launch& l, const LinearArgs& args, cudaStream_t stream) {
  const dim3 threads(unsigned(l.threads));
  switch (l.kernel) {
    case Int8Kernel::decode_8:
      return launch_dependent(linear_int8_decode_kernel<C, 1>, l.grid, threads, l.shared_bytes,
                              stream, args, l.plan);
    case Int8Kernel::decode_16:
      return launch_dependent(linear_int8_decode_kernel<C, 2>, l.grid, threads, l.shared_bytes,
                              stream, args, l.plan);
    case Int8Kernel::tile:
      return launch(linear_int8_tile_kernel<C, C::token_tiles, false>, l.grid, threads,
                    l.shared_bytes, stream, args, l.plan);
    case Int8Kernel::tile_rows:
      if constexpr (C::rows)
        return launch(linear_int8_tile_kernel<C, 4, true>, l.grid, threads, l.shared_bytes, stream,
                      args, l.plan);
  }
  return cudaErrorInvalidValue;
}

template <int kBits>
cudaError_t launch_int8_bits(const Int8Launch& l, const LinearArgs& args, cudaStream_t stream) {
  return args.w.zero_kind == Zero::symmetric
             ? launch_int8_codes<Int8Codes<kBits, false, false>>(l, args, stream)
             : launch_int8_codes<Int8Codes<kBits, false, true>>(l, args, stream);
}

}  // namespace qk
