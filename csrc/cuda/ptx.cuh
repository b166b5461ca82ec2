// All that kernels ask of the machine, each instruction in one small function. Its host twin, which
// also checks that it is used as it may be, is in emulator/ptx.h.
//
// Shared memory is named by byte offsets, as `ld.shared` names it; it is touched through lds, sts,
// cp_async and ldmatrix alone, global memory through ldg, stg and the flags.
#pragma once
#include <cstdint>

#include "launch.h"

#if defined(LORA_KERNELS_EMULATED)
#include "../emulator/ptx.h"
#else
#include <cuda_runtime.h>

#include "on_device.h"

#define LK_KERNEL static __global__ void
#define LK_DEVICE __device__ __forceinline__
#define LK_UNROLL _Pragma("unroll")
#define LK_ONCE _Pragma("unroll 1")
#define LK_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)

namespace lora_kernels {
namespace gpu {

// Places -----------------------------------------------------------------------------------------

LK_DEVICE int thread_id() { return threadIdx.x; }
LK_DEVICE int block_x() { return blockIdx.x; }
LK_DEVICE int block_y() { return blockIdx.y; }
LK_DEVICE int block_z() { return blockIdx.z; }
LK_DEVICE int grid_x() { return gridDim.x; }

// Arithmetic -------------------------------------------------------------------------------------

// Never contracted to one multiply-add, whatever the compiler's flags.
LK_DEVICE float mul_rn(float a, float b) { return __fmul_rn(a, b); }
LK_DEVICE float add_rn(float a, float b) { return __fadd_rn(a, b); }
LK_DEVICE float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
LK_DEVICE float bits_to_f32(uint32_t bits) { return __uint_as_float(bits); }
LK_DEVICE uint32_t f32_to_bits(float f) { return __float_as_uint(f); }
LK_DEVICE float bf16_to_f32(uint16_t h) { return __uint_as_float((uint32_t)h << 16); }
LK_DEVICE uint16_t f32_to_bf16(float f) {
  uint16_t h;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
LK_DEVICE float f16_to_f32(uint16_t h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}
LK_DEVICE uint16_t f32_to_f16(float f) {
  uint16_t h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
LK_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
LK_DEVICE uint32_t pack_f16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// Global memory ----------------------------------------------------------------------------------

struct alignas(16) Words4 {
  uint32_t w[4];
};

// Loads memory that no concurrent kernel writes.
template <typename T>
LK_DEVICE T ldg(const T* p) {
  static_assert(sizeof(T) <= 16, "one load");
  T value;
  if constexpr (sizeof(T) == 16) {
    uint32_t* w = reinterpret_cast<uint32_t*>(&value);
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "l"(p));
  } else {
    value = __ldg(p);
  }
  return value;
}
// Loads memory that is read once, bypassing L1.
template <typename T>
LK_DEVICE T ldg_stream(const T* p) {
  static_assert(sizeof(T) == 16, "16 bytes");
  T value;
  uint32_t* w = reinterpret_cast<uint32_t*>(&value);
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
               : "l"(p));
  return value;
}
// Loads memory that other blocks wrote: not from L1, which their stores do not reach.
template <typename T>
LK_DEVICE T ldg_coherent(const T* p) {
  return __ldcg(p);
}
template <typename T>
LK_DEVICE void stg(T* p, T value) {
  static_assert(sizeof(T) <= 4, "one element");
  *p = value;
}

// Shared memory ----------------------------------------------------------------------------------

extern __shared__ __align__(128) unsigned char shared_bytes_of_block[];
LK_DEVICE uint32_t shared_base() {
  return (uint32_t)__cvta_generic_to_shared(shared_bytes_of_block);
}
template <typename T>
LK_DEVICE T lds(uint32_t at) {
  T value;
  if constexpr (sizeof(T) == 16) {
    uint32_t* w = reinterpret_cast<uint32_t*>(&value);
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "r"(at));
  } else if constexpr (sizeof(T) == 8) {
    uint32_t* w = reinterpret_cast<uint32_t*>(&value);
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "r"(at));
  } else {
    static_assert(sizeof(T) == 4, "4, 8 or 16 bytes");
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(reinterpret_cast<uint32_t&>(value)) : "r"(at));
  }
  return value;
}
template <typename T>
LK_DEVICE void sts(uint32_t at, T value) {
  if constexpr (sizeof(T) == 16) {
    const uint32_t* w = reinterpret_cast<const uint32_t*>(&value);
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(w[0]), "r"(w[1]),
                 "r"(w[2]), "r"(w[3])
                 : "memory");
  } else if constexpr (sizeof(T) == 8) {
    const uint32_t* w = reinterpret_cast<const uint32_t*>(&value);
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(at), "r"(w[0]), "r"(w[1]) : "memory");
  } else {
    static_assert(sizeof(T) == 4, "4, 8 or 16 bytes");
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(reinterpret_cast<uint32_t&>(value))
                 : "memory");
  }
}
// Copies 16 or 8 bytes asynchronously; those past `bytes` become zeros.
LK_DEVICE void cp_async16(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(bytes)
               : "memory");
}
LK_DEVICE void cp_async8(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], 8, %2;" ::"r"(to), "l"(from),
               "r"(bytes)
               : "memory");
}
LK_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
LK_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Threads together -------------------------------------------------------------------------------

LK_DEVICE void sync_block() { __syncthreads(); }
LK_DEVICE float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}
LK_DEVICE float shuffle(float value, int from) { return __shfl_sync(0xFFFFFFFFu, value, from); }

// Matrices ---------------------------------------------------------------------------------------

LK_DEVICE void ldmatrix_x4(uint32_t at, uint32_t r[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at));
}
LK_DEVICE void ldmatrix_x4_trans(uint32_t at, uint32_t r[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at));
}
#define LK_MMA(name, type)                                                              \
  LK_DEVICE void name(float d[4], const uint32_t a[4], const uint32_t b[2]) {           \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));   \
  }
LK_MMA(mma_bf16, "bf16")
LK_MMA(mma_f16, "f16")
#undef LK_MMA

// Blocks together --------------------------------------------------------------------------------

LK_DEVICE int flag_load_acquire(const int* flag) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}
LK_DEVICE int flag_add_release(int* flag, int add) {
  int old;
  asm volatile("atom.add.release.gpu.global.s32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(flag), "r"(add)
               : "memory");
  return old;
}
LK_DEVICE int flag_add_acq_rel(int* flag, int add) {
  int old;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(flag), "r"(add)
               : "memory");
  return old;
}
LK_DEVICE void flag_store(int* flag, int value) {
  asm volatile("st.relaxed.gpu.global.s32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

// Launches ---------------------------------------------------------------------------------------

template <typename Args>
void launch(const Launch& l, void (*kernel)(Args), const Args& args) {
  OnDevice on(l.stream.device, l.name);
  allow_shared((const void*)kernel, l.stream.device, l.shared_bytes, l.name);
  cudaLaunchAttribute cooperative = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(l.x, l.y, l.z);
  config.blockDim = dim3(l.threads);
  config.dynamicSmemBytes = l.shared_bytes;
  config.stream = reinterpret_cast<cudaStream_t>(l.stream.handle);
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  config.attrs = &cooperative;
  config.numAttrs = l.cooperative;
  check(cudaLaunchKernelEx(&config, kernel, args), l.name);
}

template <typename Args>
int resident_blocks(void (*kernel)(Args), int device, int threads, int shared_bytes) {
  return resident_blocks((const void*)kernel, device, threads, (unsigned)shared_bytes);
}
// An error where the device cannot run the kernel: no driver, an old one, or no image for it.
template <typename Args>
void require_image(void (*kernel)(Args), int device, const char* what) {
  OnDevice on(device, what);
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), what);
}

}  // namespace gpu
}  // namespace lora_kernels
#endif
