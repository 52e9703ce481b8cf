// linear of int8 activations and tables of 16 values.
#include "linear_int8_launch.cuh"

namespace qk {

cudaError_t launch_int8_table(const Int8Launch& l, const LinearArgs& args, cudaStream_t stream) {
  return launch_int8_codes<Int8Codes<4, true, false>>(l, args, stream);
}

}  // namespace qk
