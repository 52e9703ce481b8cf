// A whole decode step, or one chunk of a prefill, in one call: the lowered steps of
// qkernels/nn/program.py, run by one team with the same kernels as the single ops. `decoder_plan`
// checks the program once and keeps the tensors alive; `decoder_step` only checks what changes from
// step to step.
#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <set>

#include "../check.h"
#include "attention.h"
#include "linear.h"
#include "run.h"

namespace qk {
namespace {

constexpr const char* kPlan = "decoder_plan";
constexpr const char* kStep = "decoder_step";

enum Opcode : int64_t {
  kEmbed = 1,
  kNorm,
  kLinear,
  kKvAppend,
  kAttention,
  kGate,
  kSelect,
  kQuantize
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
  bool sync_before = false;
};

struct Register {
  int64_t width;
  int group;      // 0: float32; else int8 in groups of this many columns
  bool selected;  // one row per selected token instead of one per token
  std::vector<float> values;
  std::vector<int8_t> codes;
  std::vector<float> scale;
  std::vector<int16_t> sums;

  int64_t kx() const { return layout::round_up(width, group); }
  // Grows only, so that a decode step allocates nothing. At least one row: to a kernel, null means
  // an argument that is not there.
  void reserve(int64_t rows) {
    rows = std::max<int64_t>(rows, 1);
    if (group == 0) {
      if (int64_t(values.size()) < rows * width) values.resize(size_t(rows * width));
      return;
    }
    if (int64_t(codes.size()) < rows * kx()) {
      codes.resize(size_t(rows * kx()));
      scale.resize(size_t(rows * (kx() / group)));
      sums.resize(size_t(rows * (kx() / 16)));
    }
  }
  QuantAct act() const { return {codes.data(), scale.data(), sums.data(), kx(), group}; }
  QuantActOut act_out() { return {codes.data(), scale.data(), sums.data(), kx(), group}; }
};

struct Plan {
  std::vector<std::optional<Tensor>> tensors;  // owned: the pointers in `steps` stay valid
  std::vector<Register> registers;
  std::vector<Step> steps;
  int64_t vocab = 0, vocab_in = 0, layers = 0, kv_heads = 0, dim = 0;
  std::vector<char> scratch;
  std::mutex busy;  // registers are shared state: one step at a time
};

std::mutex g_plans_mutex;
std::map<int64_t, std::shared_ptr<Plan>>& plans() {
  static auto* all =
      new std::map<int64_t, std::shared_ptr<Plan>>;  // never destroyed: torch may be gone by then
  return *all;
}

std::shared_ptr<Plan> find_plan(int64_t handle) {
  std::lock_guard<std::mutex> lock(g_plans_mutex);
  auto found = plans().find(handle);
  check(found != plans().end(), kStep, "plan ", handle,
        " does not exist; make one with decoder_plan");
  return found->second;
}

// Reads the integers of one program, checking every index.
class Decoder {
 public:
  Decoder(Plan& plan, const std::vector<int64_t>& code, const std::vector<double>& numbers)
      : plan_(plan), code_(code), numbers_(numbers) {}

  void run() {
    while (at_ < code_.size()) plan_.steps.push_back(step());
    check(!plan_.steps.empty() && plan_.steps.back().op == kLinear, kPlan,
          "the last step must be a linear (the head)");
    check(plan_.registers[size_t(plan_.steps.back().src)].selected, kPlan,
          "the head must read what select wrote: logits have a row per selected token");
    plan_.vocab = plan_.steps.back().weight.n;
    place_barriers();
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
        check(plan_.vocab_in == 0, kPlan, "a program has one embedding");
        plan_.vocab_in = s.weight.n;
        write(s.dst, false);
        break;
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
        check_linear_weight(kPlan, s.weight);
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

  // A barrier stands before a step that touches what another step since the last barrier wrote, or
  // writes what it read. The cache counts as one register more, and attention as a writer of it:
  // two attentions must not share the counter that hands out their work.
  void place_barriers() {
    const int cache = int(plan_.registers.size());
    std::set<int> read, written;
    for (Step& s : plan_.steps) {
      std::set<int> in, out{s.dst};
      for (int r : {s.src, s.second, s.third})
        if (r >= 0) in.insert(r);
      if (s.op == kNorm && s.second >= 0) out.insert(s.second);
      if (s.op == kKvAppend || s.op == kAttention) out.insert(cache);
      const auto meets = [](const std::set<int>& a, const std::set<int>& b) {
        return std::any_of(a.begin(), a.end(), [&](int r) { return b.count(r) > 0; });
      };
      s.sync_before = meets(in, written) || meets(out, written) || meets(out, read);
      if (s.sync_before) read.clear(), written.clear();
      read.insert(in.begin(), in.end());
      written.insert(out.begin(), out.end());
    }
  }

  Plan& plan_;
  const std::vector<int64_t>& code_;
  const std::vector<double>& numbers_;
  size_t at_ = 0;
  std::set<int> written_;
};

// decoder_plan(Tensor?[] tensors, int[] registers, int[] code, float[] numbers) -> int
int64_t decoder_plan(const std::vector<std::optional<Tensor>>& tensors,
                     std::vector<int64_t> registers, std::vector<int64_t> code,
                     std::vector<double> numbers) {
  auto plan = std::make_shared<Plan>();
  plan->tensors = tensors;
  check(registers.size() % 2 == 0, kPlan, "registers must be pairs of width and group");
  for (const auto& t : tensors) check(!t || t->is_cpu(), kPlan, "tensors must be on the CPU");
  for (size_t i = 0; i < registers.size(); i += 2) {
    check(registers[i] > 0 && registers[i] <= kMaxSize && registers[i + 1] >= 0 &&
              registers[i + 1] <= kMaxGroup && registers[i + 1] % 16 == 0,
          kPlan, "register ", i / 2, " needs a width from 1 to ", kMaxSize,
          " and a group of 0 or a multiple of 16 up to ", kMaxGroup, ", got ", registers[i],
          " and ", registers[i + 1]);
    plan->registers.push_back(Register{registers[i], int(registers[i + 1]), false, {}, {}, {}, {}});
  }
  Decoder(*plan, code, numbers).run();
  std::lock_guard<std::mutex> lock(g_plans_mutex);
  static int64_t count = 0;
  plans()[++count] = plan;
  return count;
}

void decoder_plan_free(int64_t handle) {
  std::lock_guard<std::mutex> lock(g_plans_mutex);
  plans().erase(handle);
}

// Pages of all layers, k and v [L, P, Hkv, page, D]: those of layer 0, and how far apart layers are
// (bytes for k and v, elements for scales).
struct LayeredPages {
  KvPages first;
  int64_t k_bytes, v_bytes, k_scale_elements, v_scale_elements;
};
LayeredPages make_layered_pages(const char* op, const Tensor& k, const Tensor& v,
                                const std::optional<Tensor>& k_scale,
                                const std::optional<Tensor>& v_scale, int64_t layers,
                                int64_t kv_heads, int64_t dim) {
  const auto check_layers = [&](const char* name, const Tensor& t, const char* shape) {
    check(t.dim() == 5 && t.size(0) >= layers && t.size(0) == k.size(0), op, name,
          " must be [layers >= ", layers, ", ", shape, "], got ", shape_of(t));
  };
  check_layers("k_pages", k, "P, Hkv, page, D");
  check_layers("v_pages", v, "P, Hkv, page, D");
  const auto first = [](const Tensor& t) { return torch::stable::select(t, 0, 0); };
  LayeredPages p{};
  std::optional<Tensor> ks, vs;
  if (k_scale && v_scale) {
    check_layers("k_scale", *k_scale, "P, Hkv, 2, page");
    check_layers("v_scale", *v_scale, "P, Hkv, 2, page");
    ks = first(*k_scale), vs = first(*v_scale);
    p.k_scale_elements = k_scale->stride(0), p.v_scale_elements = v_scale->stride(0);
  }
  check(k_scale.has_value() == v_scale.has_value(), op, "k_scale and v_scale go together");
  p.first = make_pages(op, dim, first(k), first(v), ks, vs);
  check(p.first.kv_heads == kv_heads, op, "k_pages must have ", kv_heads, " KV heads, got ",
        p.first.kv_heads);
  p.k_bytes = k.stride(0) * int64_t(k.element_size());
  p.v_bytes = v.stride(0) * int64_t(v.element_size());
  return p;
}

// What a step needs beyond the plan.
struct Inputs {
  const int64_t* ids;     // [T]
  const int64_t* select;  // [S] rows of the batch
  int64_t tokens, selected;
  Ragged batch;
  LayeredPages pages;
  float* logits;  // [S, vocab]
};

// Builds the argument structs of a step and hands them to `run(kernel args)`; used twice, to size
// the scratch and to run.
class Runner {
 public:
  Runner(Plan& plan, const Inputs& in, const Kernels& kernels)
      : plan_(plan), in_(in), k_(kernels) {}

  int64_t rows(int r) const { return reg(r).selected ? in_.selected : in_.tokens; }

  int64_t scratch_bytes(const Step& s, int team) const {
    if (s.op == kLinear) return layout::round_up(k_.linear_scratch(linear_args(s), team), 64);
    if (s.op == kAttention)
      return layout::round_up(k_.attention_scratch(attention_args(s), team), 64);
    return 0;
  }

  void operator()(const Step& s, char* scratch, Team& team) {
    switch (s.op) {
      case kEmbed:
        return k_.embedding({in_.ids, s.weight, values(s.dst), Dtype::f32, in_.tokens, s.number},
                            team);
      case kNorm: {
        NormArgs a{};
        const int64_t heads = s.heads ? s.heads : 1, width = reg(s.src).width / heads;
        a.x = values(s.src), a.weight = s.vector, a.bias = s.bias, a.type = Dtype::f32;
        a.m = rows(s.src) * heads, a.k = width, a.x_stride = a.residual_stride = width;
        a.eps = s.number, a.center = s.center;
        if (s.second >= 0) a.residual = values(s.second), a.sum = values(s.second);
        if (reg(s.dst).group) a.act = plan_.registers[size_t(s.dst)].act_out();
        else a.y = values(s.dst);
        return k_.norm(a, team);
      }
      case kLinear: return k_.linear(linear_args(s), scratch, team);
      case kKvAppend: {
        KvAppendArgs a{};
        a.q = values(s.src), a.k = values(s.second), a.v = values(s.third), a.q_out = values(s.dst),
        a.type = Dtype::f32;
        a.q_stride = s.heads * s.dim, a.k_stride = a.v_stride = s.kv_heads * s.dim,
        a.q_heads = s.heads;
        a.rope = s.rope, a.rope_positions = s.rope_positions, a.rotary_dim = s.rotary_dim;
        a.pages = pages(s.layer), a.batch = in_.batch;
        return k_.kv_append(a, team);
      }
      case kAttention: return k_.attention(attention_args(s), scratch, team);
      case kGate: {
        GateArgs a{};
        a.gate = values(s.src), a.up = s.second >= 0 ? values(s.second) : nullptr,
        a.type = Dtype::f32;
        a.m = rows(s.src), a.k = a.gate_stride = a.up_stride = reg(s.src).width,
        a.activation = s.activation;
        if (reg(s.dst).group) a.act = plan_.registers[size_t(s.dst)].act_out();
        else a.y = values(s.dst);
        return k_.gate(a, team);
      }
      case kSelect: {
        const int64_t width = reg(s.src).width;
        const Range mine = team.share(in_.selected);
        for (int64_t i = mine.begin; i < mine.end; i++)
          std::copy_n(values(s.src) + in_.select[i] * width, width, values(s.dst) + i * width);
        return;
      }
      case kQuantize:
        return k_.quantize_act({values(s.src), Dtype::f32, rows(s.src), reg(s.src).width,
                                reg(s.src).width, plan_.registers[size_t(s.dst)].act_out()},
                               team);
    }
  }

 private:
  const Register& reg(int r) const { return plan_.registers[size_t(r)]; }
  float* values(int r) const { return plan_.registers[size_t(r)].values.data(); }
  KvPages pages(int64_t layer) const {
    KvPages p = in_.pages.first;
    p.k = static_cast<char*>(p.k) + layer * in_.pages.k_bytes;
    p.v = static_cast<char*>(p.v) + layer * in_.pages.v_bytes;
    if (p.k_scale) {
      p.k_scale += layer * in_.pages.k_scale_elements;
      p.v_scale += layer * in_.pages.v_scale_elements;
    }
    return p;
  }
  LinearArgs linear_args(const Step& s) const {
    LinearArgs a{};
    a.w = s.weight;
    if (reg(s.src).group) a.act = reg(s.src).act();
    else a.x = values(s.src), a.x_type = Dtype::f32, a.x_stride = reg(s.src).width;
    a.bias = s.bias, a.y_type = Dtype::f32, a.m = rows(s.src), a.y_stride = s.weight.n;
    const bool head = &s == &plan_.steps.back();
    a.y = head ? in_.logits : values(s.dst);
    return a;
  }
  AttentionArgs attention_args(const Step& s) const {
    AttentionArgs a{};
    a.q = values(s.src), a.out = values(s.dst), a.type = Dtype::f32, a.q_stride = s.heads * s.dim,
    a.q_heads = s.heads;
    a.scale = s.number, a.causal = true, a.window = s.window, a.softcap = s.softcap;
    a.pages = pages(s.layer), a.batch = in_.batch;
    return a;
  }

  Plan& plan_;
  const Inputs& in_;
  const Kernels& k_;
};

// decoder_step(int plan, Tensor ids, Tensor query_start, Tensor kv_len, Tensor page_table, Tensor
// select, int vocab,
//              Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor(c!)? k_scale, Tensor(d!)? v_scale) ->
//              Tensor
// ids [T] int64, select [S] int64, pages [layers, P, Hkv, page, D] -> logits [S, vocab] float32.
Tensor decoder_step(int64_t handle, const Tensor& ids, const Tensor& query_start,
                    const Tensor& kv_len, const Tensor& page_table, const Tensor& select,
                    int64_t vocab, const Tensor& k_pages, const Tensor& v_pages,
                    const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale) {
  const auto plan = find_plan(handle);
  std::lock_guard<std::mutex> lock(plan->busy);
  check(vocab == plan->vocab, kStep, "vocab must be ", plan->vocab, ", got ", vocab);
  expect(kStep, "ids", ids, ScalarType::Long, {-1});
  expect(kStep, "select", select, ScalarType::Long, {-1});
  Inputs in{};
  in.tokens = ids.size(0), in.selected = select.size(0);
  in.ids = data<int64_t>(ids), in.select = data<int64_t>(select);
  for (int64_t i = 0; i < in.tokens; i++)
    check(in.ids[i] >= 0 && in.ids[i] < plan->vocab_in, kStep, "token id ", in.ids[i],
          " at position ", i, " is outside the vocabulary of ", plan->vocab_in);
  for (int64_t i = 0; i < in.selected; i++)
    check(in.select[i] >= 0 && in.select[i] < in.tokens, kStep, "select[", i, "] = ", in.select[i],
          " is not a row of the ", in.tokens, " tokens");
  in.pages = make_layered_pages(kStep, k_pages, v_pages, k_scale, v_scale, plan->layers,
                                plan->kv_heads, plan->dim);
  in.batch = make_ragged(kStep, in.tokens, in.pages.first, query_start, kv_len, page_table);
  for (const Step& s : plan->steps)
    if (s.op == kKvAppend && s.rope)
      for (int64_t b = 0; b < in.batch.batch; b++)
        check(in.batch.kv_len[b] <= s.rope_positions, kStep, "sequence ", b, " has ",
              in.batch.kv_len[b], " tokens, rope has ", s.rope_positions, " positions");

  const Tensor logits = torch::stable::new_empty(ids, {in.selected, vocab}, ScalarType::Float);
  in.logits = mutable_data<float>(logits);
  if (in.tokens == 0) return logits;
  for (Register& r : plan->registers) r.reserve(r.selected ? in.selected : in.tokens);

  const int size = team_size();
  Runner run(*plan, in, kernels());
  // Steps between two barriers run side by side, so each has its own part of the scratch.
  std::vector<int64_t> offset(plan->steps.size());
  int64_t used = 0, most = 0;
  for (size_t i = 0; i < plan->steps.size(); i++) {
    if (plan->steps[i].sync_before) used = 0;
    offset[i] = used;
    used += run.scratch_bytes(plan->steps[i], size);
    most = std::max(most, used);
  }
  if (int64_t(plan->scratch.size()) < most + 64) plan->scratch.resize(size_t(most + 64));
  char* scratch = reinterpret_cast<char*>(
      layout::round_up(reinterpret_cast<intptr_t>(plan->scratch.data()), 64));
  run_team(size, [&](Team& team) {
    for (size_t i = 0; i < plan->steps.size(); i++) {
      if (plan->steps[i].sync_before) team.sync();
      run(plan->steps[i], scratch + offset[i], team);
    }
  });
  return logits;
}

STABLE_TORCH_LIBRARY_IMPL(QK_OPS, CompositeExplicitAutograd, m) {
  m.impl("decoder_plan", TORCH_BOX(&decoder_plan));
  m.impl("decoder_plan_free", TORCH_BOX(&decoder_plan_free));
}
STABLE_TORCH_LIBRARY_IMPL(QK_OPS, CPU, m) { m.impl("decoder_step", TORCH_BOX(&decoder_step)); }

}  // namespace
}  // namespace qk
