// Threads and scratch memory.
//
// This library links no OpenMP runtime: a second one would spin on the same cores as torch's.
// Python passes the addresses of GOMP_parallel, omp_get_thread_num and omp_get_num_threads in the
// runtime that torch has loaded. GNU's, LLVM's and Intel's runtimes export all three. dlsym here
// would require glibc 2.34. An exception in a thread ends the process. Allocation failures would
// raise one.
#include <sched.h>

#include <cstdlib>
#include <new>

#include "kernels.h"

namespace lora_kernels {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using OmpGetInt = int (*)();
GompParallel gomp_parallel = nullptr;
OmpGetInt omp_thread_num = nullptr, omp_num_threads = nullptr;

struct Region {
  ThreadFn fn;
  void* context;
};

void run_region(void* region) {
  const Region& r = *static_cast<Region*>(region);
  r.fn(r.context, omp_thread_num(), omp_num_threads());
}

}  // namespace

void use_openmp(uintptr_t parallel, uintptr_t thread_num, uintptr_t num_threads) {
  gomp_parallel = reinterpret_cast<GompParallel>(parallel);
  omp_thread_num = reinterpret_cast<OmpGetInt>(thread_num);
  omp_num_threads = reinterpret_cast<OmpGetInt>(num_threads);
}

void run_threads(int threads, ThreadFn fn, void* context) {
  if (threads <= 1 || !gomp_parallel) {
    fn(context, 0, 1);
    return;
  }
  Region region{fn, context};
  gomp_parallel(run_region, &region, static_cast<unsigned>(threads), 0);
}

void arrive(int* arrived) { __atomic_fetch_add(arrived, 1, __ATOMIC_RELEASE); }

int64_t fetch_add(int64_t* next, int64_t count) {
  return __atomic_fetch_add(next, count, __ATOMIC_RELAXED);
}

void await(const int* arrived, int count) {
  for (int spins = 0; __atomic_load_n(arrived, __ATOMIC_ACQUIRE) < count; ++spins)
    if (spins >= 4096) sched_yield();  // the other thread may need this core
}

void* scratch_alloc(int64_t bytes) {
  void* p = std::aligned_alloc(64, (static_cast<size_t>(bytes) + 63) / 64 * 64 + 64);
  if (!p) throw std::bad_alloc();
  return p;
}

void scratch_free(void* p) { std::free(p); }

}  // namespace lora_kernels
