#include "linear_float.cuh"

namespace qk {
template cudaError_t launch_linear_codes<Codes<8>>(const LinearArgs&, const LinearFloatPlan&,
                                                   cudaStream_t);
}  // namespace qk
