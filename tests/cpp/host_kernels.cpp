// The kernels of one configuration, compiled once for all that run them through the host API.

#include "host_kernels.hpp"

namespace retention::test {

RETENTION_RUN_PLANS(, ForwardKernels, BackwardKernels, DecodeKernels)

#define RUN_KERNELS(Plan) \
  template device::Status run_kernels(device::Plan const&, void*, std::uint64_t);
RUN_KERNELS(ForwardPlan)
RUN_KERNELS(BackwardPlan)
RUN_KERNELS(DecodeStepPlan)
RUN_KERNELS(DecodePrefillPlan)
RUN_KERNELS(DecodeFoldPlan)
RUN_KERNELS(DecodeCopyArguments)
RUN_KERNELS(DecodeResetArguments)
RUN_KERNELS(DecodeRollbackArguments)

template device::Status record_kernels(device::BackwardPlan const&, std::string&);

}  // namespace retention::test
