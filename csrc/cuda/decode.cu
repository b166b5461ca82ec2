// The layer for up to 16 rows, one launch: W is streamed once, codes are looked up on their way to
// the tensor cores, and the partial sums of P are published first and consumed last.
#include <algorithm>

#include "kernels.h"
#include "operands.cuh"

namespace lora_kernels {
namespace gpu {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int TILE_N = 16;  // rows of W that a block computes at a time, K divided among its warps
constexpr int CHUNK = 128;  // elements of K that a warp takes at a time, 32 a lane
constexpr int REPLICAS = 16;  // of the table: half a warp looks up 8 bytes each at once
constexpr int TABLE_BYTES = 256 * REPLICAS * 8;
static_assert(REPLICAS * 8 == 128, "an entry's replicas");

struct Pairs {
  uint32_t high, low;  // of two codes
};

// A chunk of a row of x is four pieces for each of a quad's lanes; which eight elements a piece is
// follows from how W's are spread over the lanes.
template <bool FromCodes>
LK_DEVICE int piece_at(int piece, int t) {
  if (FromCodes) return piece / 2 * 64 + (t % 2 * 32 + t / 2 * 16) + piece % 2 * 8;
  return piece * 32 + t * 8;
}

LK_DEVICE Words4 zeros() {
  Words4 w;
  LK_UNROLL
  for (int e = 0; e < 4; ++e) w.w[e] = 0;
  return w;
}

// P's partial sums over a split of K, a warp a rank and a row at a time; what was read for one row
// is in the cache for the next.
LK_DEVICE void publish_partials(const DecodeArgs& a, int split) {
  const LinearArgs& l = a.linear;
  const int64_t first = split * a.k_per_split, end = min_of(l.K, first + a.k_per_split);
  const int lane = thread_id() % 32, warp = thread_id() / 32;
  LK_ONCE
  for (int u = warp; u < l.R * l.M; u += WARPS) {
    const int r = u % (int)l.R, m = u / (int)l.R;
    float sum = 0.0f;
    LK_ONCE
    for (int64_t k = first + lane * 8; k < end; k += 256) {
      float row[8], x[8];
      load_vector8(a.a, r, k, row);
      load_vector8(l.x, m, k, x);
      LK_UNROLL
      for (int e = 0; e < 8; ++e) sum = fma_rn(x[e], row[e], sum);
    }
    sum = sum_of_warp(sum);
    if (lane == 0) stg(a.partials + (split * l.M + m) * l.R + r, sum);
  }
}

LK_DEVICE void wait_flag(const int* flag, int count) {
  while (flag_load_acquire(flag) < count) {
  }
}

// y [M, N] = out_scale ⊙ (x·W + S·Q) + bias, z without out_scale and bias, M ≤ 16; p = x·aᵀ.
// yᵀ = W·xᵀ in tiles of 16 rows of W by 8 MT rows of x; the grid's blocks take tiles in turn, their
// warps a slice of K each, added in order. A code is the sum of two bfloat16 (float16), looked up
// in pairs in a table with a copy for each of 16 lanes, which avoids bank conflicts; a block's
// scale multiplies its float32 sum. Lanes of a quad exchange halves of what they load, so that the
// 16 elements of a product are of one block.
// The first blocks publish partial sums of p, a split or more each, and raise the flag; all wait
// for it before their first store, the last block to be done lowers it. All must be co-resident.
// Bytes: W once; x once a block where it is Resident, else once a tile; in all x once a rank and
// a once a row more, from caches except for the first; Q, y, z, partials once. Flops 2·M·N·(K + R),
// of codes twice K. Rounding points: x, dense W to 16 bits; y, z once. Deterministic. Tested by
// tests/cuda_emulated/test_lora_linear.py.
template <bool BFloat16, bool FromCodes, bool Resident, int MT>
LK_KERNEL LK_BOUNDS(THREADS, 2) decode_kernel(const DecodeArgs a) {
  const LinearArgs& l = a.linear;
  const int thread = thread_id(), lane = thread % 32, warp = thread / 32, g = lane / 4,
            t = lane % 4;
  const int M = (int)l.M, R = (int)l.R;
  const uint32_t table = shared_base(), sums = table + (FromCodes ? TABLE_BYTES : 0);
  const uint32_t ss = sums + WARPS * TILE_N * 8 * MT * 4, xs = ss + (M * R * 4 + 15) / 16 * 16;
  const int chunks = (int)((l.K + CHUNK - 1) / CHUNK);
  const uint32_t replica = lane % REPLICAS * 8;

  if (block_x() < a.num_splits) {
    LK_ONCE
    for (int split = block_x(); split < a.num_splits; split += grid_x()) publish_partials(a, split);
    sync_block();
    if (thread == 0) flag_add_release(a.flags, 1);
  }

  if constexpr (FromCodes)
    for (int u = thread; u < 256 * REPLICAS; u += THREADS) {
      const int byte = u / REPLICAS;
      const float even = ldg(l.c.code + (byte >> 4)), odd = ldg(l.c.code + (byte & 15));
      Pairs pairs;
      if (BFloat16) {
        pairs.high = pack_bf16(even, odd);
        pairs.low = pack_bf16(even - bf16_to_f32((uint16_t)pairs.high),
                              odd - bf16_to_f32((uint16_t)(pairs.high >> 16)));
      } else {
        pairs.high = pack_f16(even, odd);
        pairs.low = pack_f16(even - f16_to_f32((uint16_t)pairs.high),
                             odd - f16_to_f32((uint16_t)(pairs.high >> 16)));
      }
      sts(table + u * 8, pairs);
    }
  if constexpr (Resident)
    for (int u = thread; u < chunks * 16 * M; u += THREADS) {
      // [chunk, piece, m, t]: what the lanes of a warp read together lies together.
      const int lane_t = u % 4, m = u / 4 % M, piece = u / 4 / M % 4, chunk = u / 4 / M / 4;
      const int64_t k = (int64_t)chunk * CHUNK + piece_at<FromCodes>(piece, lane_t);
      float x[8] = {};
      if (k < l.K) load_vector8(l.x, m, k, x);
      Words4 w;
      LK_UNROLL
      for (int e = 0; e < 4; ++e)
        w.w[e] = BFloat16 ? pack_bf16(x[2 * e], x[2 * e + 1]) : pack_f16(x[2 * e], x[2 * e + 1]);
      sts(xs + u * 16, w);
    }
  sync_block();

  bool consumed = false;
  LK_ONCE
  for (int64_t tile = block_x(); tile < a.tiles; tile += grid_x()) {
    const int64_t n0 = tile * TILE_N;
    float total[MT][4];
    LK_UNROLL
    for (int j = 0; j < MT; ++j) LK_UNROLL
    for (int e = 0; e < 4; ++e) total[j][e] = 0.0f;

    LK_ONCE
    for (int chunk = warp; chunk < chunks; chunk += WARPS) {
      const int64_t k0 = (int64_t)chunk * CHUNK;
      // W's rows g and g + 8: 16 bytes of codes a lane, or four pieces of 16 bytes.
      Words4 w[2][FromCodes ? 1 : 4];
      float scale[2][2];  // row, block
      if constexpr (FromCodes) {
        LK_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int64_t n = n0 + g + 8 * i, k = k0 + t * 32;
          w[i][0] = zeros();
          if (n < l.N && k < l.K)
            w[i][0] =
                ldg_stream(reinterpret_cast<const Words4*>(l.c.packed + (((n * l.K + k) >> 1))));
        }
        // Each lane of a quad decodes one of its four scales.
        const int64_t n = n0 + g + t % 2 * 8, k = k0 + t / 2 * 64;
        const float own =
            n < l.N && k < l.K ? scale_of(l.c, (n * l.K + k) >> l.c.log2_block) : 0.0f;
        LK_UNROLL
        for (int i = 0; i < 4; ++i) scale[i % 2][i / 2] = shuffle(own, lane / 4 * 4 + i);
        // Lanes 0 and 1 hold the first block's bytes, 2 and 3 the second's: halves change places.
        LK_UNROLL
        for (int i = 0; i < 2; ++i) LK_UNROLL
        for (int e = 0; e < 2; ++e) {
          const uint32_t mine = w[i][0].w[e], mine2 = w[i][0].w[e + 2];
          const uint32_t theirs = f32_to_bits(shuffle_xor(bits_to_f32(t < 2 ? mine2 : mine), 2));
          w[i][0].w[e] = t < 2 ? mine : theirs;
          w[i][0].w[e + 2] = t < 2 ? theirs : mine2;
        }
      } else {
        const uint16_t* data = static_cast<const uint16_t*>(l.w.data);
        LK_UNROLL
        for (int i = 0; i < 2; ++i) LK_UNROLL
        for (int piece = 0; piece < 4; ++piece) {
          const int64_t n = n0 + g + 8 * i, k = k0 + piece_at<false>(piece, t);
          w[i][piece] = zeros();
          if (n < l.N && k < l.K)
            w[i][piece] = ldg_stream(reinterpret_cast<const Words4*>(data + n * l.w.row + k));
        }
      }
      float partial[MT][4];
      LK_UNROLL
      for (int piece = 0; piece < 4; ++piece) {
        Words4 x[MT];
        LK_UNROLL
        for (int j = 0; j < MT; ++j) {
          const int m = g + 8 * j;
          const int64_t k = k0 + piece_at<FromCodes>(piece, t);
          x[j] = zeros();
          if constexpr (Resident) {
            if (m < M) x[j] = lds<Words4>(xs + (((chunk * 4 + piece) * M + m) * 4 + t) * 16);
          } else if (m < M && k < l.K) {
            x[j] = ldg(reinterpret_cast<const Words4*>(static_cast<const uint16_t*>(l.x.data) +
                                                       m * l.x.row + k));
          }
        }
        if (piece % 2 == 0) LK_UNROLL
        for (int j = 0; j < MT; ++j) LK_UNROLL
        for (int e = 0; e < 4; ++e) partial[j][e] = 0.0f;
        LK_UNROLL
        for (int half = 0; half < 2; ++half) {  // 16 elements of K: four of each lane
          uint32_t high[4], low[4];
          LK_UNROLL
          for (int e = 0; e < 4; ++e) {  // rows g and g + 8, elements 0 and 1, then 2 and 3
            if constexpr (FromCodes) {
              // Byte 2 half + e / 2 of eight, times the table's 128 bytes of replicas.
              const int shift = 16 * half + 8 * (e / 2);
              const uint32_t word = w[e % 2][0].w[piece];
              const uint32_t entry = (shift ? word >> (shift - 7) : word << 7) & 255 * 128;
              const Pairs pairs = lds<Pairs>(table + (entry | replica));
              high[e] = pairs.high;
              low[e] = pairs.low;
            } else {
              high[e] = w[e % 2][piece].w[2 * half + e / 2];
            }
          }
          LK_UNROLL
          for (int j = 0; j < MT; ++j) {
            const uint32_t b[2] = {x[j].w[2 * half], x[j].w[2 * half + 1]};
            if constexpr (BFloat16) {
              if (FromCodes) mma_bf16(partial[j], low, b);
              mma_bf16(partial[j], high, b);
            } else {
              if (FromCodes) mma_f16(partial[j], low, b);
              mma_f16(partial[j], high, b);
            }
          }
        }
        if (piece % 2 == 1) LK_UNROLL
        for (int j = 0; j < MT; ++j) LK_UNROLL
        for (int e = 0; e < 4; ++e)
          total[j][e] = FromCodes ? fma_rn(partial[j][e], scale[e / 2][piece / 2], total[j][e])
                                  : total[j][e] + partial[j][e];
      }
    }
    LK_UNROLL
    for (int j = 0; j < MT; ++j) LK_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int n = g + e / 2 * 8, m = j * 8 + 2 * t + e % 2;
      sts(sums + ((warp * TILE_N + n) * (8 * MT) + m) * 4, total[j][e]);
    }

    if (!consumed) {
      if (thread == 0) wait_flag(a.flags, min_of(a.num_splits, grid_x()));
      sync_block();
      for (int u = thread; u < M * R; u += THREADS) {
        float p = 0.0f;
        for (int split = 0; split < a.num_splits; ++split)
          p += ldg_coherent(a.partials + split * M * R + u);
        if (block_x() == 0) stg(a.p + u, p);
        float s = p * l.s_scale;
        if (l.gate.data) s *= load_at(l.gate.data, l.gate.dtype, u % R);
        sts(ss + u * 4, s);
      }
      consumed = true;
    }
    sync_block();
    for (int u = thread; u < TILE_N * M; u += THREADS) {
      const int n = u % TILE_N, m = u / TILE_N;
      const int64_t column = n0 + n;
      if (column >= l.N) continue;
      float y = 0.0f;
      for (int r = 0; r < R; ++r)
        y = fma_rn(lds<float>(ss + (m * R + r) * 4), load(l.q, r, column), y);
      LK_UNROLL
      for (int w = 0; w < WARPS; ++w) y += lds<float>(sums + ((w * TILE_N + n) * (8 * MT) + m) * 4);
      const int64_t at = m * l.N + column;
      if (l.z) store_at(l.z, l.y_dtype, at, y);
      if (l.out_scale.data) y *= load_at(l.out_scale.data, l.out_scale.dtype, column);
      if (l.bias.data) y += load_at(l.bias.data, l.bias.dtype, column);
      store_at(l.y, l.y_dtype, at, y);
    }
    sync_block();  // the sums may be written again
  }
  if (thread == 0 && flag_add_acq_rel(a.flags + 1, 1) == grid_x() - 1) {
    flag_store(a.flags, 0);
    flag_store(a.flags + 1, 0);
  }
}

unsigned shared_bytes(const DecodeArgs& a) {
  const LinearArgs& l = a.linear;
  const int64_t rows = l.M > 8 ? 16 : 8, chunks = (l.K + CHUNK - 1) / CHUNK;
  return (unsigned)((l.codes ? TABLE_BYTES : 0) + WARPS * TILE_N * rows * 4 +
                    (l.M * l.R * 4 + 15) / 16 * 16 + (a.resident ? chunks * 256 * l.M : 0));
}

// x stays in shared memory where that leaves room for two blocks on a multiprocessor of sm_80.
constexpr unsigned ROOM = 80 << 10;

// Why the kernel cannot take it, or null.
const char* decode_unsupported_reason(const DecodeArgs& d) {
  const LinearArgs& a = d.linear;
  if (a.M < 1 || a.M > 16) return "it is for 1 to 16 rows";
  if (a.transposed) return "it is for the forward";
  if (a.compute == F32) return "float32 products need every bit, which tensor cores drop";
  if (!a.x.vectors || a.K % 8 || (!d.resident && a.x.dtype != a.compute))
    return "x's rows are not whole and aligned 16 bytes";
  if (!d.a.vectors) return "lora_A's rows are not whole and aligned 16 bytes";
  if (!a.codes && (a.w.dtype != a.compute || !a.w.vectors))
    return "the weight's rows are not whole and aligned 16 bytes";
  if (a.codes && (!a.c.vectors || a.c.log2_block < 6 || a.K % 64))
    return "the weight's rows are not whole blocks of 64 codes or more";
  return nullptr;
}

}  // namespace

bool decode_keeps_x(const DecodeArgs& d) {
  DecodeArgs a = d;
  a.resident = true;
  return shared_bytes(a) <= ROOM;
}

template <bool BFloat16, bool FromCodes, bool Resident>
static auto kernel_for_rows(const DecodeArgs& a) {
  return a.linear.M > 8 ? decode_kernel<BFloat16, FromCodes, Resident, 2>
                        : decode_kernel<BFloat16, FromCodes, Resident, 1>;
}
template <bool BFloat16, bool FromCodes>
static auto kernel_for_x(const DecodeArgs& a) {
  return a.resident ? kernel_for_rows<BFloat16, FromCodes, true>(a)
                    : kernel_for_rows<BFloat16, FromCodes, false>(a);
}
static auto kernel_for(const DecodeArgs& a) {
  if (a.linear.compute == BF16)
    return a.linear.codes ? kernel_for_x<true, true>(a) : kernel_for_x<true, false>(a);
  return a.linear.codes ? kernel_for_x<false, true>(a) : kernel_for_x<false, false>(a);
}

void decode(const DecodeArgs& given, const Stream& stream) {
  DecodeArgs a = given;
  refuse("decode", decode_unsupported_reason(a));
  const LinearArgs& l = a.linear;
  const auto kernel = kernel_for(a);
  a.tiles = (l.N + TILE_N - 1) / TILE_N;
  const unsigned bytes = shared_bytes(a);
  const int resident = resident_blocks(kernel, stream.device, THREADS, (int)bytes);
  launch({.name = "decode",
          .x = (unsigned)std::min<int64_t>(a.tiles, std::max(resident, 1)),
          .threads = THREADS,
          .shared_bytes = bytes,
          .stream = stream,
          .cooperative = true},
         kernel, a);
}

}  // namespace gpu
}  // namespace lora_kernels
