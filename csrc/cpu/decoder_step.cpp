// A whole decode step, or one chunk of a prefill, in one call: the lowered steps of
// qkernels/nn/program.py, run by one team with the same kernels as the single ops. `decoder_plan`
// checks the program once and keeps the tensors alive; `decoder_step` only checks what changes from
// step to step.
#include <algorithm>
#include <chrono>
#include <map>
#include <memory>

#include "decoder_plan.h"
#include "run.h"
#include "weight_bytes.h"

namespace qk {
namespace {

constexpr const char* kStep = "decoder_step";
// Of the next weight, per thread, while it waits.
constexpr int64_t kUpcomingBytes = 128 << 10;

// Up to this many tokens in a step, its barriers are so close together that a thread which loses
// its core costs more than it does.
constexpr int64_t kFewTokens = 16;

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
    plan->registers.push_back(
        Register{registers[i], int(registers[i + 1]), false, false, {}, {}, {}, {}});
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
                                int64_t kv_heads, int64_t dim, const Tensor& ids) {
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
  p.first = make_pages(op, dim, first(k), first(v), ks, vs, "ids", ids, Pages::written);
  check(p.first.kv_heads == kv_heads, op, "k_pages must have ", kv_heads, " KV heads, got ",
        p.first.kv_heads);
  p.k_bytes = k.stride(0) * int64_t(k.element_size());
  p.v_bytes = v.stride(0) * int64_t(v.element_size());
  return p;
}

// What a step needs beyond the plan.
struct Inputs {
  const int64_t* ids;     // [T]; null for a program with an input
  const float* rows;      // [T, width_in] instead of ids
  const int64_t* select;  // [S] rows of the batch
  int64_t tokens, selected;
  Ragged batch;
  LayeredPages pages;
  float* logits;  // [S, vocab], the result

  bool one() const { return tokens == 1 && selected == 1; }
};

// Builds the argument structs of a step and hands them to `run(kernel args)`; used twice, to size
// the scratch and to run.
class Runner {
 public:
  Runner(Plan& plan, const Inputs& in, const Kernels& kernels)
      : plan_(plan), in_(in), k_(kernels) {}

  int64_t rows(int r) const { return reg(r).selected ? in_.selected : in_.tokens; }

  int64_t scratch_bytes(const Step& s, int team) const {
    if (s.op == kLinear) return layout::round_up(k_.linear_scratch(linear_args(s, 0), team), 64);
    if (s.op == kAttention)
      return layout::round_up(k_.attention_scratch(attention_args(s, 0), team), 64);
    return 0;
  }

  // What a thread of a single token's step reads first of the linear step `s`: as much as fits its
  // cache beside what it works on.
  Upcoming first_lines(const Step& s, const Team& team) const {
    const Range halves = team.share_rows(s.weight.n);
    const int64_t block = halves.begin / 2;
    Upcoming all = block_bytes(s.weight, block, (halves.end + 1) / 2 - block);
    for (int i = 0; i < 3; i++) {
      Upcoming::Part& part = all.parts[i];
      const int64_t most = i == 0 ? kUpcomingBytes : kUpcomingBytes / 8;
      if (part.end - part.at > most) part.end = part.at + most;
    }
    return all;
  }

  void operator()(const Step& s, char* scratch, Team& all) {
    const int rank = all.rank;
    Team alone{0, 1, all.barrier};
    Team& team = in_.one() && s.replicated ? alone : all;
    const auto values = [&](int r) { return this->values(r, rank); };
    switch (s.op) {
      case kEmbed:
        return k_.embedding({in_.ids, s.weight, values(s.dst), Dtype::f32, in_.tokens, s.number},
                            team);
      case kInput: {
        const int64_t width = reg(s.dst).width;
        const Range mine = team.share(in_.tokens * width);
        std::copy_n(in_.rows + mine.begin, mine.end - mine.begin, values(s.dst) + mine.begin);
        return;
      }
      case kOutput: {
        const int64_t width = reg(s.src).width;
        const Range mine = team.share(in_.selected * width);
        const float *x = values(s.src), *add = s.second >= 0 ? values(s.second) : nullptr;
        for (int64_t i = mine.begin; i < mine.end; i++) {
          const int64_t from = in_.select[i / width] * width + i % width;
          in_.logits[i] = add ? x[from] + add[from] : x[from];
        }
        return;
      }
      case kNorm: {
        NormArgs a{};
        const int64_t heads = s.heads ? s.heads : 1, width = reg(s.src).width / heads;
        a.x = values(s.src), a.weight = s.vector, a.bias = s.bias, a.type = Dtype::f32;
        a.m = rows(s.src) * heads, a.k = width, a.x_stride = a.residual_stride = width;
        a.eps = s.number, a.center = s.center;
        if (s.second >= 0) a.residual = values(s.second), a.sum = values(s.second);
        if (reg(s.dst).group) a.act = act_out(s.dst, rank);
        else a.y = values(s.dst);
        return k_.norm(a, team);
      }
      case kLinear: return k_.linear(linear_args(s, rank), scratch, team);
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
      case kAttention: return k_.attention(attention_args(s, rank), scratch, team);
      case kGate: {
        GateArgs a{};
        a.gate = values(s.src), a.up = s.second >= 0 ? values(s.second) : nullptr,
        a.type = Dtype::f32;
        a.m = rows(s.src), a.k = a.gate_stride = a.up_stride = reg(s.src).width,
        a.activation = s.activation;
        if (reg(s.dst).group) a.act = act_out(s.dst, rank);
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
                                reg(s.src).width, act_out(s.dst, rank)},
                               team);
      case kPermute: {
        const int64_t width = reg(s.src).width;
        const Range mine = team.share(rows(s.src) * width);
        const float* x = values(s.src);
        float* y = values(s.dst);
        for (int64_t i = mine.begin; i < mine.end; i++)
          y[i] = x[i / width * width + s.order[size_t(i % width)]];
        return;
      }
    }
  }

 private:
  const Register& reg(int r) const { return plan_.registers[size_t(r)]; }
  // Where the copy of a thread begins.
  int64_t copy(int r, int rank) const {
    return in_.one() && reg(r).replicated ? rank * reg(r).stride() : 0;
  }
  float* values(int r, int rank) const {
    return plan_.registers[size_t(r)].values_at(copy(r, rank));
  }
  QuantActOut act_out(int r, int rank) const {
    return plan_.registers[size_t(r)].act_at(copy(r, rank));
  }
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
  LinearArgs linear_args(const Step& s, int rank) const {
    LinearArgs a{};
    a.w = s.weight;
    if (reg(s.src).group) {
      const QuantActOut act = act_out(s.src, rank);
      a.act = {act.codes, act.scale, act.sums, act.kx, act.group};
    } else {
      a.x = values(s.src, rank), a.x_type = Dtype::f32, a.x_stride = reg(s.src).width;
    }
    a.bias = s.bias, a.y_type = Dtype::f32, a.m = rows(s.src), a.y_stride = s.weight.n;
    const bool head = &s == &plan_.steps.back();
    a.y = head ? in_.logits : values(s.dst, rank);
    a.own_rows = in_.one() && s.own_rows;
    return a;
  }
  AttentionArgs attention_args(const Step& s, int rank) const {
    AttentionArgs a{};
    a.q = values(s.src, rank), a.out = values(s.dst, rank), a.type = Dtype::f32,
    a.q_stride = s.heads * s.dim, a.q_heads = s.heads;
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
// ids [T] int64, or for a program with an input its rows [T, width] float32; select [S] int64,
// pages [layers, P, Hkv, page, D] -> logits, or the rows of an output, [S, vocab] float32.
Tensor decoder_step(int64_t handle, const Tensor& ids, const Tensor& query_start,
                    const Tensor& kv_len, const Tensor& page_table, const Tensor& select,
                    int64_t vocab, const Tensor& k_pages, const Tensor& v_pages,
                    const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale) {
  const auto plan = find_plan(handle);
  std::lock_guard<std::mutex> lock(plan->busy);
  check(vocab == plan->vocab, kStep, "vocab must be ", plan->vocab, ", got ", vocab);
  if (plan->width_in) expect(kStep, "ids", ids, ScalarType::Float, {-1, plan->width_in});
  else expect(kStep, "ids", ids, ScalarType::Long, {-1});
  expect(kStep, "select", select, ScalarType::Long, {-1});
  Inputs in{};
  in.tokens = ids.size(0), in.selected = select.size(0);
  in.select = data<int64_t>(select);
  if (plan->width_in) in.rows = data<float>(ids);
  else in.ids = data<int64_t>(ids);
  for (int64_t i = 0; in.ids && i < in.tokens; i++)
    check(in.ids[i] >= 0 && in.ids[i] < plan->vocab_in, kStep, "token id ", in.ids[i],
          " at position ", i, " is outside the vocabulary of ", plan->vocab_in);
  for (int64_t i = 0; i < in.selected; i++)
    check(in.select[i] >= 0 && in.select[i] < in.tokens, kStep, "select[", i, "] = ", in.select[i],
          " is not a row of the ", in.tokens, " tokens");
  in.pages = make_layered_pages(kStep, k_pages, v_pages, k_scale, v_scale, plan->layers,
                                plan->kv_heads, plan->dim, ids);
  in.batch = make_ragged(kStep, in.tokens, in.pages.first, query_start, kv_len, page_table, "ids",
                         ids, Contents::checked);
  for (const Step& s : plan->steps)
    if (s.op == kKvAppend && s.rope)
      for (int64_t b = 0; b < in.batch.batch; b++)
        check(in.batch.kv_len[b] <= s.rope_positions, kStep, "sequence ", b, " has ",
              in.batch.kv_len[b], " tokens, rope has ", s.rope_positions, " positions");

  const Tensor logits = empty_on(ids, {in.selected, vocab}, ScalarType::Float);
  in.logits = mutable_data<float>(logits);
  if (in.tokens == 0) return logits;
  const bool few = in.tokens <= kFewTokens;
  const int size = few ? plan->threads.count(team_size()) : team_size();
  for (Register& r : plan->registers)
    r.reserve(r.selected ? in.selected : in.tokens, in.one() ? size : 1);

  Runner run(*plan, in, kernels());
  // Steps between two barriers run side by side, so each has its own part of the scratch.
  std::vector<int64_t> offset(plan->steps.size());
  int64_t used = 0, most = 0;
  for (size_t i = 0; i < plan->steps.size(); i++) {
    if (plan->steps[i].sync_before[in.one()]) used = 0;
    offset[i] = used;
    used += run.scratch_bytes(plan->steps[i], size);
    most = std::max(most, used);
  }
  if (int64_t(plan->scratch.size()) < most + 64) plan->scratch.resize(size_t(most + 64));
  char* scratch = reinterpret_cast<char*>(
      layout::round_up(reinterpret_cast<intptr_t>(plan->scratch.data()), 64));
  const auto start = std::chrono::steady_clock::now();
  const int64_t slept = run_team(size, [&](Team& team) {
    for (size_t i = 0; i < plan->steps.size(); i++) {
      const Step& s = plan->steps[i];
      if (in.one() && s.next_linear >= 0)
        team.upcoming = run.first_lines(plan->steps[size_t(s.next_linear)], team);
      if (s.sync_before[in.one()]) team.sync();
      run(s, scratch + offset[i], team);
    }
  });
  const std::chrono::nanoseconds took = std::chrono::steady_clock::now() - start;
  if (few) plan->threads.ran(SteadyThreads::stalled(slept, took.count()));
  return logits;
}

STABLE_TORCH_LIBRARY_IMPL(QK_OPS, CompositeExplicitAutograd, m) {
  m.impl("decoder_plan", TORCH_BOX(&decoder_plan));
  m.impl("decoder_plan_free", TORCH_BOX(&decoder_plan_free));
}
STABLE_TORCH_LIBRARY_IMPL(QK_OPS, CPU, m) { m.impl("decoder_step", TORCH_BOX(&decoder_step)); }

}  // namespace
}  // namespace qk
