// CPY, CONT, DUP: element i of x, counted in x's order, becomes element i of y, counted in y's order; types are converted.
#include "index.h"
#include "quantize_search.h"

TP_KERNEL(copy, CopyArgs, 256) {
    using namespace ggml_tp;
    TP_FOR_EACH(i, tp_elems(args.x)) {
        char* to = tp_at(args.y, tp_index(args.y.ne, i));
        const char* from = tp_at(args.x, tp_index(args.x.ne, i));
        if (args.x.type == args.y.type) {  // bit for bit: integers beyond 2^24 and NaN payloads too
            if (args.x.type == kF32 || args.x.type == kI32) *(i32*)to = *(const i32*)from;
            else *(u16*)to = *(const u16*)from;
        } else {
            tp_store(args.y.type, to, tp_load(args.x.type, from));
        }
    }
}

// A piece for each row of blocks: a read of the host's memory takes a microsecond, and pieces that followed each other would take one each.
TP_KERNEL(copy_inputs, CopyInputsArgs, 256) {
    using namespace ggml_tp;
    const InputPiece& piece = args.piece[blockIdx.y];
    const i64 thread = (i64)blockIdx.x * blockDim.x + threadIdx.x, threads = (i64)gridDim.x * blockDim.x;
    const i64 words = ((u64)piece.from | (u64)piece.to) % sizeof(TpInt4) ? 0 : piece.bytes / (i64)sizeof(TpInt4);
    for (i64 i = thread; i < words; i += threads) ((TpInt4*)piece.to)[i] = ((const TpInt4*)piece.from)[i];
    for (i64 i = words * (i64)sizeof(TpInt4) + thread; i < piece.bytes; i += threads) piece.to[i] = piece.from[i];
}

TP_KERNEL(copy_units, CopyUnitsArgs, 256) {
    using namespace ggml_tp;
    TP_FOR_EACH(i, tp_elems(args.x)) {
        char* to = tp_at(args.y, tp_index(args.y.ne, i));
        const char* from = tp_at(args.x, tp_index(args.x.ne, i));
        for (int b = 0; b < args.bytes; ++b) to[b] = from[b];
    }
}

TP_KERNEL(copy_from_blocks, CopyBlocksArgs, 256) {
    using namespace ggml_tp;
    TP_FOR_EACH(i, tp_elems(args.y)) {
        const Index4 from = tp_index(args.x_ne, i);
        const float v = tp_weight_elem(args.x.type, tp_weight_row(args.x, from.i[1], from.i[2], from.i[3]), from.i[0]);
        tp_store(args.y.type, tp_at(args.y, tp_index(args.y.ne, i)), v);
    }
}

namespace ggml_tp {

/// y.ne[0] counts blocks. One thread a block.
template <class Put>
TP_DEVICE void copy_to_blocks_by(const CopyArgs& args, Put put) {
    const i64 elems = tp_elems(args.x) / tp_elems(args.y);
    TP_FOR_EACH(i, tp_elems(args.y)) {
        const Index4 first = tp_index(args.x.ne, i * elems);
        const char* from = tp_at(args.x, first);
        const bool one_row = first.i[0] + elems <= args.x.ne[0];
        auto value = [&](int e) {
            return tp_load(args.x.type, one_row ? from + e * args.x.nb[0] : (const char*)tp_at(args.x, tp_index(args.x.ne, i * elems + e)));
        };
        put(value, tp_at(args.y, tp_index(args.y.ne, i)));
    }
}

}  // namespace ggml_tp

TP_KERNEL(copy_to_blocks, CopyArgs, 256) {
    using namespace ggml_tp;
    copy_to_blocks_by(args, [&](auto x, char* out) { tp_quantize_block(args.y.type, x, out); });
}
// A kernel of its own: its arrays would be in the way of the others.
TP_KERNEL(copy_to_search, CopyArgs, 256) {
    using namespace ggml_tp;
    copy_to_blocks_by(args, [&](auto x, char* out) { tp_search_block(args.y.type, x, out); });
}
