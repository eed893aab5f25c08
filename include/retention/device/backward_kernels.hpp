// The backward pass of one configuration as a sequence of kernels.
//
//     states            those of forward, again, unless they were kept
//     rows              what every query row needs: rescaled queries, normalisers, delta
//     exponents         fp16 only: the powers of two that keep gradients in range
//     query gradient    from the states, which nobody reads after that,
//     state gradients   which take their place: after every chunk, by segments side by side
//     carry             what a segment hands on to those before it
//     value, key gradient
//     gate gradient     from the keys and their gradients, and from the final state

#pragma once

#include "retention/device/backward_plan.hpp"
#include "retention/device/forward_kernels.hpp"
#include "retention/kernel/gate_gradient.hpp"
#include "retention/kernel/gradient_exponents.hpp"
#include "retention/kernel/gradient_rows.hpp"
#include "retention/kernel/key_gradient.hpp"
#include "retention/kernel/query_gradient.hpp"
#include "retention/kernel/state_gradients.hpp"
#include "retention/kernel/value_gradient.hpp"

namespace retention::device {

template <class Element, int HeadDim, int ValueDim>
struct BackwardKernels {
  using Forward = ForwardKernels<Element, HeadDim, ValueDim>;
  using Rows = kernel::GradientRows<kernel::GradientRowsTraits<Element, HeadDim, ValueDim>>;
  using QueryGradient =
      kernel::QueryGradient<kernel::QueryGradientTraits<Element, HeadDim, ValueDim>>;
  using StateGradients =
      kernel::StateGradients<kernel::StateGradientsTraits<Element, HeadDim, ValueDim>>;
  using ValueGradient =
      kernel::ValueGradient<kernel::ValueGradientTraits<Element, HeadDim, ValueDim>>;
  using KeyGradient = kernel::KeyGradient<kernel::KeyGradientTraits<Element, HeadDim, ValueDim>>;

  /// `launcher` as for ForwardKernels.
  template <class Launcher>
  static Status run(BackwardPlan plan, void* workspace, Launcher const& launcher) {
    // From here on the workspace is known.
    ForwardArguments& forward = plan.forward.arguments;
    forward.final_state = plan.final_state.template in<float>(workspace);
    forward.final_key_sum = plan.final_key_sum.template in<float>(workspace);
    if (plan.recomputes) {
      if (Status status = Forward::run_states(plan.forward, workspace, launcher); !status) {
        return status;
      }
    }
    return {};
  }
};

}  // namespace retention::device
