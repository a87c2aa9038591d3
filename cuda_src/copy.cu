// CPY, CONT, DUP: element i of x, counted in x's order, becomes element i of y, counted in y's order; types are converted.
#include "index.h"

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
