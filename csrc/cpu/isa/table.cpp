#include "isa.h"

#define QK_NAME_(isa) #isa
#define QK_NAME(isa) QK_NAME_(isa)

namespace qk::QK_ISA {

extern const Kernels table = {
    QK_NAME(QK_ISA),
    linear,
    linear_scratch,
    quantize_act,
    pack,
    unpack,
    dequantize,
    embedding,
    norm,
    gate,
    kv_append,
    attention,
    attention_scratch,
    attention_dense,
    attention_dense_scratch,
    sample,
    peak_int8,
    peak_float32,
};

}  // namespace qk::QK_ISA
