// The host twins of cuda/ptx.cuh, which includes this where LORA_KERNELS_EMULATED is set.
#pragma once
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "runtime.h"
#include "tensor_core.h"

#define LK_KERNEL static void
#define LK_DEVICE inline
#define LK_UNROLL
#define LK_ONCE
#define LK_BOUNDS(threads, blocks)
#define LK_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace lora_kernels {
namespace gpu {

// Places -----------------------------------------------------------------------------------------

inline int thread_id() { return (int)emulator::thread_index().x; }
inline int block_x() { return (int)emulator::block_index().x; }
inline int block_y() { return (int)emulator::block_index().y; }
inline int block_z() { return (int)emulator::block_index().z; }
inline int grid_x() { return (int)emulator::grid_size().x; }

// Arithmetic -------------------------------------------------------------------------------------

inline float mul_rn(float a, float b) { return a * b; }
inline float add_rn(float a, float b) { return a + b; }
inline float fma_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float bits_to_f32(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t f32_to_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}
inline float bf16_to_f32(uint16_t h) { return bits_to_f32((uint32_t)h << 16); }
inline uint16_t f32_to_bf16(float f) {
  const uint32_t bits = f32_to_bits(f);
  if (f != f) return 0x7FFF;
  return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline float f16_to_f32(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = h & 0x7FFF;
  if (magnitude >= 0x7C00) return bits_to_f32(sign | 0x7F800000 | (magnitude & 0x3FF) << 13);
  if (magnitude >= 0x400) return bits_to_f32(sign | ((magnitude << 13) + (112u << 23)));
  const float small = (float)magnitude * 0x1p-24f;
  return sign ? -small : small;
}
inline uint16_t f32_to_f16(float f) {
  const uint16_t sign = (uint16_t)(f32_to_bits(f) >> 16 & 0x8000);
  if (f != f) return 0x7FFF;
  const float a = std::fabs(f);
  if (a >= 65520.0f) return sign | 0x7C00;
  if (a < 0x1p-14f) return sign | (uint16_t)std::nearbyint(a * 0x1p24f);
  const uint32_t bits = f32_to_bits(a) - (112u << 23);
  return sign | (uint16_t)((bits + 0xFFF + (bits >> 13 & 1)) >> 13);
}
inline uint32_t pack_bf16(float low, float high) {
  return f32_to_bf16(low) | (uint32_t)f32_to_bf16(high) << 16;
}
inline uint32_t pack_f16(float low, float high) {
  return f32_to_f16(low) | (uint32_t)f32_to_f16(high) << 16;
}

// Global memory ----------------------------------------------------------------------------------

struct alignas(16) Words4 {
  uint32_t w[4];
};

template <emulator::Path path, typename T>
inline T load_global(const T* p) {
  T value;
  emulator::global_read(p, &value, sizeof(T), path);
  return value;
}
template <typename T>
inline T ldg(const T* p) {
  return load_global<emulator::Path::READ_ONLY>(p);
}
template <typename T>
inline T ldg_coherent(const T* p) {
  return load_global<emulator::Path::COHERENT>(p);
}
template <typename T>
inline T ldg_stream(const T* p) {
  return load_global<emulator::Path::READ_ONLY>(p);
}
template <typename T>
inline void stg(T* p, T value) {
  emulator::global_write(p, &value, sizeof(T));
}

// Shared memory ----------------------------------------------------------------------------------

inline uint32_t shared_base() { return 0; }
template <typename T>
inline T lds(uint32_t at, LK_SITE) {
  T value;
  std::memcpy(&value, emulator::shared_read(at, sizeof(T), {"lds", file, line}), sizeof(T));
  return value;
}
template <typename T>
inline void sts(uint32_t at, T value, LK_SITE) {
  std::memcpy(emulator::shared_write(at, sizeof(T), {"sts", file, line}), &value, sizeof(T));
}
inline void cp_async16(uint32_t to, const void* from, int bytes, LK_SITE) {
  emulator::copy_async(to, from, 16, bytes, {"cp_async", file, line});
}
inline void cp_async8(uint32_t to, const void* from, int bytes, LK_SITE) {
  emulator::copy_async(to, from, 8, bytes, {"cp_async", file, line});
}
inline void cp_async_commit() { emulator::commit_copies(); }
template <int N>
inline void cp_async_wait() {
  emulator::wait_copies(N);
}

// Threads together -------------------------------------------------------------------------------

inline void sync_block(LK_SITE) { emulator::barrier({"barrier", file, line}); }
inline float shuffle_xor(float value, int mask, LK_SITE) {
  float out;
  emulator::meet(
      {"shuffle", file, line}, &value, &out,
      [](const void* const* in, void* const* out, const void* mask) {
        for (int i = 0; i < 32; ++i)
          *static_cast<float*>(out[i]) =
              *static_cast<const float*>(in[i ^ *static_cast<const int*>(mask)]);
      },
      &mask);
  return out;
}
inline float shuffle(float value, int from, LK_SITE) {
  struct In {
    float value;
    int from;
  } in{value, from};
  float out;
  emulator::meet(
      {"shuffle", file, line}, &in, &out,
      [](const void* const* in, void* const* out, const void*) {
        for (int i = 0; i < 32; ++i)
          *static_cast<float*>(out[i]) =
              static_cast<const In*>(in[static_cast<const In*>(in[i])->from & 31])->value;
      },
      nullptr);
  return out;
}

// Matrices ---------------------------------------------------------------------------------------

// Lane 8 i + j brings the address of row j of matrix i; lane l gets elements 2 (l % 4) and the next
// of row l / 4 of each, or of column l / 4.
template <bool Transposed>
inline void ldmatrix(uint32_t at, uint32_t r[4], const char* file, int line) {
  const void* row = emulator::shared_read(at, 16, {"ldmatrix", file, line});
  emulator::meet(
      {"ldmatrix", file, line}, row, r,
      [](const void* const* in, void* const* out, const void*) {
        for (int l = 0; l < 32; ++l)
          for (int i = 0; i < 4; ++i) {
            uint16_t pair[2];
            for (int e = 0; e < 2; ++e) {
              const int a = l / 4, b = 2 * (l % 4) + e;
              pair[e] = static_cast<const uint16_t*>(
                  in[8 * i + (Transposed ? b : a)])[Transposed ? a : b];
            }
            static_cast<uint32_t*>(out[l])[i] = pair[0] | (uint32_t)pair[1] << 16;
          }
      },
      nullptr);
}
inline void ldmatrix_x4(uint32_t at, uint32_t r[4], LK_SITE) { ldmatrix<false>(at, r, file, line); }
inline void ldmatrix_x4_trans(uint32_t at, uint32_t r[4], LK_SITE) {
  ldmatrix<true>(at, r, file, line);
}

struct Fragments {
  uint32_t a[4], b[2];
};

// d [16, 8] += a [16, 16] · b [16, 8], lane 4 g + t having of
//   a  rows g, g + 8, g, g + 8 at columns 2t, 2t, 2t + 8, 2t + 8, and each one's next
//   b  rows 2t, 2t + 8, and each one's next, of column g
//   d  row g at 2t and 2t + 1, row g + 8 there
template <float (*Widen)(uint16_t)>
inline void mma(float d[4], const uint32_t a[4], const uint32_t b[2], const char* file, int line) {
  Fragments in;
  std::memcpy(in.a, a, sizeof in.a);
  std::memcpy(in.b, b, sizeof in.b);
  emulator::meet(
      {"mma", file, line}, &in, d,
      [](const void* const* in, void* const* out, const void*) {
        float A[16][16], B[16][8];
        for (int l = 0; l < 32; ++l) {
          const Fragments& f = *static_cast<const Fragments*>(in[l]);
          const int g = l / 4, t = l % 4;
          for (int i = 0; i < 4; ++i)
            for (int e = 0; e < 2; ++e)
              A[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + e] = Widen((uint16_t)(f.a[i] >> 16 * e));
          for (int i = 0; i < 2; ++i)
            for (int e = 0; e < 2; ++e)
              B[2 * t + 8 * i + e][g] = Widen((uint16_t)(f.b[i] >> 16 * e));
        }
        for (int l = 0; l < 32; ++l)
          for (int i = 0; i < 4; ++i) {
            const int row = l / 4 + 8 * (i / 2), column = 2 * (l % 4) + i % 2;
            float products[16];
            for (int k = 0; k < 16; ++k) products[k] = A[row][k] * B[k][column];
            float& sum = static_cast<float*>(out[l])[i];
            sum = add_products(sum, products, emulator::mma());
          }
      },
      nullptr);
}
inline void mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2], LK_SITE) {
  mma<bf16_to_f32>(d, a, b, file, line);
}
inline void mma_f16(float d[4], const uint32_t a[4], const uint32_t b[2], LK_SITE) {
  mma<f16_to_f32>(d, a, b, file, line);
}

// Blocks together --------------------------------------------------------------------------------

inline int flag_load_acquire(const int* flag) { return emulator::flag_load(flag, true); }
inline int flag_add_release(int* flag, int value) {
  return emulator::flag_add(flag, value, true, false);
}
inline int flag_add_acq_rel(int* flag, int value) {
  return emulator::flag_add(flag, value, true, true);
}
inline void flag_store(int* flag, int value) { emulator::flag_store(flag, value); }

// Launches ---------------------------------------------------------------------------------------

// The launch whose blocks `resident_blocks` has counted last.
struct Counted {
  const void* kernel;
  int device, threads;
  unsigned shared_bytes;
  bool operator==(const Counted&) const = default;
};
inline Counted counted = {};

template <typename Args>
inline void launch(const Launch& l, void (*kernel)(Args), const Args& args) {
  const Counted own = {(const void*)kernel, l.stream.device, (int)l.threads, l.shared_bytes};
  if (l.cooperative && counted != own)
    throw std::runtime_error(std::string(l.name) + ": the blocks of another launch were counted");
  emulator::launch({.name = l.name,
                    .body = [=] { kernel(args); },
                    .blocks = {.x = l.x, .y = l.y, .z = l.z},
                    .threads = l.threads,
                    .shared_bytes = l.shared_bytes,
                    .cooperative = l.cooperative,
                    .stream = l.stream.handle});
}

// How many blocks run at the same time.
template <typename Args>
inline int resident_blocks(void (*kernel)(Args), int device, int threads, int shared_bytes) {
  counted = {(const void*)kernel, device, threads, (unsigned)shared_bytes};
  return emulator::multiprocessors;
}
template <typename Args>
inline void require_image(void (*)(Args), int, const char*) {}
inline unsigned long long capture_of(uintptr_t) { return 0; }

}  // namespace gpu
}  // namespace lora_kernels
