#include "runtime.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <deque>
#include <memory>
#include <stdexcept>
#include <unordered_map>

#include "fiber.h"

namespace lora_kernels {
namespace emulator {

int multiprocessors = 4;

namespace {

constexpr int WARP = 32;
constexpr int64_t NOBODY = -1, UNDER_WAY = -2, MANY = -3;
constexpr int64_t PATIENCE =
    200000;  // looks at flags one after another, nothing else being able to run

// A thread's place in the order of a block: what came before a barrier came before all after it.
struct Moment {
  int64_t thread = NOBODY;
  int64_t barriers = 0;
};

struct Cell {  // of two bytes of shared memory
  Moment written, read;
};

struct Stored {  // of eight bytes of global memory, not released yet
  unsigned char bytes[8];
  uint8_t mask = 0;
  Moment when[8];
};

struct Copy {
  uint32_t to;
  const void* from;
  int bytes;
};

struct Block;

struct Lane {
  Fiber* fiber;
  Block* block;
  int thread;
  bool done = false;
  bool waiting = false;
  Site site{};
  const void* in = nullptr;
  void* out = nullptr;
  std::vector<Copy> copies;              // not committed
  std::deque<std::vector<Copy>> groups;  // committed
};

struct Warp {
  int arrived = 0, done = 0;
  Site site{};  // where the first of them waits
};

struct Launched;

struct Block {
  Launched* grid;
  Dim index;
  std::vector<Lane> lanes;
  std::vector<Warp> warps;
  int arrived = 0, done = 0;
  Site site{};
  int64_t barriers = 0;
  bool let_dependents = false;
  std::vector<unsigned char> shared;
  std::vector<Cell> cells;
  std::unordered_map<uintptr_t, Stored> stores;
};

struct Launched {
  Grid grid;
  std::vector<Range> ranges;
  unsigned started = 0, finished = 0, let_dependents = 0;
  unsigned size() const { return grid.blocks.x * grid.blocks.y * grid.blocks.z; }
  bool over() const { return finished == size(); }
  size_t last_range = 0;
};

struct State {
  std::vector<Range> allowed;
  std::vector<std::unique_ptr<Launched>> grids;  // in the order of their launches
  std::vector<std::unique_ptr<Block>> blocks;    // that run
  std::vector<Lane*> ready, looking;             // those that look at a flag again and again
  std::vector<std::unique_ptr<Fiber>> fibers, spare;
  std::vector<Traffic> traffic;
  std::string error;
  uint64_t random = 1;
  int64_t looks = 0, switches = 0;
  Lane* lane = nullptr;  // that runs
};
State state;

uint64_t draw() {  // xorshift
  state.random ^= state.random << 13;
  state.random ^= state.random >> 7;
  state.random ^= state.random << 17;
  return state.random >> 11;
}

Moment now(const Lane& lane) { return {lane.thread, lane.block->barriers}; }

// Whether what happened then is over for a thread that is here now.
bool before(const Moment& then, const Moment& here) {
  return then.thread == here.thread || then.barriers < here.barriers;
}

std::string place(const Lane& lane) {
  const Block& b = *lane.block;
  char text[160];
  std::snprintf(text, sizeof text, "%s, block (%u, %u, %u), thread %d", b.grid->grid.name.c_str(),
                b.index.x, b.index.y, b.index.z, lane.thread);
  return text;
}

std::string where(const Site& site) {
  const char* file = std::strrchr(site.file, '/');
  return std::string(site.what) + " at " + (file ? file + 1 : site.file) + ":" +
         std::to_string(site.line);
}

void leave() {
  ++state.switches;
  state.lane->fiber->leave();
}

void wake(Lane& lane) {
  lane.waiting = false;
  state.ready.push_back(&lane);
}

void run_lane() {
  Fiber::entered();
  Lane& lane = *state.lane;
  lane.block->grid->grid.body();
  if (!lane.copies.empty() || !lane.groups.empty())
    report("ends with asynchronous copies that it never waited for");
  Warp& warp = lane.block->warps[lane.thread / WARP];
  if (warp.arrived) report("ends while others wait in " + where(warp.site));
  if (lane.block->arrived) report("ends while others wait in " + where(lane.block->site));
  lane.done = true;
  ++warp.done;
  for (;;) leave();
}

Range& range_of(uintptr_t begin, int bytes, const char* verb) {
  Launched& grid = *state.lane->block->grid;
  const size_t n = grid.ranges.size();
  for (size_t i = 0; i < n; ++i) {
    const size_t at = (grid.last_range + i) % n;
    Range& r = grid.ranges[at];
    if (begin >= r.begin && begin + bytes <= r.end) {
      grid.last_range = at;
      return r;
    }
  }
  std::string nearest = "no range";
  int64_t least = INT64_MAX;
  for (const Range& r : grid.ranges) {
    const int64_t past =
        begin >= r.begin ? (int64_t)(begin + bytes - r.end) : (int64_t)(r.begin - begin);
    if (past < least) {
      least = past;
      nearest =
          std::to_string(past) + " bytes " + (begin >= r.begin ? "past" : "before") + " " + r.name;
    }
  }
  report(std::string(verb) + " " + std::to_string(bytes) + " bytes of global memory " + nearest);
}

void check_aligned(uintptr_t at, int bytes, const char* verb) {
  if (at % bytes)
    report(std::string(verb) + " " + std::to_string(bytes) + " bytes at an address that is " +
           std::to_string(at % bytes) + " past a multiple of them");
}

// Stores that happened before this moment reach the memory that all blocks see.
void flush(Block& block, const Moment* here) {
  for (auto it = block.stores.begin(); it != block.stores.end();) {
    Stored& s = it->second;
    for (int i = 0; i < 8; ++i)
      if (s.mask >> i & 1 && (!here || before(s.when[i], *here))) {
        *reinterpret_cast<unsigned char*>(it->first * 8 + i) = s.bytes[i];
        s.mask &= ~(1 << i);
      }
    it = s.mask ? std::next(it) : block.stores.erase(it);
  }
}

bool stream_is_free(size_t index) {
  const Launched& grid = *state.grids[index];
  for (size_t i = 0; i < index; ++i) {
    const Launched& other = *state.grids[i];
    if (other.grid.stream != grid.grid.stream || other.over()) continue;
    if (grid.grid.dependent && other.let_dependents == other.size()) continue;
    return false;
  }
  return true;
}

void start_block(Launched& grid) {
  auto block = std::make_unique<Block>();
  block->grid = &grid;
  const unsigned i = grid.started++;
  const Dim& n = grid.grid.blocks;
  block->index = {i % n.x, i / n.x % n.y, i / n.x / n.y};
  block->shared.resize(grid.grid.shared_bytes);
  block->cells.resize((grid.grid.shared_bytes + 1) / 2);
  // Shared memory starts with garbage on a GPU, so it must not read as zero here.
  std::fill(block->shared.begin(), block->shared.end(), 0xA5);
  block->warps.resize(grid.grid.threads / WARP);
  block->lanes.resize(grid.grid.threads);
  for (unsigned t = 0; t < grid.grid.threads; ++t) {
    if (state.spare.empty()) state.spare.push_back(std::make_unique<Fiber>());
    Lane& lane = block->lanes[t];
    lane.fiber = state.spare.back().get();
    state.fibers.push_back(std::move(state.spare.back()));
    state.spare.pop_back();
    lane.block = block.get();
    lane.thread = (int)t;
    lane.fiber->start(run_lane);
    state.ready.push_back(&lane);
  }
  state.blocks.push_back(std::move(block));
}

void end_block(Block* block) {
  flush(*block, nullptr);
  Launched& grid = *block->grid;
  ++grid.finished;
  if (!block->let_dependents) ++grid.let_dependents;
  for (Lane& lane : block->lanes) {
    auto it = std::find_if(state.fibers.begin(), state.fibers.end(),
                           [&](const auto& f) { return f.get() == lane.fiber; });
    state.spare.push_back(std::move(*it));
    state.fibers.erase(it);
  }
  state.blocks.erase(std::find_if(state.blocks.begin(), state.blocks.end(),
                                  [&](const auto& b) { return b.get() == block; }));
}

// A block where there is room: of a cooperative grid all at once, else of any grid whose turn it
// is, which a draw decides.
void start_blocks() {
  for (;;) {
    std::vector<Launched*> able;
    for (size_t i = 0; i < state.grids.size(); ++i) {
      Launched& grid = *state.grids[i];
      if (grid.started == grid.size() || !stream_is_free(i)) continue;
      const unsigned room =
          multiprocessors - std::min<size_t>(state.blocks.size(), multiprocessors);
      if (room >= (grid.grid.cooperative ? grid.size() : 1)) able.push_back(&grid);
    }
    if (able.empty()) return;
    Launched& grid = *able[draw() % able.size()];
    do start_block(grid);
    while (grid.grid.cooperative && grid.started < grid.size());
  }
}

}  // namespace

void allow(std::vector<Range> ranges) { state.allowed = std::move(ranges); }

void launch(Grid grid) {
  if (grid.threads % WARP || !grid.threads || grid.threads > 1024)
    throw std::runtime_error(grid.name + ": " + std::to_string(grid.threads) + " threads");
  if (grid.cooperative && grid.blocks.x * grid.blocks.y * grid.blocks.z > (unsigned)multiprocessors)
    throw std::runtime_error(grid.name + ": too many blocks for a cooperative launch");
  auto launched = std::make_unique<Launched>();
  launched->grid = std::move(grid);
  launched->ranges = state.allowed;
  state.grids.push_back(std::move(launched));
}

void set_seed(uint64_t seed) { state.random = (seed + 1) * 0x9E3779B97F4A7C15ull; }

void synchronize() {
  state.error.clear();
  state.traffic.clear();
  state.looks = 0;
  while (state.error.empty()) {
    start_blocks();
    if (state.ready.empty() && state.looking.empty()) break;
    const bool look = state.ready.empty() || (!state.looking.empty() && draw() % 16 == 0);
    std::vector<Lane*>& from = look ? state.looking : state.ready;
    state.looks = state.ready.empty() ? state.looks + 1 : 0;
    const size_t i = draw() % from.size();
    Lane* lane = from[i];
    from[i] = from.back();
    from.pop_back();
    state.lane = lane;
    lane->fiber->enter();
    if (lane->done && ++lane->block->done == (int)lane->block->lanes.size() && state.error.empty())
      end_block(lane->block);
  }
  if (state.error.empty())
    for (const auto& block : state.blocks)
      for (const Lane& lane : block->lanes)
        if (lane.waiting && state.error.empty())
          state.error = place(lane) + ": waits forever in " + where(lane.site);
  for (const auto& grid : state.grids) {
    if (state.error.empty() && !grid->over()) state.error = grid->grid.name + ": never ran";
    state.traffic.push_back({grid->grid.name, grid->ranges});
  }
  // After a mistake the fibers are left where they are; their stacks are used again.
  state.blocks.clear();
  state.ready.clear();
  state.looking.clear();
  state.grids.clear();
  for (auto& fiber : state.fibers) state.spare.push_back(std::move(fiber));
  state.fibers.clear();
  if (!state.error.empty()) throw std::runtime_error(state.error);
}

std::vector<Traffic> traffic() { return state.traffic; }
int64_t switches() { return state.switches; }

Dim thread_index() { return {(unsigned)state.lane->thread, 0, 0}; }
Dim block_index() { return state.lane->block->index; }
Dim grid_size() { return state.lane->block->grid->grid.blocks; }

void report(const std::string& what) {
  if (state.error.empty()) state.error = place(*state.lane) + ": " + what;
  for (;;) leave();
}

void yield_now() {
  state.ready.push_back(state.lane);
  leave();
}

// One more of `all` at this place; whether it is the last.
template <typename Group>
static bool arrive(Group& group, int all, const Site& site) {
  Lane& lane = *state.lane;
  if (group.done) report("waits in " + where(site) + " for threads that have ended");
  if (group.arrived && group.site.line != site.line)
    report("waits in " + where(site) + ", others in " + where(group.site));
  group.site = lane.site = site;
  if (++group.arrived < all) {
    lane.waiting = true;
    leave();
    return false;
  }
  group.arrived = 0;
  return true;
}

void barrier(const Site& site) {
  Block& block = *state.lane->block;
  if (!arrive(block, (int)block.lanes.size(), site)) return;
  ++block.barriers;
  for (Lane& other : block.lanes)
    if (other.waiting) wake(other);
}

void meet(const Site& site, const void* in, void* out, Exchange f, const void* what) {
  Lane& lane = *state.lane;
  Block& block = *lane.block;
  lane.in = in;
  lane.out = out;
  if (!arrive(block.warps[lane.thread / WARP], WARP, site)) return;
  Lane* const lanes = &block.lanes[lane.thread / WARP * WARP];
  const void* ins[WARP];
  void* outs[WARP];
  for (int i = 0; i < WARP; ++i) ins[i] = lanes[i].in, outs[i] = lanes[i].out;
  f(ins, outs, what);
  for (int i = 0; i < WARP; ++i)
    if (lanes[i].waiting) wake(lanes[i]);
}

namespace {

[[noreturn]] void report_shared(const char* verb, uint32_t cell, const char* which,
                                int64_t thread) {
  std::string text = std::string(verb) + " shared memory at " + std::to_string(2 * cell) + which;
  if (thread >= 0) text += " (thread " + std::to_string(thread) + ")";
  report(text);
}

void check_shared(const char* verb, uint32_t at, int bytes) {
  check_aligned(at, bytes, verb);
  const size_t size = state.lane->block->shared.size();
  if (at + bytes > size)
    report(std::string(verb) + " shared memory at " + std::to_string(at) + " of " +
           std::to_string(size));
}

void check_write(uint32_t at, int bytes, const Moment& here) {
  check_shared("writes", at, bytes);
  for (uint32_t i = at / 2; i < (at + bytes + 1) / 2; ++i) {
    const Cell& c = state.lane->block->cells[i];
    if (c.written.thread == UNDER_WAY)
      report_shared("writes", i, ", to which a copy is under way", -1);
    if (c.written.thread != NOBODY && !before(c.written, here))
      report_shared("writes", i, ", which another thread wrote with no barrier between",
                    c.written.thread);
    if (c.read.thread != NOBODY && !before(c.read, here))
      report_shared("writes", i, ", which another thread reads with no barrier between",
                    c.read.thread);
  }
}

void mark_written(Block& block, uint32_t at, int bytes, const Moment& moment) {
  for (uint32_t i = at / 2; i < (at + bytes + 1) / 2; ++i) block.cells[i].written = moment;
}

}  // namespace

void* shared_read(uint32_t at, int bytes) {
  Lane& lane = *state.lane;
  check_shared("reads", at, bytes);
  const Moment here = now(lane);
  for (uint32_t i = at / 2; i < (at + bytes + 1) / 2; ++i) {
    Cell& c = lane.block->cells[i];
    if (c.written.thread == NOBODY) report_shared("reads", i, ", which nothing wrote", -1);
    if (c.written.thread == UNDER_WAY)
      report_shared("reads", i, ", to which a copy is under way", -1);
    if (!before(c.written, here))
      report_shared("reads", i, ", which another thread wrote with no barrier between",
                    c.written.thread);
    // Of several who read between two barriers one name is enough: none of them may be written
    // over.
    const bool others = c.read.thread != NOBODY && !before(c.read, here);
    c.read = {others ? MANY : here.thread, here.barriers};
  }
  return &lane.block->shared[at];
}

void* shared_write(uint32_t at, int bytes) {
  Lane& lane = *state.lane;
  if (draw() % 8 == 0) yield_now();
  check_write(at, bytes, now(lane));
  mark_written(*lane.block, at, bytes, now(lane));
  return &lane.block->shared[at];
}

void copy_async(uint32_t to, const void* from, int bytes) {
  Lane& lane = *state.lane;
  check_write(to, 16, now(lane));
  check_aligned(reinterpret_cast<uintptr_t>(from), 16, "copies");
  if (bytes) range_of(reinterpret_cast<uintptr_t>(from), bytes, "copies").read += bytes;
  mark_written(*lane.block, to, 16, {UNDER_WAY, 0});
  lane.copies.push_back({to, from, bytes});
}

void commit_copies() {
  Lane& lane = *state.lane;
  lane.groups.push_back(std::move(lane.copies));
  lane.copies.clear();
}

void wait_copies(int groups) {
  Lane& lane = *state.lane;
  for (; (int)lane.groups.size() > groups; lane.groups.pop_front())
    for (const Copy& c : lane.groups.front()) {
      unsigned char* to = &lane.block->shared[c.to];
      std::memset(to, 0, 16);
      if (c.bytes) std::memcpy(to, c.from, c.bytes);
      mark_written(*lane.block, c.to, 16, now(lane));
    }
}

void global_read(const void* from, void* to, int bytes) {
  Lane& lane = *state.lane;
  const uintptr_t at = reinterpret_cast<uintptr_t>(from);
  check_aligned(at, bytes, "reads");
  range_of(at, bytes, "reads").read += bytes;
  std::memcpy(to, from, bytes);
  auto& stores = lane.block->stores;
  if (stores.empty()) return;
  for (int i = 0; i < bytes; ++i) {
    const auto it = stores.find((at + i) / 8);
    if (it == stores.end() || !(it->second.mask >> (at + i) % 8 & 1)) continue;
    if (!before(it->second.when[(at + i) % 8], now(lane)))
      report("reads global memory that thread " +
             std::to_string(it->second.when[(at + i) % 8].thread) +
             " wrote with no barrier between");
    static_cast<unsigned char*>(to)[i] = it->second.bytes[(at + i) % 8];
  }
}

void global_write(void* to, const void* from, int bytes) {
  Lane& lane = *state.lane;
  const uintptr_t at = reinterpret_cast<uintptr_t>(to);
  if (draw() % 8 == 0) yield_now();
  check_aligned(at, bytes, "writes");
  range_of(at, bytes, "writes").written += bytes;
  for (int i = 0; i < bytes; ++i) {
    Stored& s = lane.block->stores[(at + i) / 8];
    s.bytes[(at + i) % 8] = static_cast<const unsigned char*>(from)[i];
    s.mask |= 1 << (at + i) % 8;
    s.when[(at + i) % 8] = now(lane);
  }
}

static void look_again(const char* otherwise) {
  if (state.looks > PATIENCE) report(otherwise);
  state.looking.push_back(state.lane);
  leave();
}

int flag_load(const int* flag, bool acquire) {
  (void)acquire;  // a load without may see what is old; here it sees it by chance alone
  range_of(reinterpret_cast<uintptr_t>(flag), 4, "looks at");
  look_again("waits forever for a flag");
  return *flag;
}

int flag_add(int* flag, int value, bool release, bool acquire) {
  (void)acquire;
  Lane& lane = *state.lane;
  range_of(reinterpret_cast<uintptr_t>(flag), 4, "adds to");
  yield_now();
  if (release) {
    const Moment here = now(lane);
    flush(*lane.block, &here);
  }
  const int old = *flag;
  *flag += value;
  return old;
}

void flag_store(int* flag, int value) {
  range_of(reinterpret_cast<uintptr_t>(flag), 4, "writes");
  *flag = value;
}

void launch_dependents() {
  Block& block = *state.lane->block;
  if (block.let_dependents) return;
  block.let_dependents = true;
  ++block.grid->let_dependents;
}

void wait_for_grids_before() {
  const Launched* grid = state.lane->block->grid;
  for (;;) {
    bool clear = true;
    for (const auto& other : state.grids) {
      if (other.get() == grid) break;
      if (other->grid.stream == grid->grid.stream && !other->over()) clear = false;
    }
    if (clear) return;
    look_again("waits forever for the grid before");
  }
}

}  // namespace emulator
}  // namespace lora_kernels
