// The layer for up to 16 rows, one launch: W is streamed once, codes are looked up on their way to
// the tensor cores, and the partial sums of P are published first and consumed last.
#include <algorithm>

#include "kernels.h"
#include "operands.cuh"

namespace lora_kernels {
namespace gpu {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int CHUNK = 128;    // elements of K that a warp takes at a time, 32 a lane
constexpr int AHEAD = 4;      // a warp's loads of W under way
constexpr int LOAD = 1024;    // bytes of each: 16 a lane of two rows of W
constexpr int REPLICAS = 16;  // of the table: half a warp looks up 8 bytes each at once
constexpr int TABLE_BYTES = 256 * REPLICAS * 8, RING_BYTES = WARPS * AHEAD * LOAD;
static_assert(REPLICAS * 8 == 128, "an entry's replicas");

struct Pairs {
  uint32_t high, low;  // of two codes
};
struct alignas(8) Words2 {
  uint32_t w[2];
};

// A chunk of a row of x is four pieces for each of a quad's lanes; which eight elements a piece is
// follows from how W's are spread over the lanes.
template <bool FromCodes>
LK_DEVICE int piece_at(int piece, int t) {
  if (FromCodes) return piece / 2 * 64 + t * 16 + piece % 2 * 8;
  return piece * 32 + t * 8;
}

LK_DEVICE Words4 zeros() {
  Words4 w;
  LK_UNROLL
  for (int e = 0; e < 4; ++e) w.w[e] = 0;
  return w;
}

// A unit of a block's stripe: `part` of a tile, a chunk for each warp.
struct Unit {
  int tile, part;

  LK_DEVICE void advance(int parts) {
    if (++part == parts) {
      part = 0;
      ++tile;
    }
  }
};

// A block's share of P: four rows and two ranks a warp, over a split of K.
constexpr int SHARE_ROWS = 4, SHARE_RANKS = 2 * WARPS;

LK_DEVICE void publish_share(const DecodeArgs& a, int share) {
  const LinearArgs& l = a.linear;
  const int M = (int)l.M, R = (int)l.R, lane = thread_id() % 32, warp = thread_id() / 32;
  const int of_rows = (M + SHARE_ROWS - 1) / SHARE_ROWS, split = share % a.num_splits;
  const int m0 = share / a.num_splits % of_rows * SHARE_ROWS;
  const int r0 = share / a.num_splits / of_rows * SHARE_RANKS + 2 * warp;
  const int64_t first = split * a.k_per_split, end = min_of(l.K, first + a.k_per_split);
  float sums[2][SHARE_ROWS];
  LK_UNROLL
  for (int i = 0; i < 2 * SHARE_ROWS; ++i) sums[i / SHARE_ROWS][i % SHARE_ROWS] = 0.0f;
  LK_ONCE
  for (int64_t k = first + lane * 8; k < end; k += 256) {
    float row[2][8] = {}, x[SHARE_ROWS][8] = {};
    LK_UNROLL
    for (int i = 0; i < 2; ++i)
      if (r0 + i < R) load_vector8(a.a, r0 + i, k, row[i]);
    LK_UNROLL
    for (int m = 0; m < SHARE_ROWS; ++m)
      if (r0 < R && m0 + m < M) load_vector8(a.x, m0 + m, k, x[m]);
    LK_UNROLL
    for (int i = 0; i < 2; ++i) LK_UNROLL
    for (int m = 0; m < SHARE_ROWS; ++m) LK_UNROLL
    for (int e = 0; e < 8; ++e) sums[i][m] = fma_rn(x[m][e], row[i][e], sums[i][m]);
  }
  LK_UNROLL
  for (int i = 0; i < 2; ++i) LK_UNROLL
  for (int m = 0; m < SHARE_ROWS; ++m) {
    const float sum = sum_of_warp(sums[i][m]);
    if (lane == 0 && r0 + i < R && m0 + m < M)
      stg(a.partials + ((int64_t)split * M + m0 + m) * R + r0 + i, sum);
  }
}

LK_DEVICE void wait_flag(const int* flag, int count) {
  while (flag_load_acquire(flag) < count) {
  }
}

// S = s_scale · gate ⊙ P, in shared memory; a barrier must follow.
LK_DEVICE void consume_shares(const DecodeArgs& a, uint32_t ss) {
  const LinearArgs& l = a.linear;
  const int M = (int)l.M, R = (int)l.R;
  if (thread_id() == 0) wait_flag(a.flags, min_of(a.num_shares, grid_x()));
  sync_block();
  for (int u = thread_id(); u < M * R; u += THREADS) {
    float p = 0.0f;
    for (int split = 0; split < a.num_splits; ++split)
      p += ldg_coherent(a.partials + split * M * R + u);
    if (block_x() == 0) stg(a.p + u, p);
    float s = p * l.s_scale;
    if (l.gate.data) s *= load_at(l.gate.data, l.gate.dtype, u % R);
    sts(ss + u * 4, s);
  }
}

// The slices of K that a block's warps share a tile's rows by: 16 rows of W by all warps, or 64 by
// pairs of them, where four warps read what one brought of x into the cache.
template <bool Resident>
constexpr int SLICES = Resident ? WARPS : 2;
template <bool Resident>
constexpr int TILE = WARPS / SLICES<Resident> * 16;
template <bool Resident>
constexpr int PITCH = TILE<Resident> + 4;  // of a row's sums: a warp stores in 32 banks

// A block's scale in two steps, since a nested one is a look-up of a look-up: what the first loads
// is the second's a unit later, and that one's a unit later still.
struct Scale {
  int block = -1;  // -1: zero
  int code = 0;    // of a nested scale
};
struct Factors {
  float value = 0.0f, times = 0.0f, offset = 0.0f;
};
LK_DEVICE Scale look_up(const Codes& c, int block) {
  Scale s;
  s.block = block;
  if (block >= 0 && c.nested_absmax) s.code = ldg(static_cast<const uint8_t*>(c.absmax) + block);
  return s;
}
LK_DEVICE Factors look_up(const Codes& c, const Scale& s, float offset) {
  Factors f;
  if (s.block < 0) return f;
  if (c.nested_absmax) {
    f.value = ldg(c.nested_code + s.code);
    f.times = ldg(c.nested_absmax + (s.block >> c.log2_nested));
    f.offset = offset;
  } else {
    f.value = ldg(static_cast<const float*>(c.absmax) + s.block);
  }
  return f;
}

// y [M, N] = out_scale ⊙ (x·W + S·Q) + bias, z without out_scale and bias, M ≤ 16; p = x·aᵀ.
//
//   yᵀ = W·xᵀ         K →
//          ┌────────┬────────┬─ ─ ┐   A tile: 16 rows of W (64 unless x is Resident). A unit: one
//   tile 0 │ unit 0 │ unit 1 │    │   chunk of 128 of K for each slice of warps. A tile has `parts`
//          ├────────┼────────┼─ ─ ┤   units.
//   tile 1 │ unit p │        │    │
//          └────────┴────────┴─ ─ ┘   Stripes: equal runs of units in this order, one a block.
//
//   block 0 ├── stripe ──┤            A stripe may end inside of a tile. Its blocks then store
//   their block 1              ├── stripe   sums in tile_partials, and the last to come adds all,
//   in order.
//
//   a warp takes rows g and g + 8 of 16, quad lane t of its chunk of each, four loads ahead:
//
//   element of K   0       32       64       96       128
//   codes          │ t0 │ t1 │ t2 │ t3 ││ t0 │ t1 │ t2 │ t3 │   16 codes (8 bytes) of each block of
//                                                               64, so a product is of one scale
//   dense          │0123│ │0123│    │0123│ │0123│               8 elements (16 bytes) of each piece
//
// The order: start four loads of W; publish the block's shares of P and raise the flag; fill the
// table of codes and x; then a unit a turn. The first store waits for all shares. The last block to
// be done lowers the flag, so all must be co-resident.
//
// Bytes: W once; x once a block where it is Resident, else for each 16 rows of W, for 64 from L2;
// for P all x once for two ranks and a once for four rows, from caches but the first time; Q for
// each row of x; y, z, partials once; a shared tile's float32 sums, written and read once a block.
// Flops 2·M·N·(K + R), of codes twice K. Rounding points: x, dense W to 16 bits; y, z once.
// Deterministic for a number of blocks. Tested by tests/cuda_emulated/test_lora_linear.py and
// test_exact.py.
template <bool FromCodes, bool Resident, int MT>
struct Block {
  static constexpr int slices = SLICES<Resident>, tile_n = TILE<Resident>, pitch = PITCH<Resident>;

  const DecodeArgs& a;
  const LinearArgs& l;
  int thread, lane, warp, g, t;  // quad, and lane of a quad
  int M, N, K, R, chunks, parts;
  int slice, row;                            // of K; of the tile
  uint32_t table, sums, last, ss, xs, ring;  // in shared memory
  int left;                                  // units of the stripe, from `now` on
  Unit now, next;                            // to be multiplied; to be loaded
  bool consumed = false;                     // whether S is in shared memory

  LK_DEVICE explicit Block(const DecodeArgs& args) : a(args), l(args.linear) {
    thread = thread_id(), lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
    M = (int)l.M, N = (int)l.N, K = (int)l.K, R = (int)l.R;
    chunks = (K + CHUNK - 1) / CHUNK, parts = a.parts;
    slice = warp % slices, row = warp / slices * 16 + g;
    table = shared_base();
    const uint32_t rings = table + (FromCodes ? TABLE_BYTES : 0);
    sums = rings + RING_BYTES, last = sums + slices * 8 * MT * pitch * 4;
    ss = last + 16, xs = ss + (M * R * 4 + 15) / 16 * 16;
    ring = rings + warp * AHEAD * LOAD + lane * (FromCodes ? 8 : 16);
    const int begin = block_x() * a.stripe;
    left = min_of(a.stripe, a.tiles * parts - begin);
    now = {begin / parts, begin % parts}, next = now;
  }

  // Load W's rows g and g + 8: 8 bytes a lane of each of two blocks of codes, or a piece of 16.
  LK_DEVICE void start_load(int place, int piece, bool is_mine) {
    const int k = (next.part * slices + slice) * CHUNK + piece_at<FromCodes>(piece, t);
    const int64_t row_bytes = FromCodes ? K / 2 : l.w.row * 2;
    const uint8_t* from =
        FromCodes ? l.c.packed + k / 2 : static_cast<const uint8_t*>(l.w.data) + k * 2;
    from += (next.tile * tile_n + row) * row_bytes;
    LK_UNROLL
    for (int i = 0; i < 2; ++i, from += 8 * row_bytes) {
      const bool is_row = is_mine && next.tile * tile_n + row + 8 * i < N;
      const uint32_t to = ring + place * LOAD + i * 512;
      if constexpr (FromCodes) {
        cp_async8(to, from, is_row && k < K ? 8 : 0);
        cp_async8(to + 256, from + 32, is_row && k + 64 < K ? 8 : 0);
      } else {
        cp_async16(to, from, is_row && k < K ? 16 : 0);
      }
    }
    cp_async_commit();
  }

  LK_DEVICE void publish_shares() {
    if (block_x() >= a.num_shares) return;
    LK_ONCE
    for (int share = block_x(); share < a.num_shares; share += grid_x()) publish_share(a, share);
    sync_block();
    if (thread == 0) flag_add_release(a.flags, 1);
  }

  // x in 16 bits as [chunk, piece, m, t]: what the lanes of a warp read together lies together.
  template <bool BFloat16>
  LK_DEVICE void keep_x() {
    for (int u = thread; u < chunks * 16 * M; u += THREADS) {
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
  }

  LK_DEVICE Words4 load_x(int chunk, int piece, int j) const {
    const int k = chunk * CHUNK + piece_at<FromCodes>(piece, t);
    const int m = min_of(g + 8 * j, M - 1);  // any row beside M: what it gives is not stored
    if constexpr (Resident) return lds<Words4>(xs + (((chunk * 4 + piece) * M + m) * 4 + t) * 16);
    const uint16_t* const x = static_cast<const uint16_t*>(l.x.data);
    return k < K ? ldg(reinterpret_cast<const Words4*>(x + m * l.x.row + k)) : zeros();
  }

  // Add the warps' sums of a tile, and store y or the block's part of it. Clears `total`.
  LK_DEVICE void finish_tile(int tile, float (&total)[MT][4]) {
    LK_UNROLL
    for (int j = 0; j < MT; ++j) LK_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int n = row + e / 2 * 8, m = j * 8 + 2 * t + e % 2;
      sts(sums + ((slice * (8 * MT) + m) * pitch + n) * 4, total[j][e]);
      total[j][e] = 0.0f;
    }
    if (!consumed) consume_shares(a, ss);
    consumed = true;
    sync_block();
    // The blocks of the tile's first and last unit.
    const int from = tile * parts / a.stripe, to = ((tile + 1) * parts - 1) / a.stripe;
    // A block stores the sums at 2 b of the tile that its stripe begins in, else at 2 b + 1.
    const auto sums_of = [&](int block) {
      const int place = 2 * block + (block * a.stripe < tile * parts);
      return a.tile_partials + place * tile_n * M;
    };
    if (slices > 1 || from != to) {
      for (int u = thread; u < tile_n * M; u += THREADS) {
        const uint32_t at = sums + (u / tile_n * pitch + u % tile_n) * 4;
        float sum = 0.0f;
        LK_UNROLL
        for (int i = 0; i < slices; ++i) sum += lds<float>(at + i * (8 * MT) * pitch * 4);
        if (from == to)
          sts(at, sum);
        else
          stg(sums_of(block_x()) + u, sum);
      }
    }
    bool is_last = true;
    if (from != to) {
      sync_block();
      int* const arrived = a.flags + 2 + from;
      if (thread == 0) sts(last, (int)(flag_add_acq_rel(arrived, 1) == to - from));
      sync_block();
      is_last = lds<int>(last);
      if (is_last && thread == 0) flag_store(arrived, 0);
    }
    if (is_last)
      for (int u = thread; u < tile_n * M; u += THREADS) {
        const int n = u % tile_n, m = u / tile_n;
        const int64_t column = (int64_t)tile * tile_n + n, at = m * l.N + column;
        if (column >= l.N) continue;
        float y = 0.0f;
        if (from == to)
          y = lds<float>(sums + (m * pitch + n) * 4);
        else
          for (int block = from; block <= to; ++block) y += ldg_coherent(sums_of(block) + u);
        for (int r = 0; r < R; ++r)
          y = fma_rn(lds<float>(ss + (m * R + r) * 4), load(l.q, r, column), y);
        if (l.z) store_at(l.z, l.y_dtype, at, y);
        if (l.out_scale.data) y *= load_at(l.out_scale.data, l.out_scale.dtype, column);
        if (l.bias.data) y += load_at(l.bias.data, l.bias.dtype, column);
        store_at(l.y, l.y_dtype, at, y);
      }
    sync_block();  // the sums may be written again
  }

  LK_DEVICE void leave() {
    cp_async_wait<0>();
    if (thread == 0 && flag_add_acq_rel(a.flags + 1, 1) == grid_x() - 1) {
      flag_store(a.flags, 0);
      flag_store(a.flags + 1, 0);
    }
  }
};

template <bool BFloat16>
LK_DEVICE void multiply(float sums[4], const uint32_t w[4], const Words4& x, int half) {
  const uint32_t b[2] = {x.w[2 * half], x.w[2 * half + 1]};
  if (BFloat16)
    mma_bf16(sums, w, b);
  else
    mma_f16(sums, w, b);
}

template <int MT>
LK_DEVICE void clear(float (&total)[MT][4]) {
  LK_UNROLL
  for (int j = 0; j < MT; ++j) LK_UNROLL
  for (int e = 0; e < 4; ++e) total[j][e] = 0.0f;
}

// Dense W: the two rows of a piece are the two halves of a product's left side.
template <bool BFloat16, bool Resident, int MT>
LK_KERNEL LK_BOUNDS(THREADS, 2) decode_dense_kernel(const DecodeArgs a) {
  Block<false, Resident, MT> b(a);
  LK_UNROLL
  for (int i = 0; i < AHEAD; ++i) b.start_load(i, i, b.left > 0);
  b.next.advance(b.parts);
  b.publish_shares();
  if constexpr (Resident) b.template keep_x<BFloat16>();
  sync_block();

  float total[MT][4];
  clear(total);
  LK_ONCE
  while (b.left > 0) {
    const int tile = b.now.tile;
    LK_ONCE
    do {
      const int chunk = b.now.part * b.slices + b.slice;
      LK_UNROLL
      for (int piece = 0; piece < 4; ++piece) {
        cp_async_wait<AHEAD - 1>();
        if (chunk < b.chunks) {
          Words4 w[2], x[MT];
          LK_UNROLL
          for (int i = 0; i < 2; ++i) w[i] = lds<Words4>(b.ring + piece * LOAD + i * 512);
          LK_UNROLL
          for (int j = 0; j < MT; ++j) x[j] = b.load_x(chunk, piece, j);
          LK_UNROLL
          for (int half = 0; half < 2; ++half) {
            const uint32_t rows[4] = {w[0].w[2 * half], w[1].w[2 * half], w[0].w[2 * half + 1],
                                      w[1].w[2 * half + 1]};
            LK_UNROLL
            for (int j = 0; j < MT; ++j) multiply<BFloat16>(total[j], rows, x[j], half);
          }
        }
        b.start_load(piece, piece, b.left > 1);  // into what was read
      }
      b.next.advance(b.parts);
      b.now.advance(b.parts);
    } while (--b.left && b.now.part);
    b.finish_tile(tile, total);
  }
  b.leave();
}

// The pairs of values of each byte, with a copy for each of 16 lanes: no bank conflicts.
template <bool BFloat16>
LK_DEVICE void fill_table(const Codes& c, uint32_t table) {
  for (int u = thread_id(); u < 256 * REPLICAS; u += THREADS) {
    const int byte = u / REPLICAS;
    const float even = ldg(c.code + (byte >> 4)), odd = ldg(c.code + (byte & 15));
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
}

// Codes: a code is the sum of two bfloat16 (float16), which are two rows of a product's left side.
// A scale multiplies the float32 sum of both.
template <bool BFloat16, bool Resident, int MT>
LK_KERNEL LK_BOUNDS(THREADS, 2) decode_codes_kernel(const DecodeArgs a) {
  Block<true, Resident, MT> b(a);
  const Codes& c = a.linear.c;
  const uint32_t replica = b.lane % REPLICAS * 8;
  // Each lane of a quad looks up one of its four scales.
  const auto block_of = [&](const Unit& of, bool is_mine) {
    const int n = of.tile * b.tile_n + b.row + b.t % 2 * 8;
    const int k = (of.part * b.slices + b.slice) * CHUNK + b.t / 2 * 64;
    const bool is_there = is_mine && n < b.N && k < b.K;
    return is_there ? (int)(((int64_t)n * b.K + k) >> c.log2_block) : -1;
  };
  LK_UNROLL
  for (int i = 0; i < AHEAD; ++i) {
    b.start_load(i, 0, b.left > i);
    b.next.advance(b.parts);
  }
  const float offset = c.nested_absmax ? ldg(c.offset) : 0.0f;
  Unit scales = b.now;  // two units ahead
  Factors factors = look_up(c, look_up(c, block_of(scales, true)), offset);
  scales.advance(b.parts);
  Scale scale_ahead = look_up(c, block_of(scales, b.left > 1));
  scales.advance(b.parts);
  b.publish_shares();
  fill_table<BFloat16>(c, b.table);
  if constexpr (Resident) b.template keep_x<BFloat16>();
  sync_block();

  int slot = 0;
  float total[MT][4];
  clear(total);
  LK_ONCE
  while (b.left > 0) {
    const int tile = b.now.tile;
    LK_ONCE
    do {
      const int chunk = b.now.part * b.slices + b.slice;
      const float own = c.nested_absmax
                            ? add_rn(mul_rn(factors.value, factors.times), factors.offset)
                            : factors.value;
      factors = look_up(c, scale_ahead, offset);
      scale_ahead = look_up(c, block_of(scales, b.left > 2));
      scales.advance(b.parts);
      cp_async_wait<AHEAD - 1>();
      if (chunk < b.chunks) LK_UNROLL
      for (int block = 0; block < 2; ++block) {
        Words2 w[2];
        float scale[2];
        LK_UNROLL
        for (int i = 0; i < 2; ++i) scale[i] = shuffle(own, b.lane / 4 * 4 + 2 * block + i);
        LK_UNROLL
        for (int i = 0; i < 2; ++i)
          w[i] = lds<Words2>(b.ring + slot * LOAD + i * 512 + block * 256);
        float partial[2][MT][4];  // a row of W's: of high and of low parts
        LK_UNROLL
        for (int e = 0; e < 8 * MT; ++e) partial[e / 4 / MT][e / 4 % MT][e % 4] = 0.0f;
        LK_UNROLL
        for (int piece = 0; piece < 2; ++piece) {
          Words4 x[MT];
          LK_UNROLL
          for (int j = 0; j < MT; ++j) x[j] = b.load_x(chunk, 2 * block + piece, j);
          LK_UNROLL
          for (int u = 0; u < 4; ++u) {  // 16 elements of K, four of each lane, of a row
            const int half = u / 2, i = u % 2;
            uint32_t rows[4];
            LK_UNROLL
            for (int e = 0; e < 2; ++e) {
              // Byte 2 half + e of four, times the table's 128 bytes of replicas.
              const int shift = 16 * half + 8 * e;
              const uint32_t word = w[i].w[piece];
              const uint32_t entry = (shift ? word >> (shift - 7) : word << 7) & 255 * 128;
              const Pairs pairs = lds<Pairs>(b.table + (entry | replica));
              rows[2 * e] = pairs.high;
              rows[2 * e + 1] = pairs.low;
            }
            LK_UNROLL
            for (int j = 0; j < MT; ++j) multiply<BFloat16>(partial[i][j], rows, x[j], half);
          }
        }
        LK_UNROLL
        for (int j = 0; j < MT; ++j) LK_UNROLL
        for (int e = 0; e < 4; ++e)
          total[j][e] = fma_rn(partial[e / 2][j][e % 2] + partial[e / 2][j][e % 2 + 2],
                               scale[e / 2], total[j][e]);
      }
      b.start_load(slot, 0, b.left > AHEAD);
      slot = (slot + 1) % AHEAD;
      b.next.advance(b.parts);
      b.now.advance(b.parts);
    } while (--b.left && b.now.part);
    b.finish_tile(tile, total);
  }
  b.leave();
}

unsigned shared_bytes(const DecodeArgs& a) {
  const LinearArgs& l = a.linear;
  const int64_t rows = l.M > 8 ? 16 : 8, chunks = (l.K + CHUNK - 1) / CHUNK;
  const int row = a.resident ? SLICES<true> * PITCH<true> : SLICES<false> * PITCH<false>;
  return (unsigned)((l.codes ? TABLE_BYTES : 0) + RING_BYTES + row * rows * 4 + 16 +
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
  if (!a.x.vectors || !d.x.vectors || a.K % 8 || (!d.resident && a.x.dtype != a.compute))
    return "x's rows are not whole and aligned 16 bytes";
  if (!d.a.vectors) return "lora_A's rows are not whole and aligned 16 bytes";
  if (!a.codes && (a.w.dtype != a.compute || !a.w.vectors))
    return "the weight's rows are not whole and aligned 16 bytes";
  if (a.codes && (!a.c.vectors || a.c.log2_block < 6 || a.K % 64))
    return "the weight's rows are not whole blocks of 64 codes or more";
  return nullptr;
}

int tile_rows(const DecodeArgs& a) { return a.resident ? TILE<true> : TILE<false>; }

void set_tiles(DecodeArgs& a) {
  const LinearArgs& l = a.linear;
  const int of_k = (a.resident ? SLICES<true> : SLICES<false>)*CHUNK, of_n = tile_rows(a);
  a.tiles = (int)((l.N + of_n - 1) / of_n);
  a.parts = (int)((l.K + of_k - 1) / of_k);
}

}  // namespace

bool decode_keeps_x(const DecodeArgs& d) {
  DecodeArgs a = d;
  a.resident = true;
  return a.linear.M <= 8 && shared_bytes(a) <= ROOM;
}

int64_t decode_partials(const DecodeArgs& d) {
  DecodeArgs a = d;
  set_tiles(a);
  return a.parts == 1
             ? 0
             : int64_t{2} * std::min(a.max_blocks, a.tiles * a.parts) * tile_rows(a) * a.linear.M;
}

template <bool BFloat16>
static auto kernel_of(const DecodeArgs& a) {
  const bool is_wide = a.linear.M > 8;
  if (a.linear.codes) {
    if (a.resident) return decode_codes_kernel<BFloat16, true, 1>;
    return is_wide ? decode_codes_kernel<BFloat16, false, 2>
                   : decode_codes_kernel<BFloat16, false, 1>;
  }
  if (a.resident) return decode_dense_kernel<BFloat16, true, 1>;
  return is_wide ? decode_dense_kernel<BFloat16, false, 2>
                 : decode_dense_kernel<BFloat16, false, 1>;
}

void decode(const DecodeArgs& given, const Stream& stream) {
  DecodeArgs a = given;
  refuse("decode", decode_unsupported_reason(a));
  const LinearArgs& l = a.linear;
  const auto kernel = a.linear.compute == BF16 ? kernel_of<true>(a) : kernel_of<false>(a);
  const unsigned bytes = shared_bytes(a);
  const int blocks = std::max(
      1, std::min(a.max_blocks, resident_blocks(kernel, stream.device, THREADS, (int)bytes)));
  set_tiles(a);
  const int units = a.tiles * a.parts;
  a.stripe = std::max((units + blocks - 1) / blocks, std::min(a.parts, l.codes ? 4 : 2));
  const int64_t shares =
      (l.M + SHARE_ROWS - 1) / SHARE_ROWS * ((l.R + SHARE_RANKS - 1) / SHARE_RANKS);
  a.num_shares = (int)(a.num_splits * shares);
  launch({.name = "decode",
          .x = (unsigned)((units + a.stripe - 1) / a.stripe),
          .threads = THREADS,
          .shared_bytes = bytes,
          .stream = stream,
          .cooperative = true},
         kernel, a);
}

}  // namespace gpu
}  // namespace lora_kernels
