// Ops that put elements elsewhere: one thread per element of y, any strides.
#include "element.h"
#include "index.h"

namespace ggml_tp {
namespace {

TP_DEVICE void move_bytes(char* to, const char* from, int bytes) {
    if (bytes == 4) *(i32*)to = *(const i32*)from;
    else if (bytes == 2) *(u16*)to = *(const u16*)from;
    else
        for (int b = 0; b < bytes; ++b) to[b] = from[b];
}
TP_DEVICE i64 modulo(i64 i, i64 n) {
    const i64 r = i % n;
    return r < 0 ? r + n : r;
}

}  // namespace
}  // namespace ggml_tp

using namespace ggml_tp;

// x, then b, along dimension p[0].
TP_KERNEL(concat, MoveArgs, 256) {
    TP_FOR_EACH(i, tp_elems(args.y)) {
        Index4 at = tp_index(args.y.ne, i);
        char* to = tp_at(args.y, at);
        const int d = args.p[0];
        const bool second = at.i[d] >= args.x.ne[d];
        if (second) at.i[d] -= args.x.ne[d];
        move_bytes(to, tp_at(second ? args.b : args.x, at), args.bytes);
    }
}

TP_KERNEL(repeat, MoveArgs, 256) {
    TP_FOR_EACH(i, tp_elems(args.y)) {
        const Index4 at = tp_index(args.y.ne, i);
        move_bytes(tp_at(args.y, at), tp_at_repeated(args.x, at), args.bytes);
    }
}

// p: elements before and after, for each dimension; p[8]: x goes round instead of zeros.
TP_KERNEL(pad, MoveArgs, 256) {
    TP_FOR_EACH(i, tp_elems(args.y)) {
        const Index4 at = tp_index(args.y.ne, i);
        Index4 from = at;
        bool inside = true;
        for (int d = 0; d < 4; ++d) {
            from.i[d] -= args.p[2 * d];
            if (args.p[8]) from.i[d] = modulo(from.i[d], args.x.ne[d]);
            else inside &= from.i[d] >= 0 && from.i[d] < args.x.ne[d];
        }
        if (inside) move_bytes(tp_at(args.y, at), tp_at(args.x, from), args.bytes);
        else tp_store(args.y.type, tp_at(args.y, at), 0.0f);
    }
}

// p: by how much, for each dimension.
TP_KERNEL(roll, MoveArgs, 256) {
    TP_FOR_EACH(i, tp_elems(args.y)) {
        const Index4 at = tp_index(args.y.ne, i);
        Index4 from = at;
        for (int d = 0; d < 4; ++d) from.i[d] = modulo(at.i[d] - args.p[d], args.x.ne[d]);
        move_bytes(tp_at(args.y, at), tp_at(args.x, from), args.bytes);
    }
}

// Column i0 of row i1 is kept where i0 - i1 - p[0] has a sign that is wanted (p[1]: negative, p[2]: zero, p[3]: positive); else `value`.
TP_KERNEL(triangle, MoveArgs, 256) {
    TP_FOR_EACH(i, tp_elems(args.y)) {
        const Index4 at = tp_index(args.y.ne, i);
        const i64 side = at.i[0] - at.i[1] - args.p[0];
        const bool keep = side < 0 ? args.p[1] : side == 0 ? args.p[2] : args.p[3];
        if (keep) move_bytes(tp_at(args.y, at), tp_at(args.x, at), args.bytes);
        else tp_store(args.y.type, tp_at(args.y, at), args.value);
    }
}

TP_KERNEL(diagonal, MoveArgs, 256) {
    TP_FOR_EACH(i, tp_elems(args.y)) {
        const Index4 at = tp_index(args.y.ne, i);
        Index4 from = at;
        from.i[1] = 0;
        if (at.i[0] == at.i[1]) move_bytes(tp_at(args.y, at), tp_at(args.x, from), args.bytes);
        else tp_store(args.y.type, tp_at(args.y, at), 0.0f);
    }
}

TP_KERNEL(arange, MoveArgs, 256) {
    TP_FOR_EACH(i, tp_elems(args.y)) tp_store(args.y.type, tp_at(args.y, tp_index(args.y.ne, i)), args.value + args.step * (float)i);
}
