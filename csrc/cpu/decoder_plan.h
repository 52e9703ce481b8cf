// The program of decoder_step: its steps and registers, and the reader that checks every index,
// shape and width of it once. Included by decoder_step.cpp alone.
#pragma once
#include <algorithm>
#include <mutex>
#include <set>

#include "../check.h"
#include "../kv_cache.h"
#include "../linear_ops.h"
#include "steady_threads.h"
#include "team.h"

namespace qk {
namespace {

constexpr const char* kPlan = "decoder_plan";

enum Opcode : int64_t {
  kEmbed = 1,
  kNorm,
  kLinear,
  kKvAppend,
  kAttention,
  kGate,
  kSelect,
  kQuantize,
  kPermute,
  kInput,
  kOutput
};

// One step, decoded. Registers and tensors are indices, -1 where there is none.
struct Step {
  Opcode op;
  int dst = -1, src = -1, second = -1, third = -1;  // second: add, up or k; third: v
  Weight weight{};
  const float* vector = nullptr;  // norm weight
  const float* bias = nullptr;
  float number = 0, softcap = 0;  // multiplier, eps or attention scale
  int64_t heads = 0, kv_heads = 0, dim = 0, layer = 0, window = 0;
  bool center = false;
  Activation activation = Activation::silu;
  const float* rope = nullptr;
  int64_t rope_positions = 0;
  int rotary_dim = 0;
  std::vector<int32_t> order;  // permute: the column of src that goes to each of dst
  bool replicated = false;     // with a single token, every thread does it for itself
  bool sync_before[2] = {};    // [1]: with a single token
  bool own_rows = false;       // linear, with a single token: LinearArgs::own_rows
  int next_linear = -1;        // the linear that follows, if this is the first step before it
};

struct Register {
  int64_t width;
  int group;        // 0: float32; else int8 in groups of this many columns
  bool selected;    // one row per selected token instead of one per token
  bool replicated;  // a step of a single token keeps a copy per thread
  std::vector<float> values;
  std::vector<int8_t> codes;
  std::vector<float> scale;
  std::vector<int16_t> sums;

  int64_t kx() const { return layout::round_up(width, group); }
  // Elements from a thread's copy to the next; never on the same cache line.
  int64_t stride() const { return layout::round_up(group ? kx() : width, 64) + 64; }
  // Grows only, so that a decode step allocates nothing. At least one row: to a kernel, null means
  // an argument that is not there. copies: of a single row.
  void reserve(int64_t rows, int copies) {
    rows = std::max<int64_t>(rows, 1);
    const auto grow = [](auto& to, int64_t size) {
      if (int64_t(to.size()) < size) to.resize(size_t(size));
    };
    const int64_t replicas = replicated ? copies * stride() : 0;
    if (group == 0) return grow(values, std::max(rows * width, replicas));
    grow(codes, std::max(rows * kx(), replicas));
    grow(scale, std::max(rows * (kx() / group), replicas));
    grow(sums, std::max(rows * (kx() / 16), replicas));
  }
  float* values_at(int64_t at) { return values.data() + at; }
  QuantActOut act_at(int64_t at) {
    return {codes.data() + at, scale.data() + at, sums.data() + at, kx(), group};
  }
};

struct Plan {
  std::vector<std::optional<Tensor>> tensors;  // owned: the pointers in `steps` stay valid
  std::vector<Register> registers;
  std::vector<Step> steps;
  int64_t vocab = 0;                   // columns of the result
  int64_t vocab_in = 0, width_in = 0;  // of the table, or of the rows that come instead of ids
  int64_t layers = 0, kv_heads = 0, dim = 0;
  std::vector<char> scratch;
  SteadyThreads threads;
  std::mutex busy;  // registers are shared state: one step at a time
};

// Reads the integers of one program, checking every index.
class Decoder {
 public:
  Decoder(Plan& plan, const std::vector<int64_t>& code, const std::vector<double>& numbers)
      : plan_(plan), code_(code), numbers_(numbers) {}

  void run() {
    while (at_ < code_.size()) plan_.steps.push_back(step());
    check(!plan_.steps.empty() &&
              (plan_.steps.back().op == kLinear || plan_.steps.back().op == kOutput),
          kPlan, "the last step must be a linear (the head) or an output");
    const Step& last = plan_.steps.back();
    for (const Step& s : plan_.steps)
      check(s.op != kOutput || &s == &last, kPlan, "an output must be the last step");
    check(plan_.registers[size_t(last.op == kOutput ? last.dst : last.src)].selected, kPlan,
          "the head must read what select wrote: logits have a row per selected token");
    plan_.vocab = plan_.registers[size_t(last.dst)].width;
    replicate();
    for (bool one : {false, true}) place_barriers(one);
    find_linears();
  }

 private:
  int64_t next() {
    check(at_ < code_.size(), kPlan, "the program ends in the middle of a step");
    return code_[at_++];
  }
  // Numbers that are multiplied with others must not overflow.
  int64_t at_most(int64_t most, int64_t least, const char* what) {
    const int64_t value = next();
    check(value >= least && value <= most, kPlan, what, " must be from ", least, " to ", most,
          ", got ", value);
    return value;
  }
  float number() {
    const int64_t i = next();
    check(i >= 0 && i < int64_t(numbers_.size()), kPlan, "number ", i, " is not among the ",
          numbers_.size(), " given");
    return float(numbers_[size_t(i)]);
  }
  int reg(bool optional = false) {
    const int64_t i = next();
    if (optional && i == -1) return -1;
    check(i >= 0 && i < int64_t(plan_.registers.size()), kPlan, "register ", i,
          " is not among the ", plan_.registers.size(), " declared");
    return int(i);
  }
  const Tensor* tensor(bool optional = false) {
    const int64_t i = next();
    if (optional && i == -1) return nullptr;
    check(i >= 0 && i < int64_t(plan_.tensors.size()) && plan_.tensors[size_t(i)], kPlan, "tensor ",
          i, " is not among the ", plan_.tensors.size(), " given");
    return &*plan_.tensors[size_t(i)];
  }
  const float* vector(const char* name, int64_t width, bool optional = false) {
    const Tensor* t = tensor(optional);
    if (!t) return nullptr;
    expect(kPlan, name, *t, ScalarType::Float, {width});
    return data<float>(*t);
  }
  Weight weight() {
    const int64_t base = next(), bits = next(), group = next(), n = next(), k = next();
    check(base >= 0 && base <= int64_t(plan_.tensors.size()) - 6, kPlan, "a weight at tensor ",
          base, " needs six of the ", plan_.tensors.size(), " given");
    const auto* t = &plan_.tensors[size_t(base)];
    check(t[0] && t[1], kPlan, "a weight needs codes and scale");
    for (int i = 0; i < 6; i++) check(!t[i] || t[i]->is_cpu(), kPlan, "weights must be on the CPU");
    return make_weight(kPlan, *t[0], *t[1], t[2], t[3], t[4], t[5], bits, group, n, k);
  }
  void width_is(int r, int64_t width, const char* what) {
    check(plan_.registers[size_t(r)].width == width, kPlan, what, " must be ", width,
          " wide, got a register of ", plan_.registers[size_t(r)].width);
  }
  void is_float(int r, const char* what) {
    check(plan_.registers[size_t(r)].group == 0, kPlan, what, " must be a float register");
  }
  // The rows of dst are those of src.
  void follow(int dst, int src) {
    check(written_.count(src), kPlan, "register ", src, " is read before it is written");
    write(dst, plan_.registers[size_t(src)].selected);
  }
  // A register keeps its kind of rows: it is allocated once for all steps.
  void write(int dst, bool selected) {
    Register& r = plan_.registers[size_t(dst)];
    check(!written_.count(dst) || r.selected == selected, kPlan, "register ", dst,
          " is written before and after select");
    r.selected = selected;
    written_.insert(dst);
  }
  // Threads that are ahead write dst while others still read src.
  void differs(int dst, int src, const char* what) {
    check(dst != src, kPlan, what, " needs a register of its own, not that of its input");
  }
  void unselected(int r, const char* what) {
    check(!plan_.registers[size_t(r)].selected, kPlan, what, " must come before select");
  }

  Step step() {
    Step s{};
    const int64_t op = next();
    s.op = Opcode(op);
    switch (op) {
      case kEmbed:
        s.dst = reg(), s.weight = weight(), s.number = number();
        is_float(s.dst, "the embedding"), width_is(s.dst, s.weight.k, "the embedding");
        check(plan_.vocab_in == 0 && plan_.width_in == 0, kPlan,
              "a program has one embedding, or one input");
        plan_.vocab_in = s.weight.n;
        write(s.dst, false);
        break;
      case kInput:
        s.dst = reg();
        is_float(s.dst, "the input");
        check(plan_.vocab_in == 0 && plan_.width_in == 0, kPlan,
              "a program has one embedding, or one input");
        plan_.width_in = plan_.registers[size_t(s.dst)].width;
        write(s.dst, false);
        break;
      case kOutput: {
        s.dst = reg(), s.src = reg(), s.second = reg(true);
        const int64_t width = plan_.registers[size_t(s.src)].width;
        is_float(s.dst, "output"), is_float(s.src, "output"), width_is(s.dst, width, "output");
        check(written_.count(s.src), kPlan, "register ", s.src, " is read before it is written");
        unselected(s.src, "output"), differs(s.dst, s.src, "output");
        if (s.second >= 0)
          is_float(s.second, "output"), width_is(s.second, width, "output"),
              same_rows(s.second, s.src), differs(s.dst, s.second, "output");
        write(s.dst, true);
        break;
      }
      case kNorm: {
        s.dst = reg(), s.src = reg();
        const int64_t width = plan_.registers[size_t(s.src)].width;
        const size_t weight_at = at_;
        at_ += 2;  // the vectors are as wide as one head, which comes later
        s.second = reg(true), s.number = number(), s.center = next() != 0, s.heads = next();
        check(s.heads >= 0 && (s.heads == 0 || width % s.heads == 0), kPlan, "a row of ", width,
              " does not split into ", s.heads, " heads");
        const size_t end = at_;
        at_ = weight_at;
        const int64_t row = s.heads ? width / s.heads : width;
        s.vector = vector("norm weight", row), s.bias = vector("norm bias", row, true);
        at_ = end;
        is_float(s.src, "a norm's input"), width_is(s.dst, width, "a norm's output"),
            follow(s.dst, s.src);
        if (s.second >= 0)
          is_float(s.second, "a residual"), width_is(s.second, width, "a residual"),
              same_rows(s.second, s.src);
        check(!(s.heads && (plan_.registers[size_t(s.dst)].group || s.second >= 0)), kPlan,
              "a per-head norm has neither residual nor quantized output");
        break;
      }
      case kLinear: {
        s.dst = reg(), s.src = reg(), s.weight = weight(),
        s.bias = vector("bias", s.weight.n, true);
        is_float(s.dst, "a linear's output"), width_is(s.dst, s.weight.n, "a linear's output"),
            width_is(s.src, s.weight.k, "a linear's input");
        const int group = plan_.registers[size_t(s.src)].group;
        if (group) check_linear_groups(kPlan, s.weight.group, group);
        differs(s.dst, s.src, "a linear");
        follow(s.dst, s.src);
        break;
      }
      case kKvAppend: {
        s.dst = reg(), s.src = reg(), s.second = reg(), s.third = reg();
        cache_shape(s);
        if (const Tensor* rope = tensor(true)) {
          check(rope->dim() == 2 && rope->size(1) % 2 == 0 && rope->size(1) <= s.dim, kPlan,
                "rope must be [positions, rotary_dim], rotary_dim even and at most ", s.dim,
                ", got ", shape_of(*rope));
          expect(kPlan, "rope", *rope, ScalarType::Float, {-1, -1});
          s.rope = data<float>(*rope), s.rope_positions = rope->size(0),
          s.rotary_dim = int(rope->size(1));
        }
        for (int r : {s.dst, s.src, s.second, s.third}) is_float(r, "q, k and v");
        width_is(s.dst, s.heads * s.dim, "q"), width_is(s.src, s.heads * s.dim, "q");
        width_is(s.second, s.kv_heads * s.dim, "k"), width_is(s.third, s.kv_heads * s.dim, "v");
        follow(s.dst, s.src), same_rows(s.second, s.src), same_rows(s.third, s.src),
            unselected(s.src, "kv_append");
        for (int r : {s.src, s.second, s.third}) differs(s.dst, r, "kv_append");
        break;
      }
      case kAttention:
        s.dst = reg(), s.src = reg();
        cache_shape(s);
        s.number = number(), s.window = next(), s.softcap = number();
        check(s.window >= 0 && s.softcap >= 0, kPlan, "window and softcap must not be negative");
        is_float(s.dst, "attention's output"), is_float(s.src, "q");
        width_is(s.dst, s.heads * s.dim, "attention's output"),
            width_is(s.src, s.heads * s.dim, "q");
        differs(s.dst, s.src, "attention");
        follow(s.dst, s.src), unselected(s.src, "attention");
        break;
      case kGate: {
        s.dst = reg(), s.src = reg(), s.second = reg(true);
        const int64_t activation = next();
        check(activation >= 0 && activation <= int64_t(Activation::relu), kPlan, "activation ",
              activation, " is unknown");
        s.activation = Activation(activation);
        const int64_t width = plan_.registers[size_t(s.src)].width;
        is_float(s.src, "a gate"), width_is(s.dst, width, "a gate's output"), follow(s.dst, s.src);
        if (s.second >= 0)
          is_float(s.second, "up"), width_is(s.second, width, "up"), same_rows(s.second, s.src);
        break;
      }
      case kSelect:
        s.dst = reg(), s.src = reg();
        is_float(s.dst, "select"), is_float(s.src, "select"),
            width_is(s.dst, plan_.registers[size_t(s.src)].width, "select");
        check(written_.count(s.src), kPlan, "register ", s.src, " is read before it is written");
        unselected(s.src, "select"), differs(s.dst, s.src, "select"), write(s.dst, true);
        break;
      case kQuantize:
        s.dst = reg(), s.src = reg();
        is_float(s.src, "quantize"),
            width_is(s.dst, plan_.registers[size_t(s.src)].width, "quantize");
        check(plan_.registers[size_t(s.dst)].group > 0, kPlan,
              "quantize needs a quantized register");
        follow(s.dst, s.src);
        break;
      case kPermute: {
        s.dst = reg(), s.src = reg();
        const int64_t width = plan_.registers[size_t(s.src)].width;
        const Tensor* order = tensor();
        expect(kPlan, "a column order", *order, ScalarType::Long, {width});
        for (int64_t i = 0; i < width; i++) {
          const int64_t column = data<int64_t>(*order)[i];
          check(column >= 0 && column < width, kPlan, "a column order must be from 0 to ",
                width - 1, ", got ", column, " at ", i);
          s.order.push_back(int32_t(column));  // a copy: what was checked cannot change
        }
        is_float(s.dst, "permute"), is_float(s.src, "permute"), width_is(s.dst, width, "permute");
        differs(s.dst, s.src, "permute");
        follow(s.dst, s.src);
        break;
      }
      default: fail(kPlan, "step ", op, " is unknown");
    }
    return s;
  }

  void same_rows(int a, int b) {
    check(written_.count(a), kPlan, "register ", a, " is read before it is written");
    check(plan_.registers[size_t(a)].selected == plan_.registers[size_t(b)].selected, kPlan,
          "registers ", a, " and ", b, " have different rows");
  }

  void cache_shape(Step& s) {
    constexpr int64_t most = 1 << 20;  // far beyond any model
    s.layer = at_most(most, 0, "layer"), s.heads = at_most(most, 1, "q_heads"),
    s.kv_heads = at_most(most, 1, "kv_heads"), s.dim = at_most(kMaxHeadDim, 16, "head_dim");
    check(s.dim % 16 == 0, kPlan, "head_dim must be a multiple of 16, got ", s.dim);
    check(s.heads % s.kv_heads == 0, kPlan, "q_heads must be a multiple of kv_heads, got ", s.heads,
          " and ", s.kv_heads);
    if (plan_.dim == 0) plan_.kv_heads = s.kv_heads, plan_.dim = s.dim;
    check(plan_.kv_heads == s.kv_heads && plan_.dim == s.dim, kPlan,
          "all layers of one cache need the same kv_heads and head_dim");
    plan_.layers = std::max(plan_.layers, s.layer + 1);
  }

  // Registers that a step reads, and those that it writes. The cache counts as one register more,
  // and attention as a writer of it: two attentions must not share the counter that hands out their
  // work.
  struct Uses {
    std::set<int> in, out;
  };
  Uses uses(const Step& s) const {
    const int cache = int(plan_.registers.size());
    Uses u{{}, {s.dst}};
    for (int r : {s.src, s.second, s.third})
      if (r >= 0) u.in.insert(r);
    if (s.op == kNorm && s.second >= 0) u.out.insert(s.second);
    if (s.op == kKvAppend || s.op == kAttention) u.out.insert(cache);
    return u;
  }

  // With a single token, what one thread would do while the others wait is done by each for itself,
  // into registers of its own, if these are written by such steps alone.
  void replicate() {
    const auto cheap = [](Opcode op) {
      return op == kEmbed || op == kInput || op == kNorm || op == kSelect || op == kQuantize ||
             op == kPermute;
    };
    for (Register& r : plan_.registers) r.replicated = true;
    for (Step& s : plan_.steps) s.replicated = cheap(s.op);
    for (bool changed = true; changed;) {
      changed = false;
      for (Step& s : plan_.steps) {
        if (s.op == kLinear && &s == &plan_.steps.back()) continue;  // it writes the logits
        for (int r : uses(s).out) {
          if (r == int(plan_.registers.size())) continue;
          Register& written = plan_.registers[size_t(r)];
          if (!s.replicated && written.replicated) written.replicated = false, changed = true;
          if (s.replicated && !written.replicated) s.replicated = false, changed = true;
        }
      }
    }
  }

  // A barrier stands before a step that touches what another step since the last barrier wrote, or
  // writes what it read.
  void place_barriers(bool one) {
    std::set<int> read, written, by_linear;
    const auto meets = [](const std::set<int>& a, const std::set<int>& b) {
      return std::any_of(a.begin(), a.end(), [&](int r) { return b.count(r) > 0; });
    };
    const auto shared = [&](const std::set<int>& all) {
      std::set<int> kept;
      for (int r : all)
        if (!one || r == int(plan_.registers.size()) || !plan_.registers[size_t(r)].replicated)
          kept.insert(r);
      return kept;
    };
    for (size_t i = 0; i < plan_.steps.size(); i++) {
      Step& s = plan_.steps[i];
      const Uses all = uses(s);
      const std::set<int> in = shared(all.in), out = shared(all.out);
      // Such a gate's columns are dealt out as the rows of linears are (Team::share_rows): every
      // thread finds its own, if the linears kept to that.
      std::set<int> foreign = in;
      if (one && s.op == kGate && plan_.registers[size_t(s.dst)].group == kRowUnit)
        for (int r : by_linear) foreign.erase(r);
      s.sync_before[one] = meets(foreign, written) || meets(out, written) || meets(out, read);
      if (one && !s.sync_before[one] && foreign != in)
        for (size_t j = i; j-- > 0 && !plan_.steps[j + 1].sync_before[one];)
          plan_.steps[j].own_rows |= plan_.steps[j].op == kLinear && in.count(plan_.steps[j].dst);
      if (s.sync_before[one]) read.clear(), written.clear(), by_linear.clear();
      read.insert(in.begin(), in.end());
      written.insert(out.begin(), out.end());
      for (int r : out) {
        if (s.op == kLinear) by_linear.insert(r);
        else by_linear.erase(r);
      }
    }
  }

  void find_linears() {
    int first = 0;  // the step after the last linear
    for (int i = 0; i < int(plan_.steps.size()); i++) {
      if (plan_.steps[size_t(i)].op != kLinear) continue;
      plan_.steps[size_t(first)].next_linear = i;
      first = i + 1;
    }
  }

  Plan& plan_;
  const std::vector<int64_t>& code_;
  const std::vector<double>& numbers_;
  size_t at_ = 0;
  std::set<int> written_;
};

}  // namespace
}  // namespace qk
