// The threads of a block as fibers. A fiber runs until it waits at a barrier or ends; which of those that can go on goes on
// is drawn by a generator with a fixed seed, as is the order of the blocks.
#include <csetjmp>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>

#include "cuda_runtime.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// As large as a block's may be, and then bytes that nobody may write to.
constexpr std::size_t guard_bytes = 4096;
alignas(128) unsigned char medkd_shared_memory[cuda_host::most_shared_bytes + guard_bytes];

namespace cuda_host {
namespace {

constexpr std::size_t stack_bytes = 256 * 1024;  // touched pages alone are real
constexpr unsigned char poison = 0xff;           // four or eight of them are NaN, and so are two in either half precision

enum class State { ready, at_block_barrier, at_warp_barrier, done };

struct Fiber {
  char* stack = nullptr;
  jmp_buf context;
  bool started = false;
  State state = State::done;
  uint3 thread;
  int index = 0;
  unsigned mask = 0;  // of the warp barrier that it waits at
  uint64_t brought = 0, received = 0;
  int source = 0;  // the lane that it receives from
};

std::vector<Fiber> fibers(1024);
jmp_buf scheduler;
Fiber* running = nullptr;
const std::function<void()>* body = nullptr;
std::string mistake;
std::vector<int> ready;  // fibers that can go on
int threads = 0, at_barrier = 0, ended = 0;
uint64_t generator = 0;

uint64_t draw(uint64_t below) {
  generator ^= generator << 13;
  generator ^= generator >> 7;
  generator ^= generator << 17;
  return generator % below;
}

template <typename T>
void shuffle_order(std::vector<T>& items) {
  for (std::size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[draw(i)]);
}

// From a fiber back to the scheduler.
void pause(State state) {
  running->state = state;
  if (_setjmp(running->context) == 0) _longjmp(scheduler, 1);
}

// A fiber serves one thread after another.
void fiber_main() {
  for (;;) {
    (*body)();
    pause(State::done);
  }
}

void start(Fiber& fiber) {
  if (fiber.stack == nullptr) {
    void* memory = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    fiber.stack = static_cast<char*>(memory);
  }
  fiber.started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack;
  context.uc_stack.ss_size = stack_bytes;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  setcontext(&context);
}

void resume(Fiber& fiber) {
  running = &fiber;
  threadIdx = fiber.thread;
  if (_setjmp(scheduler) == 0) {
    if (fiber.started) _longjmp(fiber.context, 1);
    start(fiber);
  }
}

std::string name(const Fiber& fiber) {
  return "thread " + std::to_string(fiber.index) + " of block (" + std::to_string(blockIdx.x) + ", " +
         std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) + ")";
}

// Nothing can go on and not all are done: say why.
std::string stuck() {
  for (int i = 0; i < threads; ++i) {
    const Fiber& fiber = fibers[i];
    if (fiber.state != State::at_warp_barrier) continue;
    const int warp = i / 32 * 32;
    for (int lane = 0; lane < 32; ++lane) {
      if (!(fiber.mask >> lane & 1)) continue;
      const std::string who = name(fiber) + " waits in a shuffle or __syncwarp for lane " + std::to_string(lane);
      if (warp + lane >= threads) return who + ", which the block does not have";
      const Fiber& other = fibers[warp + lane];
      if (other.state == State::done) return who + ", which has ended";
      if (other.state == State::at_block_barrier) return who + ", which waits in __syncthreads";
      if (other.mask != fiber.mask) return who + ", which waits in one with another mask";
    }
  }
  return std::to_string(at_barrier) + " of " + std::to_string(threads) + " threads of block (" +
         std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) +
         ") wait in __syncthreads, and " + std::to_string(ended) + " have ended without it";
}

void go_on(Fiber& fiber) {
  fiber.state = State::ready;
  ready.push_back(fiber.index);
}

void run_block(const cudaLaunchConfig_t& config) {
  std::memset(medkd_shared_memory, poison, config.dynamicSmemBytes + guard_bytes);
  ready.clear();
  at_barrier = ended = 0;
  const dim3 size = config.blockDim;
  for (int i = 0; i < threads; ++i) {
    const unsigned u = static_cast<unsigned>(i);
    fibers[i].index = i;
    fibers[i].thread = {u % size.x, u / size.x % size.y, u / size.x / size.y};
    go_on(fibers[i]);
  }
  while (ended < threads) {
    if (ready.empty()) mistake = stuck();
    if (!mistake.empty()) break;
    std::swap(ready[draw(ready.size())], ready.back());
    Fiber& fiber = fibers[ready.back()];
    ready.pop_back();
    resume(fiber);
    if (fiber.state == State::done) ++ended;
    if (fiber.state == State::at_block_barrier && ++at_barrier == threads) {
      at_barrier = 0;
      for (int i = 0; i < threads; ++i) go_on(fibers[i]);
    }
  }
  for (std::size_t i = 0; i < guard_bytes && mistake.empty(); ++i)
    if (medkd_shared_memory[config.dynamicSmemBytes + i] != poison)
      mistake = "block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
                std::to_string(blockIdx.z) + ") wrote " + std::to_string(i) + " bytes behind its " +
                std::to_string(config.dynamicSmemBytes) + " bytes of shared memory";
}

std::unordered_map<const void*, std::size_t>& limits() {
  static std::unordered_map<const void*, std::size_t> all;
  return all;
}

std::mutex one_launch;

}  // namespace

std::size_t limit_of(const void* kernel) {
  const std::lock_guard<std::mutex> lock(one_launch);
  const auto found = limits().find(kernel);
  return found == limits().end() ? default_shared_bytes : found->second;
}

void set_limit(const void* kernel, std::size_t bytes) {
  const std::lock_guard<std::mutex> lock(one_launch);
  limits()[kernel] = bytes;
}

int lane() { return running->index % 32; }

void block_barrier() { pause(State::at_block_barrier); }

uint64_t exchange(unsigned mask, uint64_t value, int source) {
  Fiber& self = *running;
  const int own = self.index % 32, warp = self.index - own;
  if (!(mask >> own & 1) || !(mask >> source & 1)) {
    mistake = name(self) + " shuffles with lane " + std::to_string(source) + " under a mask that lacks one of the two";
    pause(State::at_warp_barrier);
  }
  self.mask = mask;
  self.brought = value;
  self.source = source;
  self.state = State::at_warp_barrier;
  bool complete = true;
  for (int other = 0; other < 32 && complete; ++other)
    if (mask >> other & 1)
      complete = warp + other < threads && fibers[warp + other].state == State::at_warp_barrier &&
                 fibers[warp + other].mask == mask;
  if (complete) {
    for (int other = 0; other < 32; ++other)
      if (mask >> other & 1) fibers[warp + other].received = fibers[warp + fibers[warp + other].source].brought;
    for (int other = 0; other < 32; ++other)
      if (mask >> other & 1) go_on(fibers[warp + other]);
  }
  pause(self.state);
  return self.received;
}

void run(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(one_launch);
  generator = 0x9e3779b97f4a7c15ull;
  body = &thread;
  mistake.clear();
  blockDim = config.blockDim;
  gridDim = config.gridDim;
  threads = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  std::vector<uint64_t> blocks(uint64_t{gridDim.x} * gridDim.y * gridDim.z);
  std::iota(blocks.begin(), blocks.end(), uint64_t{0});
  shuffle_order(blocks);
  for (const uint64_t block : blocks) {
    blockIdx = {static_cast<unsigned>(block % gridDim.x), static_cast<unsigned>(block / gridDim.x % gridDim.y),
                static_cast<unsigned>(block / gridDim.x / gridDim.y)};
    run_block(config);
    if (mistake.empty()) continue;
    for (Fiber& fiber : fibers) fiber.started = false;  // some stopped half-way: their stacks begin anew
    throw std::runtime_error("emulated CUDA: " + mistake);
  }
}

}  // namespace cuda_host
