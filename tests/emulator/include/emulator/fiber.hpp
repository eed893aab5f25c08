// A fiber: a stack and the point at which it stopped.

#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__) || defined(EMULATOR_USE_UCONTEXT)
#include <ucontext.h>
#endif

namespace emulator::detail {

#if defined(__x86_64__) && !defined(EMULATOR_USE_UCONTEXT)

extern "C" void emulator_switch(void** from, void* to);

class Context {
 public:
  /// Prepares a fresh stack on which the first switch calls `entry`, which must not return.
  void prepare(char* stack, std::size_t bytes, void (*entry)()) {
    auto top = reinterpret_cast<std::uintptr_t>(stack + bytes) & ~std::uintptr_t{15};
    auto* frame = reinterpret_cast<void**>(top) - 8;
    for (int i = 0; i < 8; ++i) {
      frame[i] = nullptr;  // six callee-saved registers, the entry, and its (absent) caller
    }
    frame[6] = reinterpret_cast<void*>(entry);
    stack_pointer_ = frame;
  }
  static void switch_to(Context& from, Context& to) {
    emulator_switch(&from.stack_pointer_, to.stack_pointer_);
  }

 private:
  void* stack_pointer_ = nullptr;
};

#else

class Context {
 public:
  void prepare(char* stack, std::size_t bytes, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  static void switch_to(Context& from, Context& to) { swapcontext(&from.context_, &to.context_); }

 private:
  ucontext_t context_;
};

#endif

}  // namespace emulator::detail
