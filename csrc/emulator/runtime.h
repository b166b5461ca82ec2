// Runs CUDA kernels on a CPU, for tests: every thread of a block is a fiber, and which one goes on
// next is drawn from a seed. Rare but legal behavior of a GPU happens often, and is checked:
//
//   shared memory   each two bytes know who wrote and read them last and between which barriers: a
//                   read of what nobody wrote, of what another thread wrote without a barrier
//                   since, a write over what another may still read, and copies that are under way
//   barriers        all threads of a block, all lanes of a warp, must meet at the same line
//   global memory   only inside of the ranges that the launch names, aligned, and counted in bytes;
//                   stores stay in the block, out of others' sight, until it releases them or ends;
//                   a grid stores each byte at most once
//   coherence       each stored byte knows its block and release: a load of another block's bytes
//                   without an acquire of that release, a second block's store to them, and a store
//                   to a flag that others may still look at. ld.global.nc needs bytes that no grid
//                   stores while this one runs, before the load or after it
//   grids           as many blocks at once as there are simulated multiprocessors; one stream's
//                   grids follow each other, other streams' run between
//
// The first mistake ends all grids and is thrown by `synchronize`. On request bank conflicts are
// counted too, and products of matrices are summed as a tensor core may.
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace lora_kernels {
namespace emulator {

struct Dim {
  unsigned x, y, z;
};

struct Range {
  std::string name;
  uintptr_t begin, end;
  int64_t read = 0, written = 0;
};

struct Traffic {
  std::string kernel;
  std::vector<Range> ranges;
};

extern int multiprocessors;  // each runs one block at a time

// Which thread goes on next is drawn from here on from this seed, in all launches that follow.
void set_seed(uint64_t seed);

// Memory that the launches from here on may touch; the range before the same names is forgotten.
void allow(std::vector<Range> ranges);

struct Grid {
  std::string name;
  std::function<void()> body;
  Dim blocks;
  unsigned threads, shared_bytes;
  bool cooperative;
  uintptr_t stream;
};
void launch(Grid grid);

// Runs all that was launched. std::runtime_error: what went wrong, where.
void synchronize();
std::vector<Traffic> traffic();  // of the grids that the last `synchronize` ran
int64_t switches();              // between fibers, in all

// The accesses of one instruction to shared memory. A wavefront serves a warp, or half or a quarter
// of one if a lane takes 8 or 16 bytes: of each of 32 banks one word of 4 bytes. Lanes that read
// the same word are served at once.
struct BankSite {
  std::string kernel;
  const char *what, *file;
  int line;
  int64_t accesses = 0;
  int64_t extra = 0;  // wavefronts more than an access without conflicts takes
  int worst = 0;      // the most of one access
};
void count_banks(bool on);  // from zero; off until the first call
std::vector<BankSite> bank_sites();

// How `mma` adds 16 products to a sum. Tensor cores take them in groups, align a group and the sum
// to the largest exponent, and drop the bits below: 8 products and one bit more than float32's 24
// on sm_80 and sm_89, 16 and two on sm_90 and sm_100 (Khattak and Mikaitis, arXiv:2512.07004). With
// 0 products `mma` adds one after another in float32.
struct Mma {
  int products = 0;
  int extra_bits = 0;
  uint64_t seed = 0;  // of the order of the products; 0 keeps it
};
void set_mma(const Mma& how);
const Mma& mma();

// For device code --------------------------------------------------------------------------------

Dim thread_index();
Dim block_index();
Dim grid_size();

struct Site {
  const char* what;
  const char* file;
  int line;
};

[[noreturn]] void report(const std::string& what);
void yield_now();
void barrier(const Site& site);
// All lanes of a warp bring `in`; the last one calls f(ins, outs), arrays of 32 pointers.
using Exchange = void (*)(const void* const* in, void* const* out, const void* what);
void meet(const Site& site, const void* in, void* out, Exchange f, const void* what);

void* shared_read(uint32_t at, int bytes, const Site& site);  // where it is, after all checks
void* shared_write(uint32_t at, int bytes, const Site& site);
// `size` bytes land, those past `bytes` as zeros.
void copy_async(uint32_t to, const void* from, int size, int bytes, const Site& site);
void commit_copies();
void wait_copies(int groups);

enum class Path { READ_ONLY, COHERENT };  // ld.global.nc; a load that sees other blocks' stores
void global_read(const void* from, void* to, int bytes, Path path);
void global_write(void* to, const void* from, int bytes);
int flag_load(const int* flag, bool acquire);
int flag_add(int* flag, int value, bool release, bool acquire);
void flag_store(int* flag, int value);

}  // namespace emulator
}  // namespace lora_kernels
