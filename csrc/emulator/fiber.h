// A stack of its own for each thread of a block, and the way from one to another.
#pragma once
#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#if defined(__x86_64__)
// Saves what a function must preserve, and where it was, in *from; goes on at `to`.
extern "C" void lora_kernels_switch_stack(void** from, void* to);
asm(R"(
.text
.local lora_kernels_switch_stack
.type lora_kernels_switch_stack, @function
lora_kernels_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#endif

namespace lora_kernels {
namespace emulator {

class Fiber {
 public:
  static constexpr size_t STACK = 256 << 10;

  Fiber() {
    stack_ = static_cast<char*>(
        mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (stack_ == MAP_FAILED) std::abort();
  }
  ~Fiber() { munmap(stack_, STACK); }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // entry() must not return.
  void start(void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack_, STACK);
#endif
#if defined(__x86_64__)
    // As a function finds it: the return address of its call lies at a multiple of 16, less 8.
    void** top = reinterpret_cast<void**>(stack_ + STACK) - 1;
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    at_ = top;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = STACK;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
    fake_ = nullptr;
  }

  // From the scheduler into the fiber, and back out of it.
  void enter() {
    current() = this;
    begin_switch(&outer_fake_, stack_, STACK);
#if defined(__x86_64__)
    lora_kernels_switch_stack(&outer_, at_);
#else
    swapcontext(&outer_context_, &context_);
#endif
    end_switch(outer_fake_, nullptr, nullptr);
  }
  static void entered() {  // first thing in `entry`
    Fiber* f = current();
    end_switch(nullptr, &f->outer_stack_, &f->outer_size_);
  }
  void leave() {
    begin_switch(&fake_, outer_stack_, outer_size_);
#if defined(__x86_64__)
    lora_kernels_switch_stack(&at_, outer_);
#else
    swapcontext(&context_, &outer_context_);
#endif
    end_switch(fake_, &outer_stack_, &outer_size_);
  }

 private:
  static Fiber*& current() {
    static Fiber* fiber = nullptr;
    return fiber;
  }
  static void begin_switch(void** save, const void* stack, size_t size) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(save, stack, size);
#else
    (void)save, (void)stack, (void)size;
#endif
  }
  static void end_switch(void* saved, const void** stack, size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(saved, stack, size);
#else
    (void)saved, (void)stack, (void)size;
#endif
  }

  char* stack_;
  void *fake_ = nullptr, *outer_fake_ = nullptr;
  const void* outer_stack_ = nullptr;
  size_t outer_size_ = 0;
#if defined(__x86_64__)
  void *at_ = nullptr, *outer_ = nullptr;
#else
  ucontext_t context_, outer_context_;
#endif
};

}  // namespace emulator
}  // namespace lora_kernels
