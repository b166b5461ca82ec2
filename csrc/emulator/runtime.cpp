#include "runtime.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <deque>
#include <memory>
#include <stdexcept>
#include <tuple>
#include <unordered_map>
#include <utility>

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

// An interval is what a block does from one release to the next. Its number is larger than those of
// all intervals before, so that the last one known of a block stands for the block's earlier ones.
struct Launched;
struct Interval {
  const Launched* grid;
  Dim index;
  uint32_t block;
};
using Clock = std::unordered_map<uint32_t, uint32_t>;  // block -> its last interval that is known

struct Flag {
  Clock released;  // by what was added to it since it was last stored to
  Clock looked;    // who read or added to it since
};

// Of each byte of global memory: the interval that stored it, and the last grid that loads it by
// ld.global.nc; 0 is none.
constexpr uintptr_t PAGE = 4096;
struct Page {
  uint32_t stored[PAGE] = {}, read_only[PAGE] = {};
};

struct Copy {
  uint32_t to;
  const void* from;
  int size, bytes;
};

struct Block;

struct SharedAccess {
  size_t site;
  uint32_t at;
  int bytes;
};

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
  Clock acquired;                        // since the last barrier
  std::vector<SharedAccess> accesses;    // since the last meeting of its warp, if they are counted
};

struct Warp {
  int arrived = 0, done = 0;
  Site site{};  // where the first of them waits
};

struct Block {
  Launched* grid;
  Dim index;
  uint32_t id, interval;
  Clock acquired;  // by any thread before the last barrier
  std::vector<Lane> lanes;
  std::vector<Warp> warps;
  int arrived = 0, done = 0;
  Site site{};
  int64_t barriers = 0;
  std::vector<unsigned char> shared;
  std::vector<Cell> cells;
  std::unordered_map<uintptr_t, Stored> stores;
};

struct Launched {
  Grid grid;
  std::vector<Range> ranges;
  uint32_t number;  // from 1 on, in the order of launches
  unsigned started = 0, finished = 0;
  unsigned size() const { return grid.blocks.x * grid.blocks.y * grid.blocks.z; }
  bool over() const { return finished == size(); }
  size_t last_range = 0;
  std::map<std::tuple<const char*, const char*, int>, size_t> sites;  // places in State's
};

struct State {
  std::vector<Range> allowed;
  std::vector<std::unique_ptr<Launched>> grids;  // in the order of their launches
  std::vector<std::unique_ptr<Block>> blocks;    // that run
  std::vector<Lane*> ready, looking;             // those that look at a flag again and again
  std::vector<std::unique_ptr<Fiber>> fibers, spare;
  std::vector<Interval> intervals;
  std::unordered_map<const int*, Flag> flags;
  std::unordered_map<uintptr_t, Page> pages;
  std::vector<Traffic> traffic;
  bool counts_banks = false;
  std::vector<BankSite> sites;
  Mma mma;
  std::string error;
  uint64_t random = 1;
  int64_t looks = 0, switches = 0;
  uint64_t synchronized = 0;
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

std::string block_at(const Dim& index) {
  char text[64];
  std::snprintf(text, sizeof text, "block (%u, %u, %u)", index.x, index.y, index.z);
  return text;
}

std::string place(const Block& block, int64_t thread) {
  return block.grid->grid.name + ", " + block_at(block.index) + ", thread " +
         std::to_string(thread);
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

// Coherence --------------------------------------------------------------------------------------

void begin_interval(Block& block) {
  block.interval = (uint32_t)state.intervals.size();
  state.intervals.push_back({block.grid, block.index, block.id});
}

void join(Clock& to, const Clock& from) {
  for (const auto& [block, interval] : from) to[block] = std::max(to[block], interval);
}

bool knows(const Clock& clock, uint32_t block, uint32_t interval) {
  const auto it = clock.find(block);
  return it != clock.end() && it->second >= interval;
}

// Whether blocks of both may run at once: of one grid, or of two streams.
bool may_overlap(const Launched& a, const Launched& b) {
  return a.number == b.number || a.grid.stream != b.grid.stream;
}

// Whether what that interval did comes before what the block does now, or this lane of it.
bool is_ordered(uint32_t interval, const Block& block, const Lane* lane) {
  const Interval& other = state.intervals[interval];
  if (other.block == block.id || knows(block.acquired, other.block, interval) ||
      (lane && knows(lane->acquired, other.block, interval)))
    return true;
  return other.grid->number < block.grid->number && !may_overlap(*other.grid, *block.grid);
}

// The page that an access of at most 16 aligned bytes lies in; null where none is and none is made.
Page* page_of(uintptr_t at, bool make) {
  constexpr size_t RECENT = 64;
  static std::pair<uintptr_t, Page*> recent[RECENT];
  static uint64_t of = 0;  // the synchronize that they are of
  if (of != state.synchronized) {
    std::fill(std::begin(recent), std::end(recent), std::pair<uintptr_t, Page*>());
    of = state.synchronized;
  }
  auto& [key, page] = recent[at / PAGE % RECENT];
  if (page && key == at / PAGE) return page;
  const auto it = state.pages.find(at / PAGE);
  if (it == state.pages.end() && !make) return nullptr;
  key = at / PAGE;
  return page = it == state.pages.end() ? &state.pages[key] : &it->second;
}

std::string bytes_of(const Launched& grid, uintptr_t at) {
  for (const Range& r : grid.ranges)
    if (at >= r.begin && at < r.end) return r.name + " at byte " + std::to_string(at - r.begin);
  return "global memory";
}

std::string author_of(uint32_t interval) {
  const Interval& i = state.intervals[interval];
  return block_at(i.index) + " of " + i.grid->grid.name;
}

// Why the thread may not load these bytes, or "".
std::string check_load(uintptr_t at, int bytes, Path path) {
  const Lane& lane = *state.lane;
  const Launched& grid = *lane.block->grid;
  Page* const page = page_of(at, path == Path::READ_ONLY);
  if (!page) return "";
  const uint32_t* const stored = page->stored + at % PAGE;
  if (path == Path::READ_ONLY) std::fill_n(page->read_only + at % PAGE, bytes, grid.number);
  for (int i = 0; i < bytes; ++i) {
    if (!stored[i] || (i && stored[i] == stored[i - 1])) continue;
    if (path == Path::READ_ONLY && may_overlap(*state.intervals[stored[i]].grid, grid))
      return bytes_of(grid, at + i) + " by ld.global.nc, though " + author_of(stored[i]) +
             " wrote it while this grid runs";
    if (!is_ordered(stored[i], *lane.block, &lane))
      return bytes_of(grid, at + i) + " without an acquire, though " + author_of(stored[i]) +
             " wrote it";
  }
  return "";
}

// Why the block may not store this byte, or ""; it is the block's from here on.
std::string check_store(const Block& block, const Lane* lane, uintptr_t at) {
  Page& page = *page_of(at, true);
  const uint32_t reader = page.read_only[at % PAGE];
  const uint32_t before = std::exchange(page.stored[at % PAGE], block.interval);
  if (reader && may_overlap(*state.grids[reader - 1], *block.grid))
    return bytes_of(*block.grid, at) + ", which " + state.grids[reader - 1]->grid.name +
           " reads by ld.global.nc while it runs";
  if (before && !is_ordered(before, block, lane))
    return bytes_of(*block.grid, at) + " without an acquire, though " + author_of(before) +
           " wrote it too";
  if (before && state.intervals[before].grid == block.grid)
    return bytes_of(*block.grid, at) + " again, which " + author_of(before) + " wrote";
  return "";
}

// Stores that happened before this moment reach the memory that all blocks see.
void flush(Block& block, const Lane* lane, const Moment* here) {
  for (auto it = block.stores.begin(); it != block.stores.end();) {
    Stored& s = it->second;
    for (int i = 0; i < 8; ++i)
      if (s.mask >> i & 1 && (!here || before(s.when[i], *here))) {
        const uintptr_t at = it->first * 8 + i;
        *reinterpret_cast<unsigned char*>(at) = s.bytes[i];
        s.mask &= ~(1 << i);
        const std::string wrong = check_store(block, lane, at);
        if (!wrong.empty() && state.error.empty())
          state.error = place(block, s.when[i].thread) + ": writes " + wrong;
      }
    it = s.mask ? std::next(it) : block.stores.erase(it);
  }
}

// Bank conflicts ---------------------------------------------------------------------------------

constexpr int BANKS = 32;

struct WarpAccess {  // of the lanes that take part in it
  int bytes = 0;
  std::vector<uint32_t> at[WARP / 8];  // by quarters of the warp
};

void note_access(uint32_t at, int bytes, const Site& site) {
  if (!state.counts_banks) return;
  Lane& lane = *state.lane;
  Launched& grid = *lane.block->grid;
  const auto [it, is_new] = grid.sites.try_emplace({site.what, site.file, site.line}, 0);
  if (is_new) {
    const auto same = std::find_if(state.sites.begin(), state.sites.end(), [&](const auto& s) {
      return s.kernel == grid.grid.name && s.what == site.what && s.file == site.file &&
             s.line == site.line;
    });
    it->second = (size_t)(same - state.sites.begin());
    if (same == state.sites.end())
      state.sites.push_back({grid.grid.name, site.what, site.file, site.line});
  }
  lane.accesses.push_back({it->second, at, bytes});
}

// Wavefronts more than those of an access without conflicts.
int extra_wavefronts(const WarpAccess& access) {
  const int together = 16 / access.bytes;  // quarters of the warp that a wavefront may serve
  int extra = 0;
  for (int first = 0; first < 4; first += together) {
    std::vector<uint32_t> words;
    for (int i = first; i < first + together; ++i)
      for (const uint32_t at : access.at[i])
        for (int w = 0; w < access.bytes / 4; ++w) words.push_back(at / 4 + w);
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    int of_bank[BANKS] = {}, most = 1;
    for (const uint32_t word : words) most = std::max(most, ++of_bank[word % BANKS]);
    extra += most - 1;
  }
  return extra;
}

// Counts what a warp did since it met last: a lane's n-th access at a site goes with the others'.
void count_accesses(Block& block, int warp) {
  if (!state.counts_banks) return;
  std::vector<std::vector<WarpAccess>> of(state.sites.size());
  for (int i = 0; i < WARP; ++i) {
    std::vector<size_t> seen(state.sites.size());
    Lane& lane = block.lanes[warp * WARP + i];
    for (const SharedAccess& a : lane.accesses) {
      const size_t n = seen[a.site]++;
      if (n == of[a.site].size()) of[a.site].emplace_back();
      of[a.site][n].bytes = a.bytes;
      of[a.site][n].at[i / 8].push_back(a.at);
    }
    lane.accesses.clear();
  }
  for (size_t s = 0; s < of.size(); ++s)
    for (const WarpAccess& access : of[s]) {
      const int extra = extra_wavefronts(access);
      BankSite& site = state.sites[s];
      ++site.accesses;
      site.extra += extra;
      site.worst = std::max(site.worst, extra);
    }
}

bool stream_is_free(size_t index) {
  const Launched& grid = *state.grids[index];
  for (size_t i = 0; i < index; ++i) {
    const Launched& other = *state.grids[i];
    if (other.grid.stream == grid.grid.stream && !other.over()) return false;
  }
  return true;
}

void start_block(Launched& grid) {
  auto block = std::make_unique<Block>();
  block->grid = &grid;
  const unsigned i = grid.started++;
  const Dim& n = grid.grid.blocks;
  block->index = {i % n.x, i / n.x % n.y, i / n.x / n.y};
  block->id = (uint32_t)state.intervals.size();
  begin_interval(*block);
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
  for (size_t w = 0; w < block->warps.size(); ++w) count_accesses(*block, (int)w);
  for (const Lane& lane : block->lanes) join(block->acquired, lane.acquired);
  flush(*block, nullptr, nullptr);
  Launched& grid = *block->grid;
  ++grid.finished;
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
  launched->number = (uint32_t)state.grids.size() + 1;
  state.grids.push_back(std::move(launched));
}

void set_seed(uint64_t seed) { state.random = (seed + 1) * 0x9E3779B97F4A7C15ull; }

void synchronize() {
  state.error.clear();
  state.traffic.clear();
  state.looks = 0;
  state.intervals.assign(1, {});  // the first is none
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
          state.error = place(*lane.block, lane.thread) + ": waits forever in " + where(lane.site);
  for (const auto& grid : state.grids) {
    if (state.error.empty() && !grid->over()) state.error = grid->grid.name + ": never ran";
    state.traffic.push_back({grid->grid.name, grid->ranges});
  }
  // After a mistake the fibers are left where they are; their stacks are used again.
  state.blocks.clear();
  state.ready.clear();
  state.looking.clear();
  state.grids.clear();
  state.flags.clear();
  state.pages.clear();
  ++state.synchronized;
  for (auto& fiber : state.fibers) state.spare.push_back(std::move(fiber));
  state.fibers.clear();
  if (!state.error.empty()) throw std::runtime_error(state.error);
}

std::vector<Traffic> traffic() { return state.traffic; }
int64_t switches() { return state.switches; }

void count_banks(bool on) {
  state.counts_banks = on;
  state.sites.clear();
}
std::vector<BankSite> bank_sites() { return state.sites; }

void set_mma(const Mma& how) { state.mma = how; }
const Mma& mma() { return state.mma; }

Dim thread_index() { return {(unsigned)state.lane->thread, 0, 0}; }
Dim block_index() { return state.lane->block->index; }
Dim grid_size() { return state.lane->block->grid->grid.blocks; }

void report(const std::string& what) {
  if (state.error.empty())
    state.error = place(*state.lane->block, state.lane->thread) + ": " + what;
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
  for (size_t w = 0; w < block.warps.size(); ++w) count_accesses(block, (int)w);
  for (Lane& other : block.lanes) {
    if (!other.acquired.empty()) join(block.acquired, std::exchange(other.acquired, {}));
    if (other.waiting) wake(other);
  }
}

void meet(const Site& site, const void* in, void* out, Exchange f, const void* what) {
  Lane& lane = *state.lane;
  Block& block = *lane.block;
  lane.in = in;
  lane.out = out;
  if (!arrive(block.warps[lane.thread / WARP], WARP, site)) return;
  count_accesses(block, lane.thread / WARP);
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

void* shared_read(uint32_t at, int bytes, const Site& site) {
  Lane& lane = *state.lane;
  check_shared("reads", at, bytes);
  note_access(at, bytes, site);
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

void* shared_write(uint32_t at, int bytes, const Site& site) {
  Lane& lane = *state.lane;
  if (draw() % 8 == 0) yield_now();
  check_write(at, bytes, now(lane));
  note_access(at, bytes, site);
  mark_written(*lane.block, at, bytes, now(lane));
  return &lane.block->shared[at];
}

void copy_async(uint32_t to, const void* from, int size, int bytes, const Site& site) {
  Lane& lane = *state.lane;
  check_write(to, size, now(lane));
  note_access(to, size, site);
  check_aligned(reinterpret_cast<uintptr_t>(from), size, "copies");
  if (bytes) {
    range_of(reinterpret_cast<uintptr_t>(from), bytes, "copies").read += bytes;
    const std::string wrong = check_load(reinterpret_cast<uintptr_t>(from), bytes, Path::COHERENT);
    if (!wrong.empty()) report("copies " + wrong);
  }
  mark_written(*lane.block, to, size, {UNDER_WAY, 0});
  lane.copies.push_back({to, from, size, bytes});
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
      std::memset(to, 0, c.size);
      if (c.bytes) std::memcpy(to, c.from, c.bytes);
      mark_written(*lane.block, c.to, c.size, now(lane));
    }
}

void global_read(const void* from, void* to, int bytes, Path path) {
  Lane& lane = *state.lane;
  const uintptr_t at = reinterpret_cast<uintptr_t>(from);
  check_aligned(at, bytes, "reads");
  range_of(at, bytes, "reads").read += bytes;
  std::memcpy(to, from, bytes);
  const std::string wrong = check_load(at, bytes, path);
  if (!wrong.empty()) report("reads " + wrong);
  auto& stores = lane.block->stores;
  if (stores.empty()) return;
  for (int i = 0; i < bytes; ++i) {
    const auto it = stores.find((at + i) / 8);
    if (it == stores.end() || !(it->second.mask >> (at + i) % 8 & 1)) continue;
    if (!before(it->second.when[(at + i) % 8], now(lane)))
      report("reads global memory that thread " +
             std::to_string(it->second.when[(at + i) % 8].thread) +
             " wrote with no barrier between");
    if (path == Path::READ_ONLY)
      report("reads " + bytes_of(*lane.block->grid, at + i) +
             " by ld.global.nc, though its block wrote it");
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
    if (s.mask >> (at + i) % 8 & 1)
      report("writes " + bytes_of(*lane.block->grid, at + i) + " again, which thread " +
             std::to_string(s.when[(at + i) % 8].thread) + " wrote");
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
  Lane& lane = *state.lane;
  range_of(reinterpret_cast<uintptr_t>(flag), 4, "looks at");
  look_again("waits forever for a flag");
  Flag& f = state.flags[flag];
  if (acquire) join(lane.acquired, f.released);
  f.looked[lane.block->id] = lane.block->interval;
  return *flag;
}

int flag_add(int* flag, int value, bool release, bool acquire) {
  Lane& lane = *state.lane;
  Block& block = *lane.block;
  range_of(reinterpret_cast<uintptr_t>(flag), 4, "adds to");
  yield_now();
  Flag& f = state.flags[flag];
  if (acquire) join(lane.acquired, f.released);
  f.looked[block.id] = block.interval;
  if (release) {
    const Moment here = now(lane);
    flush(block, &lane, &here);
    while (!state.error.empty()) leave();
    join(f.released, block.acquired);
    join(f.released, lane.acquired);
    f.released[block.id] = block.interval;
    begin_interval(block);
  }
  const int old = *flag;
  *flag += value;
  return old;
}

void flag_store(int* flag, int value) {
  const Lane& lane = *state.lane;
  range_of(reinterpret_cast<uintptr_t>(flag), 4, "writes");
  Flag& f = state.flags[flag];
  for (const auto& [block, interval] : f.looked)
    if (!is_ordered(interval, *lane.block, &lane))
      report("writes " + bytes_of(*lane.block->grid, reinterpret_cast<uintptr_t>(flag)) +
             " without an acquire, though " + author_of(interval) + " looked at it");
  f = {};
  *flag = value;
}

}  // namespace emulator
}  // namespace lora_kernels
