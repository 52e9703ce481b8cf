// Kernels that each do one thing wrong, and the same kernels done right, for test_emu.py: what the
// emulated GPU reports of the first, and that it reports nothing of the second. Compiled like
// device code and loaded with ctypes.
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/words.cuh"

namespace qk {
namespace {

constexpr int kInts = 256;
struct Arrays {
  const uint32_t* in;  // [kInts], read only
  uint32_t* out;       // [kInts], poisoned
  uint32_t* kept;      // [kInts] zeros, to be written in part
};
struct Setup {
  unsigned blocks = 1, threads = 64;
  size_t shared = 4096;
  bool dependent = false;
  emu::Use in = emu::Use::read;
  bool new_constants = false;
};
using Kernel = void (*)(Arrays);

uint32_t* words() { return shared_memory<uint32_t>(); }
int me() { return int(threadIdx.x); }

// ---- global memory ----

template <bool kWrong>
void read_past_the_end(Arrays a) {
  a.out[me()] = a.in[me() + (kWrong ? kInts - 63 : kInts - 64)];
}
template <bool kWrong>
void read_before_the_beginning(Arrays a) {
  a.out[me()] = a.in[me() - (kWrong ? 1 : 0)];
}
template <bool kWrong>
void write_past_the_end(Arrays a) {
  a.out[me() + (kWrong ? kInts - 63 : kInts - 64)] = 1;
}
template <bool kWrong>
void write_to_an_input(Arrays a) {
  uint32_t* to = kWrong ? const_cast<uint32_t*>(a.in) : a.kept;
  to[me()] = 1;
}
template <bool kWrong>
void read_misaligned(Arrays a) {
  const Words4 v = load_stream(a.in + 4 * (me() % 8) + (kWrong ? 1 : 0));
  a.out[me()] = v.word[0];
}
template <bool kWrong>
void write_misaligned(Arrays a) {
  store_128(a.out + 4 * me() + (kWrong && me() == 5 ? 2 : 0), Words4{});
}
template <bool kWrong>
void two_threads_write_one_element(Arrays a) {
  a.out[kWrong ? me() / 2 : me()] = 7;
}
template <bool kWrong>
void two_blocks_write_one_element(Arrays a) {
  a.out[kWrong ? me() : me() + 64 * int(blockIdx.x)] = 7;
}
template <bool kWrong>
void another_thread_reads_what_one_wrote(Arrays a) {
  a.out[me()] = 7;
  if (!kWrong) block_sync();
  a.kept[me()] = a.out[me() ^ 33];
}
template <bool kWrong>
void another_thread_writes_what_one_reads(Arrays a) {
  const uint32_t v = a.kept[me() ^ 33];
  if (!kWrong) block_sync();
  a.kept[me()] = v;
}
template <bool kWrong>
void reads_an_output_that_is_not_written(Arrays a) {
  if (!kWrong) a.out[me()] = 1;
  a.kept[me()] = a.out[me()];
}
template <bool kWrong>
void bytes_beside_each_other(Arrays a) {
  reinterpret_cast<uint8_t*>(a.out)[kWrong ? me() / 2 : me()] = 7;
}
// Every block leaves a part, the last one sums up. kWhat: what is missing.
enum class Missing { nothing, fence, barrier_before, barrier_after, last };
template <Missing kWhat>
void last_block_sums(Arrays a) {
  auto& last = *shared_memory<uint32_t>();
  float* parts = reinterpret_cast<float*>(a.out);
  parts[64 * blockIdx.x + unsigned(me())] = 1.f;
  if (kWhat != Missing::barrier_before) block_sync();
  if (me() == 0) {
    if (kWhat != Missing::fence) device_fence();
    last = count_around(a.kept, gridDim.x - 1) == gridDim.x - 1;
  }
  if (kWhat != Missing::barrier_after) block_sync();
  if (!last && kWhat != Missing::last) return;
  float sum = 0;
  for (unsigned b = 0; b < gridDim.x; b++) sum += load_other_block(parts + 64 * b + me());
  a.kept[64 + me()] = uint32_t(sum);
}
template <bool kWrong>
void reads_others_through_l1(Arrays a) {
  a.out[64 * blockIdx.x + unsigned(me())] = 1;
  block_sync();
  if (me() == 0) {
    device_fence();
    words()[0] = count_around(a.kept, 100);
    if (!kWrong) device_fence();
  }
  block_sync();
  if (words()[0] + 1 == gridDim.x) a.kept[64 + me()] = a.out[64 + me()] + a.out[me()];
}
template <bool kWrong>
void constant_path_sees_no_writes(Arrays a) {
  if (me() % 4 == 0) store_128(a.out + me(), Words4{});
  block_sync();
  const uint32_t* from = kWrong ? a.out : a.in;
  a.kept[me()] = load_read_only(from + me() / 4 * 4).word[me() % 4];
}
template <bool kWrong>
void before_dependency_wait(Arrays a) {
  if (!kWrong) dependency_wait();
  a.out[me()] = a.in[me()];
  if (kWrong) dependency_wait();
}
void reads_constants_before_dependency_wait(Arrays a) {
  const uint32_t v = a.in[me()];
  dependency_wait();
  a.out[me()] = v;
}
template <bool kWrong>
void no_dependency_wait(Arrays a) {
  if (!kWrong) dependency_wait();
}

template <bool kWrong>
void index_outside_of_an_array(Arrays a) {
  uint32_t local[8] = {};
  for (int i = 0; i < 8; i++) local[i] = a.in[i];
  a.out[me()] = local[a.in[me()] + (kWrong && me() == 3 ? 5 : 0)];
}

// ---- shared memory ----

template <bool kWrong>
void shared_past_the_end(Arrays) {
  words()[1023 - me() + (kWrong ? 1 : 0)] = 1;
}
template <bool kWrong>
void shared_unwritten(Arrays a) {
  if (me() < (kWrong ? 63 : 64)) words()[me()] = 1;
  block_sync();
  a.out[me()] = words()[me()];
}
template <bool kWrong>
void read_after_write(Arrays a) {
  words()[me()] = 1;
  if (!kWrong) block_sync();
  a.out[me()] = words()[me() ^ 32];
}
template <bool kWrong>
void write_after_read(Arrays a) {
  words()[me()] = 1;
  block_sync();
  a.out[me()] = words()[me() ^ 32];
  if (!kWrong) block_sync();
  words()[me()] = 2;
}
template <bool kWrong>
void write_after_write(Arrays) {
  words()[me()] = 1;
  if (!kWrong) block_sync();
  words()[me() ^ 32] = 1;
}
template <bool kWrong>
void read_after_write_in_a_warp(Arrays a) {
  words()[me()] = 1;
  if (!kWrong) warp_sync();
  a.out[me()] = words()[me() ^ 1];
}
template <bool kWrong>
void write_after_read_in_a_warp(Arrays a) {
  words()[me()] = 1;
  warp_sync();
  const uint32_t v = words()[me() ^ 1];
  if (!kWrong) warp_sync();
  words()[me()] = v;
}
template <bool kWrong>  // a shuffle makes the lanes meet, and orders no memory
void shuffle_is_no_barrier(Arrays a) {
  words()[me()] = 1;
  a.kept[me()] = uint32_t(shuffle_xor(me(), 1));
  if (!kWrong) warp_sync();
  a.out[me()] = words()[me() ^ 1];
}
template <bool kWrong>
void warp_sync_is_for_one_warp(Arrays a) {
  words()[me()] = 1;
  if (kWrong) warp_sync();
  else block_sync();
  a.out[me()] = words()[me() ^ 32];
}
template <bool kWrong>
void atomic_after_write(Arrays) {
  if (me() == 0) words()[0] = 0;
  if (!kWrong) block_sync();
  shared_add(reinterpret_cast<int32_t*>(words()), 1);
}
template <bool kWrong>
void read_after_atomic(Arrays a) {
  if (me() == 0) words()[0] = 0;
  block_sync();
  shared_add(reinterpret_cast<int32_t*>(words()), 1);
  if (!kWrong) block_sync();
  a.out[me()] = words()[0];
}
template <bool kWrong>
void atomic_after_read(Arrays a) {
  if (me() == 0) words()[0] = 0;
  block_sync();
  shared_add(reinterpret_cast<int32_t*>(words()), 1);
  block_sync();
  a.out[me()] = words()[0];
  if (!kWrong) block_sync();
  shared_add(reinterpret_cast<int32_t*>(words()), 1);
}
template <bool kWrong>
void shared_bytes_beside_each_other(Arrays a) {
  auto* bytes = shared_memory<uint8_t>();
  bytes[kWrong ? me() / 2 : me()] = 1;
  block_sync();
  a.out[me()] = bytes[me() / 2];
}
template <bool kWrong>
void shared_misaligned(Arrays) {
  *reinterpret_cast<Words4*>(words() + 4 * me() + (kWrong ? 1 : 0)) = Words4{};
}

// ---- copies ----

template <bool kWrong>
void copy_without_wait(Arrays a) {
  copy_async<4>(words() + me(), a.in + me());
  copy_commit();
  if (!kWrong) copy_wait<0>();
  block_sync();
  a.out[me()] = words()[me() ^ 33];
}
template <bool kWrong>
void copy_waits_for_too_few(Arrays a) {
  for (int i = 0; i < 2; i++) {
    copy_async<4>(words() + me() + 64 * i, a.in + me() + 64 * i);
    copy_commit();
  }
  copy_wait<(kWrong ? 1 : 0)>();
  a.out[me()] = words()[me() + 64];
}
template <bool kWrong>
void copy_without_commit(Arrays a) {
  copy_async<4>(words() + me(), a.in + me());
  if (!kWrong) copy_commit();
  copy_wait<0>();
  a.out[me()] = words()[me()];
}
template <bool kWrong>
void copy_without_barrier(Arrays a) {
  copy_async<4>(words() + me(), a.in + me());
  copy_commit();
  copy_wait<0>();
  if (!kWrong) block_sync();
  a.out[me()] = words()[me() ^ 33];
}
template <bool kWrong>
void copy_into_what_is_read(Arrays a) {
  words()[me()] = 1;
  block_sync();
  a.out[me()] = words()[me() ^ 33];
  if (!kWrong) block_sync();
  copy_async<4>(words() + me(), a.in + me());
  copy_commit();
  copy_wait<0>();
}
template <bool kWrong>
void copy_of_too_much(Arrays a) {
  copy_async<16>(words() + 4 * me(), a.in + 4 * me() + (kWrong ? 4 : 0));
  copy_commit();
  copy_wait<0>();
}
template <bool kWrong>  // the part that is not valid is not read
void copy_of_a_part(Arrays a) {
  if (me() == 0) copy_async<16>(words(), a.in + kInts, kWrong ? 4 : 0);
  if (me() == 1) copy_async<16>(words() + 4, a.in + kInts - 4, 12);
}
template <bool kWrong>
void copy_misaligned(Arrays a) {
  copy_async<8>(words() + 2 * me(), a.in + 2 * me() + (kWrong ? 1 : 0));
}

struct Bulk {
  alignas(128) uint32_t data[2][64];
  uint64_t barrier;
};
// kWhat: what is wrong.
enum class Wrong { nothing, wait, bytes, more, parity, init, size, empty, address, sync, twice };
template <Wrong kWhat>
void bulk(Arrays a) {
  Bulk& s = *shared_memory<Bulk>();
  if (me() == 0 && kWhat != Wrong::init) {
    mbarrier_init(&s.barrier);
    mbarrier_init_fence();
  }
  if (kWhat != Wrong::sync) block_sync();
  for (int phase = 0; phase < 2; phase++) {
    if (me() == 0) {
      mbarrier_expect(&s.barrier, kWhat == Wrong::bytes ? 512 : kWhat == Wrong::more ? 128 : 256);
      if (kWhat == Wrong::twice) mbarrier_expect(&s.barrier, 256);
      bulk_load(s.data[phase], a.in + 64 * phase + (kWhat == Wrong::address ? 1 : 0),
                kWhat == Wrong::size    ? 252
                : kWhat == Wrong::empty ? 0
                                        : 256,
                &s.barrier);
    }
    if (kWhat != Wrong::wait) mbarrier_wait(&s.barrier, kWhat == Wrong::parity ? 0 : phase);
    a.out[64 * phase + me()] = s.data[phase][me()];
    block_sync();
  }
}
template <bool kWrong>
void bulk_into_what_is_read(Arrays a) {
  Bulk& s = *shared_memory<Bulk>();
  if (me() == 0) mbarrier_init(&s.barrier);
  block_sync();
  for (int phase = 0; phase < 2; phase++) {
    if (me() == 0) {
      mbarrier_expect(&s.barrier, 256);
      bulk_load(s.data[0], a.in + 64 * phase, 256, &s.barrier);
    }
    mbarrier_wait(&s.barrier, phase);
    a.out[64 * phase + me()] = s.data[0][me()];
    if (!kWrong) block_sync();
  }
}

// ---- threads together ----

template <bool kWrong>
void diverged_warp(Arrays a) {
  const bool left = kWrong ? me() % 2 : me() / 32;
  a.out[me()] = uint32_t(left ? shuffle_xor(me(), 1) : warp_max(me()));
}
template <bool kWrong>
void lanes_stay_away(Arrays a) {
  if (kWrong && me() % 32 == 31) return;
  a.out[me()] = ballot(true);
}
template <bool kWrong>
void barrier_not_reached_by_all(Arrays) {
  if (kWrong && me() < 32) warp_sync(), mbarrier_init(shared_memory<uint64_t>() + me());
  if (!kWrong || me() >= 32) block_sync();
  if (kWrong && me() < 32) warp_sync();
}
template <bool kWrong>
void threads_leave_before_the_barrier(Arrays) {
  if (kWrong && me() >= 32) return;
  block_sync();
}
template <bool kWrong>
void rows_from_other_memory(Arrays a) {
  words()[me()] = 0;
  for (int i = me(); i < 256; i += 64) words()[i] = 0;
  block_sync();
  uint32_t r[4];
  load_matrices(r, kWrong ? static_cast<const void*>(words() + 1) : words() + 4 * (me() % 32));
  a.out[me()] = r[0];
}
template <bool kWrong>
void nothing(Arrays) {}

struct Case {
  const char* name;
  Kernel wrong, right;
  Setup setup, right_setup;
  Case(const char* name, Kernel wrong, Kernel right, Setup setup = {})
      : name(name), wrong(wrong), right(right), setup(setup), right_setup(setup) {}
  Case(const char* name, Kernel wrong, Kernel right, Setup setup, Setup right_setup)
      : name(name), wrong(wrong), right(right), setup(setup), right_setup(right_setup) {}
};
#define QK_CASE(kernel, ...) {#kernel, kernel<true>, kernel<false> __VA_OPT__(, ) __VA_ARGS__}

const Setup kTwoBlocks{2, 64, 4096};
const Setup kDependent{1, 64, 4096, true};
const Setup kConstants{1, 64, 4096, true, emu::Use::constant};
const Setup kNewConstants{1, 64, 4096, true, emu::Use::constant, true};
const std::vector<Case> cases = {
    QK_CASE(read_past_the_end),
    QK_CASE(read_before_the_beginning),
    QK_CASE(write_past_the_end),
    QK_CASE(write_to_an_input),
    QK_CASE(read_misaligned),
    QK_CASE(write_misaligned),
    QK_CASE(two_threads_write_one_element),
    QK_CASE(two_blocks_write_one_element, kTwoBlocks),
    QK_CASE(another_thread_reads_what_one_wrote),
    QK_CASE(another_thread_writes_what_one_reads),
    QK_CASE(reads_an_output_that_is_not_written),
    QK_CASE(bytes_beside_each_other),
    {"last_block_fence", last_block_sums<Missing::fence>, last_block_sums<Missing::nothing>,
     kTwoBlocks},
    {"last_block_barrier_before", last_block_sums<Missing::barrier_before>,
     last_block_sums<Missing::nothing>, kTwoBlocks},
    {"last_block_barrier_after", last_block_sums<Missing::barrier_after>,
     last_block_sums<Missing::nothing>, kTwoBlocks},
    {"last_block_is_last", last_block_sums<Missing::last>, last_block_sums<Missing::nothing>,
     kTwoBlocks},
    QK_CASE(reads_others_through_l1, kTwoBlocks),
    QK_CASE(constant_path_sees_no_writes),
    QK_CASE(before_dependency_wait, kDependent),
    {"new_constants_before_dependency_wait", reads_constants_before_dependency_wait,
     reads_constants_before_dependency_wait, kNewConstants, kConstants},
    QK_CASE(no_dependency_wait, kDependent),
    QK_CASE(index_outside_of_an_array),
    QK_CASE(shared_past_the_end),
    QK_CASE(shared_unwritten),
    QK_CASE(read_after_write),
    QK_CASE(write_after_read),
    QK_CASE(write_after_write),
    QK_CASE(read_after_write_in_a_warp),
    QK_CASE(write_after_read_in_a_warp),
    QK_CASE(shuffle_is_no_barrier),
    QK_CASE(warp_sync_is_for_one_warp),
    QK_CASE(atomic_after_write),
    QK_CASE(read_after_atomic),
    QK_CASE(atomic_after_read),
    QK_CASE(shared_bytes_beside_each_other),
    QK_CASE(shared_misaligned),
    QK_CASE(copy_without_wait),
    QK_CASE(copy_waits_for_too_few),
    QK_CASE(copy_without_commit),
    QK_CASE(copy_without_barrier),
    QK_CASE(copy_into_what_is_read),
    QK_CASE(copy_of_too_much),
    QK_CASE(copy_of_a_part),
    QK_CASE(copy_misaligned),
    {"bulk_without_wait", bulk<Wrong::wait>, bulk<Wrong::nothing>},
    {"bulk_expects_too_much", bulk<Wrong::bytes>, bulk<Wrong::nothing>},
    {"bulk_expects_too_little", bulk<Wrong::more>, bulk<Wrong::nothing>},
    {"bulk_parity", bulk<Wrong::parity>, bulk<Wrong::nothing>},
    {"bulk_without_init", bulk<Wrong::init>, bulk<Wrong::nothing>},
    {"bulk_size", bulk<Wrong::size>, bulk<Wrong::nothing>},
    {"bulk_of_nothing", bulk<Wrong::empty>, bulk<Wrong::nothing>},
    {"bulk_address", bulk<Wrong::address>, bulk<Wrong::nothing>},
    {"bulk_init_seen_by_others", bulk<Wrong::sync>, bulk<Wrong::nothing>},
    {"bulk_expects_twice", bulk<Wrong::twice>, bulk<Wrong::nothing>},
    QK_CASE(bulk_into_what_is_read),
    QK_CASE(diverged_warp),
    QK_CASE(lanes_stay_away),
    QK_CASE(barrier_not_reached_by_all),
    QK_CASE(threads_leave_before_the_barrier),
    QK_CASE(rows_from_other_memory),
    {"too_much_shared_memory",
     nothing<true>,
     nothing<false>,
     {1, 32, (227 << 10) + 1},
     {1, 32, 227 << 10}},
    {"too_many_threads", nothing<true>, nothing<false>, {1, 1056}, {1, 1024}},
    {"no_blocks", nothing<true>, nothing<false>, {0, 32}, {1, 32}},
    {"a_part_of_a_warp", nothing<true>, nothing<false>, {1, 48}, {1, 64}},
};

std::string outcome(Kernel kernel, const Setup& setup) {
  struct Memory {  // no array lies beside another
    alignas(128) uint32_t in[kInts], gap1[kInts], out[kInts], gap2[kInts], kept[kInts];
  };
  static Memory m;
  for (int i = 0; i < kInts; i++) m.in[i] = 3, m.kept[i] = 0;
  emu::allow(m.in, sizeof m.in, setup.in);
  if (setup.new_constants) emu::expect_new_constants();
  emu::allow(m.kept, sizeof m.kept, emu::Use::write);
  emu::allow(m.out, sizeof m.out, emu::Use::write);
  emu::poison(m.out, sizeof m.out);
  emu::begin("test_op");
  std::string said;
  try {
    const auto start = [&](auto go) {
      return go(kernel, dim3(setup.blocks), dim3(setup.threads), setup.shared, nullptr,
                Arrays{m.in, m.out, m.kept});
    };
    const cudaError_t error = start(
        [&](auto... all) { return setup.dependent ? launch_dependent(all...) : launch(all...); });
    if (error != cudaSuccess) said = cudaGetErrorString(error);
  } catch (const std::runtime_error& e) {
    said = e.what();
  }
  emu::end();
  return said;
}

// ---- numbers ----

struct Product {
  const void *a, *b;  // [16, K] and [8, K]: K pairs of 16-bit floats or fours of bytes per word
  void* d;            // [16, 8]
  int kind;           // 0 float16, 1 bfloat16, 2 u8 s8, 3 s8 s8
};
void product(Product p) {
  const auto* a = static_cast<const uint32_t*>(p.a);
  const auto* b = static_cast<const uint32_t*>(p.b);
  const int g = me() / 4, t = me() % 4;
  const uint32_t fragment[4] = {a[8 * g + t], a[8 * (g + 8) + t], a[8 * g + t + 4],
                                a[8 * (g + 8) + t + 4]};
  const uint32_t b0 = b[8 * g + t], b1 = b[8 * g + t + 4];
  const auto run = [&](auto* d, auto multiply) {
    std::remove_pointer_t<decltype(d)> sums[4];
    for (int i = 0; i < 4; i++) sums[i] = d[8 * (g + 8 * (i / 2)) + 2 * t + i % 2];
    multiply(sums, fragment, b0, b1);
    for (int i = 0; i < 4; i++) d[8 * (g + 8 * (i / 2)) + 2 * t + i % 2] = sums[i];
  };
  auto* floats = static_cast<float*>(p.d);
  auto* ints = static_cast<int32_t*>(p.d);
  if (p.kind == 0) run(floats, mma_16816<half_t>);
  if (p.kind == 1) run(floats, mma_16816<bf16_t>);
  if (p.kind == 2) run(ints, mma_16832_u8s8);
  if (p.kind == 3) run(ints, mma_16832_s8s8);
}

void order_of_blocks(uint32_t* out) {
  if (me() == 0) out[count_around(out + 8, 100)] = blockIdx.x;
}

}  // namespace

extern "C" {
[[gnu::visibility("default")]] const char* case_name(int i) {
  return i < int(cases.size()) ? cases[size_t(i)].name : nullptr;
}
[[gnu::visibility("default")]] const char* case_outcome(int i, bool wrong) {
  static std::string said;
  const Case& c = cases[size_t(i)];
  said = wrong ? outcome(c.wrong, c.setup) : outcome(c.right, c.right_setup);
  return said.c_str();
}
[[gnu::visibility("default")]] void block_order(uint32_t* out /* [9] */) {
  emu::allow(out, 9 * 4, emu::Use::write);
  emu::begin("block_order");
  launch(order_of_blocks, dim3(8), dim3(32), 0, nullptr, out);
  emu::end();
}
[[gnu::visibility("default")]] int most_shared_memory() {
  const auto fits = [](size_t bytes) {
    return launch(nothing<false>, dim3(1), dim3(32), bytes, nullptr, Arrays{}) == cudaSuccess;
  };
  const int most = emu::limits().shared_per_block;
  return fits(size_t(most)) && !fits(size_t(most) + 1) ? most : -1;
}
[[gnu::visibility("default")]] void multiply(const void* a, const void* b, void* d, int kind) {
  emu::allow(a, 16 * 8 * 4, emu::Use::read);
  emu::allow(b, 8 * 8 * 4, emu::Use::read);
  emu::allow(d, 16 * 8 * 4, emu::Use::write);
  emu::begin("multiply");
  launch(product, dim3(1), dim3(32), 0, nullptr, Product{a, b, d, kind});
  emu::end();
}
[[gnu::visibility("default")]] void to_float(const uint16_t* in, float* out, int64_t n, bool bf16) {
  for (int64_t i = 0; i < n; i++)
    out[i] = bf16 ? emu::bf16_to_float(in[i]) : emu::half_to_float(in[i]);
}
[[gnu::visibility("default")]] void from_float(const float* in, uint16_t* out, int64_t n,
                                               bool bf16) {
  for (int64_t i = 0; i < n; i++)
    out[i] = bf16 ? emu::float_to_bf16(in[i]) : emu::float_to_half(in[i]);
}
[[gnu::visibility("default")]] void fma_pairs(const uint32_t* a, const uint32_t* b,
                                              const uint32_t* c, uint32_t* out, int64_t n,
                                              bool bf16) {
  for (int64_t i = 0; i < n; i++)
    out[i] = bf16 ? fma_pair<bf16_t>(a[i], b[i], c[i]) : fma_pair<half_t>(a[i], b[i], c[i]);
}
}

}  // namespace qk
