// Launches of float16 and bfloat16 activations, by the kind of codes.
#include "linear_float.cuh"

namespace qk {

extern template cudaError_t launch_linear_codes<Codes<2>>(const LinearArgs&, const LinearFloatPlan&,
                                                          cudaStream_t);
extern template cudaError_t launch_linear_codes<Codes<3>>(const LinearArgs&, const LinearFloatPlan&,
                                                          cudaStream_t);
extern template cudaError_t launch_linear_codes<Codes<4>>(const LinearArgs&, const LinearFloatPlan&,
                                                          cudaStream_t);
extern template cudaError_t launch_linear_codes<Codes<4, true>>(const LinearArgs&,
                                                                const LinearFloatPlan&,
                                                                cudaStream_t);
extern template cudaError_t launch_linear_codes<Codes<5>>(const LinearArgs&, const LinearFloatPlan&,
                                                          cudaStream_t);
extern template cudaError_t launch_linear_codes<Codes<6>>(const LinearArgs&, const LinearFloatPlan&,
                                                          cudaStream_t);
extern template cudaError_t launch_linear_codes<Codes<8>>(const LinearArgs&, const LinearFloatPlan&,
                                                          cudaStream_t);

int64_t linear_float_scratch(const LinearArgs& args, const DeviceLimits& limits) {
  return plan_linear_float(args, limits).partial_floats * int64_t(sizeof(float));
}

cudaError_t launch_linear_float(const LinearArgs& args, void* scratch, uint32_t* counters,
                                cudaStream_t stream) {
  DeviceLimits limits{};
  if (cudaError_t error = device_limits(&limits); error != cudaSuccess) return error;
  LinearFloatPlan plan = plan_linear_float(args, limits);
  TileSplit& split = plan.decode ? plan.gemv.split : plan.tile.split;
  split.partial = static_cast<float*>(scratch), split.counters = counters;
  switch (args.w.bits) {
    case 2: return launch_linear_codes<Codes<2>>(args, plan, stream);
    case 3: return launch_linear_codes<Codes<3>>(args, plan, stream);
    case 4:
      return args.w.table ? launch_linear_codes<Codes<4, true>>(args, plan, stream)
                          : launch_linear_codes<Codes<4>>(args, plan, stream);
    case 5: return launch_linear_codes<Codes<5>>(args, plan, stream);
    case 6: return launch_linear_codes<Codes<6>>(args, plan, stream);
    case 8: return launch_linear_codes<Codes<8>>(args, plan, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace qk
