// Threads and scratch memory.
//
// A second OpenMP runtime beside torch's would spin on the same cores, so this library links none.
// Python gives it the addresses of GOMP_parallel, which GNU's, LLVM's and Intel's runtimes all
// export, in the runtime that torch has loaded, and it runs on that pool. Finding them here would
// need dlsym, which in a library of today is that of glibc 2.34.
#include <sched.h>

#include <cstdlib>
#include <new>

#include "kernels.h"

namespace lora_kernels {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using OmpInt = int (*)();
GompParallel gomp_parallel = nullptr;
OmpInt omp_thread_num = nullptr, omp_num_threads = nullptr;

struct Region {
  ThreadFn fn;
  void* context;
};

void enter(void* region) {
  const Region& r = *static_cast<Region*>(region);
  r.fn(r.context, omp_thread_num(), omp_num_threads());
}

}  // namespace

void use_openmp(uintptr_t parallel, uintptr_t thread_num, uintptr_t num_threads) {
  gomp_parallel = reinterpret_cast<GompParallel>(parallel);
  omp_thread_num = reinterpret_cast<OmpInt>(thread_num);
  omp_num_threads = reinterpret_cast<OmpInt>(num_threads);
}

void run_threads(int threads, ThreadFn fn, void* context) {
  if (threads <= 1 || !gomp_parallel) {
    fn(context, 0, 1);
    return;
  }
  Region region{fn, context};
  gomp_parallel(enter, &region, static_cast<unsigned>(threads), 0);
}

void arrive(int* arrived) { __atomic_fetch_add(arrived, 1, __ATOMIC_RELEASE); }

int64_t take(int64_t* next, int64_t count) {
  return __atomic_fetch_add(next, count, __ATOMIC_RELAXED);
}

void await(const int* arrived, int count) {
  for (int spins = 0; __atomic_load_n(arrived, __ATOMIC_ACQUIRE) < count; ++spins)
    if (spins >= 4096) sched_yield();  // the other may want this core
}

void* scratch_alloc(int64_t bytes) {
  void* p = std::aligned_alloc(64, (static_cast<size_t>(bytes) + 63) / 64 * 64 + 64);
  if (!p) throw std::bad_alloc();
  return p;
}

void scratch_free(void* p) { std::free(p); }

}  // namespace lora_kernels
