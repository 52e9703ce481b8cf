// linear of int8 activations and 5-bit codes.
#include "linear_int8_launch.cuh"

namespace qk {

template cudaError_t launch_int8_bits<5>(const Int8Launch&, const LinearArgs&, cudaStream_t);

}  // namespace qk
