// Tensors in, argument structs out: the metadata checks of the C++ side. Messages name the op, the
// argument, what was expected and what came. Everything is validated before torch is asked for
// anything, because a failure inside torch's stable shim loses its message.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "args.h"
#include "layout.h"
#ifdef QK_EMULATE_CUDA
#include "emu/emu.h"
#endif

// The namespace of the ops; the test builds that emulate AVX-512 or a GPU use others.
#ifndef QK_OPS
#define QK_OPS qkernels
#endif

namespace qk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// STD_TORCH_CHECK would prefix file and line; users get the sentence alone.
template <class... Parts>
[[noreturn]] inline void fail(const char* op, const Parts&... parts) {
#ifdef QK_EMULATE_CUDA
  emu::forget();
#endif
  std::ostringstream out;
  out << "qkernels::" << op << ": ";
  (out << ... << parts);
  throw std::runtime_error(out.str());
}
template <class... Parts>
inline void check(bool ok, const char* op, const Parts&... parts) {
  if (!ok) fail(op, parts...);
}

// As PyTorch writes it in Python, so that these messages and those of qkernels/ops/checks.py are
// the same.
inline const char* type_name(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Double: return "float64";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    case ScalarType::Float8_e8m0fnu: return "float8_e8m0fnu";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    default: return torch::headeronly::toString(t);
  }
}

// A tensor's shape in a message. It is put into words where a check fails, not wherever one is
// made.
struct ShapeOf {
  const Tensor& tensor;
};
inline ShapeOf shape_of(const Tensor& t) { return {t}; }
inline std::ostream& operator<<(std::ostream& out, const ShapeOf& shape) {
  out << "[";
  for (int64_t i = 0; i < shape.tensor.dim(); i++) out << (i ? ", " : "") << shape.tensor.size(i);
  return out << "]";
}

inline Dtype float_type(const char* op, const char* name, ScalarType t) {
  switch (t) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::Half: return Dtype::f16;
    case ScalarType::BFloat16: return Dtype::bf16;
    default: fail(op, name, " must be float32, float16 or bfloat16, got ", type_name(t));
  }
}

// t has this dtype and is contiguous; sizes are checked where they are given (-1: any).
inline void expect(const char* op, const char* name, const Tensor& t, ScalarType type,
                   std::initializer_list<int64_t> sizes) {
  check(t.scalar_type() == type, op, name, " must be ", type_name(type), ", got ",
        type_name(t.scalar_type()));
  bool same = t.dim() == int64_t(sizes.size());
  for (int64_t i = 0; same && i < t.dim(); i++) {
    const int64_t size = sizes.begin()[i];
    same = size < 0 || t.size(i) == size;
  }
  if (!same) {
    std::ostringstream want;
    want << "[";
    for (const char* between = ""; const int64_t size : sizes) {
      want << between;
      if (size < 0) want << "*";
      else want << size;
      between = ", ";
    }
    want << "]";
    fail(op, name, " must be ", want.str(), ", got ", shape_of(t));
  }
  check(t.is_contiguous(), op, name, " must be contiguous; call .contiguous() on it");
}

inline std::string device_name(const Tensor& t) {
  return t.is_cpu()    ? "cpu"
         : t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index())
                       : "another device";
}
inline bool on_one_device(const Tensor& a, const Tensor& b) {
  // Not Tensor::device(), whose conversions add 0.3 us to a call of linear, which takes 10.
  int32_t type_a, type_b;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(a.get(), &type_a));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(b.get(), &type_b));
  if (type_a != type_b) return false;
  return type_a == aoti_torch_device_type_cpu() || a.get_device_index() == b.get_device_index();
}
// The dispatcher goes by all tensors together: a kernel for CUDA may be handed one that is on the
// CPU.
inline void same_device(const char* op, const char* name, const Tensor& t, const char* first,
                        const Tensor& like) {
  if (!on_one_device(t, like))
    fail(op, name, " is on ", device_name(t), ", but ", first, " is on ", device_name(like));
}
inline void same_device(const char* op, const char* name, const std::optional<Tensor>& t,
                        const char* first, const Tensor& like) {
  if (t) same_device(op, name, *t, first, like);
}

// A dense tensor on the device of `like`, of its type unless another is given; nothing is written
// into it. Not torch::stable::new_empty, which the dispatcher and autograd look at first: that
// takes a fifth of a call that decodes one token.
inline Tensor empty_on(const Tensor& like, std::initializer_list<int64_t> sizes,
                       std::optional<ScalarType> type = std::nullopt) {
  std::array<int64_t, 4> strides;
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes.begin()[i], 1))
    strides.at(i) = stride;
  int32_t dtype, device;
  if (type) dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*type));
  else STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.begin(),
                                                         strides.data(), dtype, device,
                                                         like.get_device_index(), &made));
  return Tensor(made);
}

// Whether the host checks what tensors hold (ids, probabilities) and not just what they are. It
// reads the CPU's memory at once; on an accelerator it would wait for everything that is queued.
enum class Contents { checked, unchecked };

// [..., D] rows: the last dimension dense, rows a constant stride apart. Returns that stride in
// elements.
inline int64_t row_stride(const char* op, const char* name, const Tensor& t) {
  check(t.dim() == 2, op, name, " must have 2 dimensions, got ", shape_of(t));
  if (t.size(0) <= 1) {
    check(t.size(1) <= 1 || t.stride(1) == 1, op, name, " must be dense in its last dimension");
    return t.size(1);
  }
  check(t.size(1) <= 1 || t.stride(1) == 1, op, name, " must be dense in its last dimension");
  return t.stride(0);
}

// Upper bounds of what is multiplied before a tensor's shape is there to bound it. Groups and sizes
// below these make no product overflow.
constexpr int64_t kMaxGroup = 1 << 30;
constexpr int64_t kMaxSize = INT32_MAX;

inline void check_group(const char* op, const char* name, int64_t group) {
  check(group >= 16 && group % 16 == 0, op, name, " must be a positive multiple of 16, got ",
        group);
  check(group <= kMaxGroup, op, name, " must be at most ", kMaxGroup, ", got ", group);
}
inline void check_sizes(const char* op, int64_t n, int64_t k) {
  check(n > 0 && k > 0, op, "a weight needs n > 0 and k > 0, got n = ", n, ", k = ", k);
  check(n <= kMaxSize && k <= kMaxSize, op, "a weight has at most ", kMaxSize,
        " rows and columns, got n = ", n, ", k = ", k);
}

#ifdef QK_EMULATE_CUDA
// Device code in tests may touch what it was given and nothing else. An output is poisoned.
enum class Hand { read, constant, inplace, output };
inline void hand_over(const Tensor& t, Hand as) {
  if (t.numel() == 0) return;
  int64_t last = 0;
  for (int64_t i = 0; i < t.dim(); i++) last += (t.size(i) - 1) * t.stride(i);
  const int64_t bytes = (last + 1) * t.element_size();
  emu::allow(t.const_data_ptr(), bytes,
             as == Hand::read       ? emu::Use::read
             : as == Hand::constant ? emu::Use::constant
                                    : emu::Use::write);
  if (as == Hand::output) emu::poison(t.mutable_data_ptr(), bytes);
}
#else
enum class Hand { read, constant, inplace, output };
inline void hand_over(const Tensor&, Hand) {}
#endif

template <class T = void>
const T* data(const Tensor& t) {
  hand_over(t, Hand::read);
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T = void>
const T* data(const std::optional<Tensor>& t) {
  return t ? data<T>(*t) : nullptr;
}
// Of parameters, which no kernel writes: a launch may read them before its predecessor has ended.
template <class T = void>
const T* constant_data(const Tensor& t) {
  hand_over(t, Hand::constant);
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T = void>
const T* constant_data(const std::optional<Tensor>& t) {
  return t ? constant_data<T>(*t) : nullptr;
}
// Of an output, which the kernel wholly overwrites.
template <class T = void>
T* mutable_data(const Tensor& t) {
  hand_over(t, Hand::output);
  return static_cast<T*>(t.mutable_data_ptr());
}
// Of a tensor that the op changes in part.
template <class T = void>
T* inplace_data(const Tensor& t) {
  hand_over(t, Hand::inplace);
  return static_cast<T*>(t.mutable_data_ptr());
}

// The tensors and numbers of one packed weight, in the order every schema lists them:
//   Tensor codes, Tensor scale, Tensor? zero, Tensor? block_scale, Tensor? block_zero, Tensor?
//   table, int bits, int group_size, int n, int k
inline Weight make_weight(const char* op, const Tensor& codes, const Tensor& scale,
                          const std::optional<Tensor>& zero,
                          const std::optional<Tensor>& block_scale,
                          const std::optional<Tensor>& block_zero,
                          const std::optional<Tensor>& table, int64_t bits, int64_t group,
                          int64_t n, int64_t k) {
  Weight w{};
  check(bits >= 2 && bits <= 8 && layout::planes(int(bits)).count > 0, op,
        "bits must be 2, 3, 4, 5, 6 or 8, got ", bits);
  check_sizes(op, n, k);
  check_group(op, "group_size", group);
  const bool two_level = block_scale.has_value();
  check(!two_level || layout::kBlockGroup % group == 0, op,
        "two-level scales need a group_size that divides 256, got ", group);
  const int64_t kp = layout::padded_k(k, group, two_level), blocks = layout::padded_n(n) / 64,
                groups = kp / group;
  expect(op, "codes", codes, ScalarType::Char, {blocks * 64, kp * bits / 8});
  w.codes = constant_data<uint8_t>(codes);
  w.n = n, w.k = k, w.kp = kp, w.bits = int(bits), w.group = int(group);
  const ScalarType st = scale.scalar_type();
  if (two_level) {
    check(st == ScalarType::Char || st == ScalarType::Byte, op,
          "two-level scale must be int8, or uint8 pairs of nibbles, got ", type_name(st));
    w.scale_kind = st == ScalarType::Char ? Scale::two_level : Scale::two_nibble;
    expect(op, "block_scale", *block_scale, ScalarType::Half,
           {blocks, kp / layout::kBlockGroup, 64});
    w.block_scale = constant_data<uint16_t>(block_scale);
  } else {
    switch (st) {
      case ScalarType::Float: w.scale_kind = Scale::f32; break;
      case ScalarType::Half: w.scale_kind = Scale::f16; break;
      case ScalarType::BFloat16: w.scale_kind = Scale::bf16; break;
      case ScalarType::Float8_e8m0fnu: w.scale_kind = Scale::e8m0; break;
      case ScalarType::Float8_e4m3fn: w.scale_kind = Scale::e4m3; break;
      default:
        fail(op,
             "scale must be float32, float16, bfloat16, float8_e8m0fnu, float8_e4m3fn, or "
             "int8/uint8 with a block_scale, got ",
             type_name(st));
    }
  }
  expect(op, "scale", scale, st, {blocks, groups, 64});
  w.scale = constant_data(scale);
  w.zero_kind = Zero::symmetric;
  if (w.scale_kind == Scale::two_nibble) {
    check(!zero && block_zero, op,
          "uint8 two-level scales hold their minima: they need block_zero and no zero");
    w.zero_kind = Zero::minimum;
  } else if (zero) {
    const ScalarType zt = zero->scalar_type();
    const bool integer = zt == ScalarType::Byte && !two_level;
    check(integer || zt == st, op, "zero must be uint8 (zero points) or of the scale's type ",
          type_name(st), " (minima), got ", type_name(zt));
    check(!two_level || block_zero, op, "two-level minima need block_zero");
    expect(op, "zero", *zero, zt, {blocks, groups, 64});
    w.zero = constant_data(zero);
    w.zero_kind = integer ? Zero::integer : Zero::minimum;
  } else {
    check(!block_zero, op, "block_zero needs zero");
  }
  if (block_zero) {
    check(two_level, op, "block_zero needs block_scale");
    expect(op, "block_zero", *block_zero, ScalarType::Half, {blocks, kp / layout::kBlockGroup, 64});
    w.block_zero = constant_data<uint16_t>(block_zero);
  }
  if (table) {
    check(bits == 4, op, "a table of 16 values needs bits = 4, got ", bits);
    check(w.zero_kind == Zero::symmetric, op,
          "a table has its own zero: it takes no zero points and no minima");
    expect(op, "table", *table, ScalarType::Char, {16});
    w.table = constant_data<int8_t>(table);
  }
  same_device(op, "scale", scale, "codes", codes);
  same_device(op, "zero", zero, "codes", codes);
  same_device(op, "block_scale", block_scale, "codes", codes);
  same_device(op, "block_zero", block_zero, "codes", codes);
  same_device(op, "table", table, "codes", codes);
  return w;
}

}  // namespace qk
