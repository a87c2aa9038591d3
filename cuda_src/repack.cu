// Between the host's blocks and a shard's planes: every thread moves single bytes, so chunks may begin and end anywhere.
#include "tp.h"

TP_KERNEL(repack, RepackArgs, 256) {
    const i64 stride = (i64)gridDim.x * blockDim.x;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < args.bytes; i += stride) {
        const i64 at = args.offset + i, block = at / args.block_bytes;
        const int in_block = (int)(at % args.block_bytes);
        const i64 b = block % args.row_blocks, row = block / args.row_blocks % args.n_rows, matrix = block / args.row_blocks / args.n_rows;
        if (b < args.block_begin || b >= args.block_end || row < args.row_begin || row >= args.row_end) continue;
        for (int f = 0; f < args.n_fields; ++f) {
            const int in_field = in_block - args.field_offset[f];
            if (in_field < 0 || in_field >= args.field_bytes[f]) continue;
            char* p = args.plane[f] + matrix * args.matrix_stride + (row - args.row_begin) * args.row_stride + (b - args.block_begin) * args.field_bytes[f] +
                      in_field;
            if (args.to_host) args.host[i] = *p;
            else *p = args.host[i];
        }
    }
}
